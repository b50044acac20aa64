"""The U-Net recipe of 2015 with every step but the convolutions made nearly free."""

from pkgutil import extend_path

# In a clone that is not the installed copy, the compiled parts are found in the installed one.
__path__ = extend_path(__path__, __name__)

from . import reference
from ._library import HAS_CUDA, build_info
from .ops.weighted_ce import WeightedCELoss, weighted_ce
from .reference import border_weight_map, elastic_deform, separate_touching, two_nearest
from .unet import UNet

__all__ = [
    "HAS_CUDA",
    "UNet",
    "WeightedCELoss",
    "border_weight_map",
    "build_info",
    "elastic_deform",
    "reference",
    "separate_touching",
    "two_nearest",
    "weighted_ce",
]
