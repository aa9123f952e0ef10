"""One matrix product per expert, over tokens sorted by expert.

`x_ND` holds the tokens of expert 0, then those of expert 1, …; `ends_E[e]` is the row behind expert e's last token (int32, inclusive
prefix sum of the counts). No capacity, no padding, no dropped token; an expert without tokens costs nothing.

`reference` is a loop over experts. Elsewhere than in bf16 on a CPU (see `windows.py`) the product is PyTorch's grouped one, with its own
backward: two more grouped products, without copies of the weights. That one wants rows of a multiple of 16 bytes and knows no
fp64; the rest takes the loop.

Shapes: N sorted tokens, D inputs, F outputs, E experts.
"""

from typing import Any

import torch
from torch import Tensor

from byrote.kernels.grouped_matmul import windows
from byrote.kernels.grouped_matmul.reference import grouped_matmul as reference

__all__ = ["grouped_matmul", "reference"]

_ROW_BYTES = 16


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_EFD, ends_E)
        return torch._grouped_mm(x_ND, weight_EFD.transpose(1, 2), offs=ends_E)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_ND, weight_EFD, ends_E = ctx.saved_tensors
        grad_NF = grad_NF.contiguous()
        grad_x = torch._grouped_mm(grad_NF, weight_EFD, offs=ends_E) if ctx.needs_input_grad[0] else None
        grad_w = torch._grouped_mm(grad_NF.t(), x_ND, offs=ends_E) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w, None


class _Windows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_EFD)
        ctx.ends = ends_E.tolist()
        return windows.product(x_ND, weight_EFD, ctx.ends)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_ND, weight_EFD = ctx.saved_tensors
        grad_NF = grad_NF.contiguous()
        grad_x = windows.product(grad_NF, weight_EFD.transpose(1, 2), ctx.ends) if ctx.needs_input_grad[0] else None
        grad_w = windows.weight_gradient(grad_NF, x_ND, ctx.ends) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w, None


def grouped_matmul(x_ND: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """[N, F]: row n is `weight[e] @ x[n]` for the expert e whose segment holds n. x and weight share one dtype."""
    if x_ND.shape[0] == 0:
        return x_ND.new_zeros(0, weight_EFD.shape[1]) + (weight_EFD.sum() + x_ND.sum()) * 0
    if x_ND.device.type == "cpu" and x_ND.dtype == torch.bfloat16:
        windowed_NF: Tensor = _Windows.apply(x_ND, weight_EFD, ends_E)
        return windowed_NF
    if x_ND.dtype == torch.float64 or any(width * x_ND.element_size() % _ROW_BYTES for width in weight_EFD.shape[1:]):
        return reference(x_ND, weight_EFD, ends_E)
    grouped_NF: Tensor = _Grouped.apply(x_ND, weight_EFD, ends_E)
    return grouped_NF
