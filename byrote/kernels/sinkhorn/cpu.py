"""Sinkhorn-Knopp in C, one vector lane per token. The contract is reference.py's, in fp32."""

import ctypes
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byrote.kernels import native

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "sinkhorn.c", FOLDER / "sinkhorn.h", native.INCLUDE / "lanes.h")
SIZES = (c_int, c_long, c_int, c_int, c_float)  # threads, N, R, iters, eps
FUNCTIONS = {"sinkhorn_forward": (*SIZES, c_void_p, c_void_p), "sinkhorn_backward": (*SIZES, c_void_p, c_void_p, c_void_p)}
MAX_STREAMS = 8


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    return native.load("sinkhorn", SOURCES, FUNCTIONS)


def can_run(logits_NRR: Tensor) -> bool:
    """Whether this back end serves such logits here."""
    fits = logits_NRR.dtype != torch.float64 and logits_NRR.shape[-1] <= MAX_STREAMS
    return fits and native.can_take(logits_NRR) and library() is not None


def sinkhorn(logits_NRR: Tensor, *, iters: int, eps: float) -> Tensor:
    """As the reference."""
    logits_NRR = logits_NRR.float()
    mixes_NRR: Tensor = _Sinkhorn.apply(logits_NRR, iters, eps)
    return mixes_NRR


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NRR: Tensor, iters: int, eps: float) -> Tensor:
        logits_NRR = logits_NRR.contiguous()
        ctx.save_for_backward(logits_NRR)
        ctx.iters, ctx.eps = iters, eps
        mixes_NRR = torch.empty_like(logits_NRR)
        _call("sinkhorn_forward", logits_NRR, iters, eps, mixes_NRR)
        return mixes_NRR

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NRR: Tensor) -> tuple[Tensor, None, None]:
        (logits_NRR,) = ctx.saved_tensors
        pulled_NRR = torch.empty_like(logits_NRR)
        _call("sinkhorn_backward", logits_NRR, ctx.iters, ctx.eps, grad_NRR.contiguous(), pulled_NRR)
        return pulled_NRR, None, None


def _call(function: str, logits_NRR: Tensor, iters: int, eps: float, *others: Tensor) -> None:
    N, R, _ = logits_NRR.shape
    pointers = [native.address(tensor) for tensor in (logits_NRR, *others)]
    native.check(getattr(library(), function)(torch.get_num_threads(), N, R, iters, eps, *pointers))
