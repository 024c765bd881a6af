"""The precision in which the equations are computed."""

import torch
from torch import Tensor


def detached(tensor: Tensor) -> Tensor:
    """Cut the gradient and widen to float32 at least (float64 stays): half precision loses small ratios."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
