"""One matrix product per expert, over tokens sorted by expert.

`x_ND` holds the tokens of expert 0, then those of expert 1, …; `ends_E[e]` is the row behind expert e's last token (int32, inclusive
prefix sum of the counts). No capacity, no padding, no dropped token; an expert without tokens costs nothing.

The product runs in the dtype of x; a weight may be wider (fp32 beside bf16), and so is its gradient then.

Back ends, the first that can: C for the CPU (`cpu.py`); in bf16 on a CPU, single products over windows of rows (`windows.py`); PyTorch's
grouped product, with its own backward: two more grouped products, without copies of the weights. That one wants rows of a multiple
of 16 bytes and knows no fp64; the rest takes the loop over experts of `reference`.

Shapes: N sorted tokens, D inputs, F outputs, E experts.
"""

from typing import Any

import torch
from torch import Tensor

from byrote.kernels.grouped_matmul import cpu, windows
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
    """[N, F]: row n is `weight[e] @ x[n]` for the expert e whose segment holds n.

    Raises ValueError for shapes that do not fit, and on a CPU for `ends` whose last is not N.
    """
    _check(x_ND, weight_EFD, ends_E)
    if x_ND.shape[0] == 0:
        return x_ND.new_zeros(0, weight_EFD.shape[1]) + (weight_EFD.sum() + x_ND.sum()) * 0
    if cpu.can_run(x_ND, weight_EFD, ends_E):
        return cpu.grouped_matmul(x_ND, weight_EFD, ends_E)
    weight_EFD = weight_EFD.to(x_ND.dtype)
    if x_ND.device.type == "cpu" and x_ND.dtype == torch.bfloat16:
        windowed_NF: Tensor = _Windows.apply(x_ND, weight_EFD, ends_E)
        return windowed_NF
    if x_ND.dtype == torch.float64 or any(width * x_ND.element_size() % _ROW_BYTES for width in weight_EFD.shape[1:]):
        return reference(x_ND, weight_EFD, ends_E)
    grouped_NF: Tensor = _Grouped.apply(x_ND, weight_EFD, ends_E)
    return grouped_NF


def _check(x: Tensor, weight: Tensor, ends: Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2] or ends.shape != weight.shape[:1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, weight, ends))
        raise ValueError(f"grouped_matmul got x, weight, ends of shapes {shapes}; needed: [N, D], [E, F, D], [E]")
    if ends.device.type == "cpu" and int(ends[-1]) != x.shape[0]:
        raise ValueError(
            f"the last expert ends at row {int(ends[-1])} of {x.shape[0]}; ends must be the inclusive prefix sum of all counts"
        )
