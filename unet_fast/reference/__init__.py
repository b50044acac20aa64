"""Plain PyTorch and SciPy versions of the operators: the truth the kernels are tested against."""

from .weighted_ce import weighted_ce

__all__ = ["weighted_ce"]
