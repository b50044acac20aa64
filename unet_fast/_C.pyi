import numpy as np
from numpy.typing import ArrayLike, NDArray

def build_info() -> dict[str, str]: ...

class numerics:
    @staticmethod
    def exp_nonpositive(x: ArrayLike) -> NDArray[np.float32]: ...
    @staticmethod
    def log1p_nonnegative(x: ArrayLike) -> NDArray[np.float32]: ...
