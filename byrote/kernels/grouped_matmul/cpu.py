"""The grouped product in C, forward and backward. The contract is the package's; products run in the dtype of x.

One call serves all experts, whatever their loads: nothing is compiled for a shape, and no row is computed in vain. Weights may stay
fp32 beside bf16 rows: they are rounded on the way into the cache, and their gradient is never rounded to bf16.
"""

import ctypes
from ctypes import POINTER, c_long, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byrote.kernels import native

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "grouped_matmul.c", native.INCLUDE / "product.h", native.INCLUDE / "lanes.h")


class _Problem(ctypes.Structure):
    """`problem` of grouped_matmul.c."""

    _fields_ = (
        *((name, c_long) for name in ("threads", "bf16", "weight_bf16", "N", "D", "F", "E")),
        *((name, c_void_p) for name in ("ends", "x", "grad", "weight")),
        *(("x_row", c_long), ("grad_row", c_long), ("out", c_void_p)),
    )


FUNCTIONS = {
    **dict.fromkeys(("grouped_forward", "grouped_inputs", "grouped_weights"), (POINTER(_Problem),)),
    "grouped_is_wide": (),
}


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    return native.load("grouped_matmul", SOURCES, FUNCTIONS)


def can_run(x_ND: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> bool:
    """Whether this back end serves such inputs here, and is worth it: vectors are wide enough to beat PyTorch."""
    fits = x_ND.dtype in (torch.float32, torch.bfloat16) and weight_EFD.dtype in (torch.float32, x_ND.dtype)
    if not fits or not native.can_take(x_ND, weight_EFD, ends_E):
        return False
    opened = library()
    return opened is not None and bool(opened.grouped_is_wide())


def grouped_matmul(x_ND: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """As the package's."""
    out_NF: Tensor = _Grouped.apply(x_ND, weight_EFD, ends_E)
    return out_NF


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
        x_ND, weight_EFD, ends_E = native.rows(x_ND), weight_EFD.contiguous(), ends_E.to(torch.int32).contiguous()
        ctx.save_for_backward(x_ND, weight_EFD, ends_E)
        out_NF = x_ND.new_empty(x_ND.shape[0], weight_EFD.shape[1])
        _call("grouped_forward", x_ND, weight_EFD, ends_E, None, out_NF)
        return out_NF

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_EFD, ends_E = ctx.saved_tensors
        grad_NF, d_x, d_weight = native.rows(grad_NF), None, None
        if ctx.needs_input_grad[0]:
            d_x = x_ND.new_empty(x_ND.shape)
            _call("grouped_inputs", x_ND, weight_EFD, ends_E, grad_NF, d_x)
        if ctx.needs_input_grad[1]:
            d_weight = torch.empty_like(weight_EFD)
            _call("grouped_weights", x_ND, weight_EFD, ends_E, grad_NF, d_weight)
        return d_x, d_weight, None


def _call(function: str, x_ND: Tensor, weight_EFD: Tensor, ends_E: Tensor, grad_NF: Tensor | None, out: Tensor) -> None:
    (N, D), (E, F, _) = x_ND.shape, weight_EFD.shape
    bf16, weight_bf16 = (tensor.dtype == torch.bfloat16 for tensor in (x_ND, weight_EFD))
    pointers = (ends_E.data_ptr(), x_ND.data_ptr(), None if grad_NF is None else grad_NF.data_ptr(), weight_EFD.data_ptr())
    strides = (x_ND.stride(0), 0 if grad_NF is None else grad_NF.stride(0))
    problem = _Problem(native.threads_for(N * D), bf16, weight_bf16, N, D, F, E, *pointers, *strides, out.data_ptr())
    native.check(getattr(library(), function)(problem))
