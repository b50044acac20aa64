"""Plain PyTorch and SciPy versions of the operators, against which the kernels are tested."""

from ._border_weight_map import border_weight_map, border_weights, separate_touching, two_nearest
from ._elastic_deform import elastic_deform
from ._weighted_ce import weighted_ce

__all__ = [
    "border_weight_map",
    "border_weights",
    "elastic_deform",
    "separate_touching",
    "two_nearest",
    "weighted_ce",
]
