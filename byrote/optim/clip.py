"""Clipping by the global norm, table rows included.

The norm is taken over every gradient of the step at once, dense parameters and table rows alike, and all are scaled by the same
factor: the direction of the step stays. Nothing waits for the device.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def clip_gradients(params: Iterable[Tensor], row_grads: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scales all gradients in place so that their joint norm is at most `max_norm`; returns the norm before, a scalar tensor.

    `max_norm` 0 only measures. A norm that is not finite leaves every gradient as it is, so that the first bad one can be named.
    """
    grads = [param.grad for param in params if param.grad is not None] + list(row_grads)
    if not grads:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm(grads)
    if max_norm > 0:
        factor = (max_norm / norm.clamp(min=max_norm)).where(norm.isfinite(), torch.ones_like(norm))
        torch._foreach_mul_(grads, factor)
    return norm
