"""The U-Net recipe of 2015 with every step but the convolutions made nearly free."""

from importlib import import_module
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

# Lets a source clone use the compiled libraries of the installed package.
__path__ = extend_path(__path__, __name__)

from . import _program  # noqa: F401  first: Ctrl-C may come while torch is loaded
from ._library import HAS_CUDA, build_info, use_reference
from .augment import Augmentation, AugmentationParameters
from .ops import (
    WeightedCELoss,
    border_weight_map,
    elastic_deform,
    separate_touching,
    two_nearest,
    weighted_ce,
)
from .unet import UNet
from .weights import BorderWeights

if TYPE_CHECKING:
    from . import metrics, reference
    from .model_file import load_model, save_model
    from .objects import label_components
    from .prediction.predictor import predict
    from .training.config import TrainConfig
    from .training.loop import train

# Imported on first use, because they load SciPy, Matplotlib and file readers.
_LATER = {
    "TrainConfig": "training.config",
    "label_components": "objects",
    "load_model": "model_file",
    "metrics": "metrics",
    "predict": "prediction.predictor",
    "reference": "reference",
    "save_model": "model_file",
    "train": "training.loop",
}

__all__ = [
    "HAS_CUDA",
    "Augmentation",
    "AugmentationParameters",
    "BorderWeights",
    "TrainConfig",
    "UNet",
    "WeightedCELoss",
    "border_weight_map",
    "build_info",
    "elastic_deform",
    "label_components",
    "load_model",
    "metrics",
    "predict",
    "reference",
    "save_model",
    "separate_touching",
    "train",
    "two_nearest",
    "use_reference",
    "weighted_ce",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_LATER[name]}", __name__)
    value = module if name == _LATER[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
