"""The readable twin of the grouped product: a loop over experts."""

import torch
from torch import Tensor


def grouped_matmul(x_ND: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Slice, multiply, concatenate."""
    starts = [0, *ends_E.tolist()]
    parts = [x_ND[a:b] @ weight_FD.t() for a, b, weight_FD in zip(starts, starts[1:], weight_EFD, strict=False)]
    return torch.cat(parts)
