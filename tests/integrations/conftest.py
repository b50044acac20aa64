"""What the packages of others need here."""

from importlib.util import find_spec

import torch

if torch.version.cuda is None and find_spec("torchvision"):
    # The wheels of torchvision on package indices are built with CUDA. Beside a torch for CPUs
    # their library is not loaded, and without its operators Python cannot import them.
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
