"""The U-Net recipe of 2015 with every step but the convolutions made nearly free."""

from pkgutil import extend_path

# In a clone that is not the installed copy, the compiled parts are found in the installed one.
__path__ = extend_path(__path__, __name__)

from . import metrics, reference
from ._library import HAS_CUDA, build_info
from .augment import Augmentation
from .components import label_components
from .config import TrainConfig
from .ops.border_weight_map import border_weight_map, separate_touching, two_nearest
from .ops.elastic_deform import elastic_deform
from .ops.weighted_ce import WeightedCELoss, weighted_ce
from .predict import predict
from .train import train
from .unet import UNet, load_model, save_model
from .weights import BorderWeights

__all__ = [
    "HAS_CUDA",
    "Augmentation",
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
    "weighted_ce",
]
