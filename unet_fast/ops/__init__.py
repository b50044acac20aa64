"""The operators: argument checks, fake kernels and derivatives of the native ones."""

from ._border_weight_map import border_weight_map, border_weights, separate_touching, two_nearest
from ._elastic_deform import elastic_deform
from ._weighted_ce import WeightedCELoss, weighted_ce

__all__ = [
    "WeightedCELoss",
    "border_weight_map",
    "border_weights",
    "elastic_deform",
    "separate_touching",
    "two_nearest",
    "weighted_ce",
]
