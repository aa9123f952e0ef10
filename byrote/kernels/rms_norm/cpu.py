"""RMSNorm in C: one pass over a row that stays in the first-level cache. The contract is reference.py's.

Kept for the backward: x, which lives on anyway, and one inverse root mean square a row. Rows may lie apart (a slice of a wider
projection), so that norming a part of it copies nothing.

Shapes: N rows, D numbers a row.
"""

import ctypes
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byrote.kernels import native

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "rms_norm.c", native.INCLUDE / "lanes.h")
SIZES = (c_int, c_int, c_long, c_long, c_long)  # threads, bf16, N, D, numbers from one row of x to the next
FUNCTIONS = {"rms_norm_forward": (*SIZES, c_float, *[c_void_p] * 4), "rms_norm_backward": (*SIZES, *[c_void_p] * 6)}


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    return native.load("rms_norm", SOURCES, FUNCTIONS)


def can_run(x: Tensor, gain_D: Tensor) -> bool:
    """Whether this back end serves such rows here."""
    return x.dtype in (torch.float32, torch.bfloat16) and native.can_take(x, gain_D) and library() is not None


def rms_norm(x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """As the reference."""
    gain_D = gain_D.float()
    if not native.wants_grad(x, gain_D):
        return _forward(x, gain_D, eps)[0]
    y: Tensor = _RMSNorm.apply(x, gain_D, eps)
    return y


def _forward(x: Tensor, gain_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x_ND, gain_D = native.rows(x), gain_D.contiguous()
    y, inverse_rms_N = native.empty(x.shape, x.dtype), native.empty((x_ND.shape[0],), torch.float32)
    _call("rms_norm_forward", x_ND, eps, x_ND.data_ptr(), gain_D.data_ptr(), y.data_ptr(), inverse_rms_N.data_ptr())
    return y, inverse_rms_N


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        y, inverse_rms_N = _forward(x, gain_D, eps)
        ctx.save_for_backward(x, gain_D, inverse_rms_N)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain_D, inverse_rms_N = ctx.saved_tensors
        x_ND, gain_D, grad = native.rows(x), gain_D.contiguous(), grad.contiguous()
        d_x = native.empty(x.shape, x.dtype)
        d_gain_PD = native.empty((native.threads_for(x.numel()), gain_D.shape[0]), torch.float32)
        _call("rms_norm_backward", x_ND, *(tensor.data_ptr() for tensor in (x_ND, gain_D, inverse_rms_N, grad, d_x, d_gain_PD)))
        return d_x, d_gain_PD[0], None


def _call(function: str, x_ND: Tensor, *arguments: float) -> None:
    (N, D), bf16 = x_ND.shape, x_ND.dtype == torch.bfloat16
    native.check(getattr(library(), function)(native.threads_for(N * D), bf16, N, D, x_ND.stride(0), *arguments))
