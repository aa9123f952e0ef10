"""SwiGLU in C: forward and backward are one pass each over the projection. The contract is reference.py's, in fp32 inside.

Kept for the backward: the inputs alone. Shapes: N tokens, F hidden width.
"""

import ctypes
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byrote.kernels import native

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "swiglu.c", native.INCLUDE / "lanes.h")
SIZES = (c_int, c_int, c_long, c_long, c_long, c_float)  # threads, bf16, N, F, numbers from one row to the next, limit
FUNCTIONS = {"swiglu_forward": (*SIZES, *[c_void_p] * 3), "swiglu_backward": (*SIZES, *[c_void_p] * 5)}


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    return native.load("swiglu", SOURCES, FUNCTIONS)


def can_run(gate_up_N2F: Tensor, weight_N: Tensor | None) -> bool:
    """Whether this back end serves such tensors here."""
    fits = gate_up_N2F.dtype in (torch.float32, torch.bfloat16)
    tensors = (gate_up_N2F,) if weight_N is None else (gate_up_N2F, weight_N)
    return fits and native.can_take(*tensors) and library() is not None


def swiglu(gate_up_N2F: Tensor, *, limit: float | None = None, weight_N: Tensor | None = None) -> Tensor:
    """As the reference."""
    weight_N = None if weight_N is None else weight_N.float()
    limit = float("inf") if limit is None else limit
    if not native.wants_grad(gate_up_N2F, weight_N):
        return _forward(gate_up_N2F, weight_N, limit)
    hidden_NF: Tensor = _SwiGLU.apply(gate_up_N2F, weight_N, limit)
    return hidden_NF


def _forward(gate_up: Tensor, weight: Tensor | None, limit: float) -> Tensor:
    gate_up_N2F, weight_N = native.rows(gate_up), None if weight is None else weight.contiguous()
    hidden = native.empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2), gate_up.dtype)
    _call("swiglu_forward", gate_up_N2F, limit, native.address(weight_N), hidden.data_ptr())
    return hidden


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor | None, limit: float) -> Tensor:
        ctx.save_for_backward(gate_up, weight)
        ctx.limit = limit
        return _forward(gate_up, weight, limit)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gate_up, weight = ctx.saved_tensors
        gate_up_N2F, weight_N = native.rows(gate_up), None if weight is None else weight.contiguous()
        d_gate_up = native.empty(gate_up.shape, gate_up.dtype)
        d_weight = None if weight is None else native.empty(weight.shape, torch.float32)
        grad = grad.contiguous()
        others = (native.address(weight_N), grad.data_ptr(), d_gate_up.data_ptr(), native.address(d_weight))
        _call("swiglu_backward", gate_up_N2F, ctx.limit, *others)
        return d_gate_up, d_weight, None


def _call(function: str, gate_up_N2F: Tensor, limit: float, *pointers: int | None) -> None:
    N, width = gate_up_N2F.shape
    sizes = (native.threads_for(N * width), gate_up_N2F.dtype == torch.bfloat16, N, width // 2, gate_up_N2F.stride(0), limit)
    native.check(getattr(library(), function)(*sizes, gate_up_N2F.data_ptr(), *pointers))
