"""Attention in C, forward and backward. The contract is the package's, the formulas are reference.py's.

Kept for the backward, beside the inputs and the output: one fp32 log-sum-exp per head and query, and what rounding to bf16 took
from the output (<out, d_out> is subtracted from numbers near it where a query sees few keys). Working memory grows with T + S
per thread, never with T·S. Products take bf16 pairs or fp32 as they come; scores, exponentials and sums are fp32.

Queries, keys and values may be any views whose last dim is dense (a slice of a wider projection, heads behind tokens). Outputs
and gradients lie as [B, T, H, ·], so that a transposition back to tokens × (heads · width) copies nothing.
"""

import ctypes
from ctypes import POINTER, c_double, c_long, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byrote.kernels import native

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "attention.c", FOLDER / "attention.h", native.INCLUDE / "product.h", native.INCLUDE / "lanes.h")
WIDE_WORK = 1 << 20  # multiply-adds; fewer are not worth a second thread


class _Heads(ctypes.Structure):
    """`heads` of attention.h."""

    _fields_ = (("start", c_void_p), ("batch", c_long), ("head", c_long), ("row", c_long))

    @classmethod
    def of(cls, x_BHTK: Tensor) -> "_Heads":
        return cls(x_BHTK.data_ptr(), *x_BHTK.stride()[:3])


class _Problem(ctypes.Structure):
    """`problem` of attention.h."""

    _fields_ = (
        *((name, c_long) for name in ("threads", "bf16", "causal", "B", "H", "T", "S", "K", "V")),
        *((name, _Heads) for name in ("q", "k", "v", "out", "rest", "d_out", "d_q", "d_k", "d_v")),
        *(("mask", c_void_p), ("mask_batch", c_long), ("mask_row", c_long), ("lse", c_void_p), ("scale", c_double), ("spans", c_void_p)),
    )


FUNCTIONS = {"attention_forward": (POINTER(_Problem),), "attention_backward": (POINTER(_Problem),), "attention_is_wide": ()}


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    return native.load("attention", SOURCES, FUNCTIONS)


def can_run(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, mask_B1TS: Tensor | None) -> bool:
    """Whether this back end serves such inputs here, and is worth it: vectors are wide enough to beat PyTorch."""
    tensors = (q_BHTK, k_BHSK, v_BHSV)
    dtypes = {_working_dtype(tensor) for tensor in tensors}
    fits = len(dtypes) == 1 and dtypes <= {torch.float32, torch.bfloat16} and q_BHTK.shape[-1] > 0 and v_BHSV.shape[-1] > 0
    if not fits or not native.can_take(*tensors, *(() if mask_B1TS is None else (mask_B1TS,))):
        return False
    opened = library()
    return opened is not None and bool(opened.attention_is_wide())


def attend(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, *, scale: float, mask_B1TS: Tensor | None = None, causal: bool = False
) -> Tensor:
    """As the package's."""
    q, k, v = (tensor.to(_working_dtype(tensor)) for tensor in (q_BHTK, k_BHSK, v_BHSV))
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    out_BHTV: Tensor = _Attention.apply(q, k, v, mask_B1TS, scale, causal, trains)
    return out_BHTV


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, trains: bool) -> Tensor:
        q, k, v = (_dense_rows(tensor) for tensor in (q, k, v))
        out = _tokens_first(q, v.shape[-1])
        lse = torch.empty(q.shape[:3], dtype=torch.float32) if trains else None
        rest = torch.empty_like(out) if trains and out.dtype == torch.bfloat16 else None
        _call("attention_forward", _problem(q, k, v, mask, scale, causal, lse, out=out, rest=rest))
        ctx.save_for_backward(q, k, v, mask, lse, out, rest)
        ctx.scale, ctx.causal = scale, causal
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, lse, out, rest = ctx.saved_tensors
        d_q, d_k, d_v = (_tokens_first(tensor, tensor.shape[-1]) for tensor in (q, k, v))
        tensors = {"out": out, "rest": rest, "d_out": _dense_rows(grad), "d_q": d_q, "d_k": d_k, "d_v": d_v}
        _call("attention_backward", _problem(q, k, v, mask, ctx.scale, ctx.causal, lse, **tensors))
        return d_q, d_k, d_v, None, None, None, None


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _tokens_first(like_BHTK: Tensor, width: int) -> Tensor:
    """An empty [B, H, T, width] that lies as [B, T, H, width]."""
    B, H, T, _ = like_BHTK.shape
    return like_BHTK.new_empty(B, T, H, width).transpose(1, 2)


def _problem(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, lse: Tensor | None, **tensors: Tensor | None
) -> _Problem:
    (B, H, T, K), (S, V) = q.shape, v.shape[2:]
    work = B * H * T * S * (K + V)
    problem = _Problem(torch.get_num_threads() if work > WIDE_WORK else 1, q.dtype == torch.bfloat16, causal, B, H, T, S, K, V)
    problem.scale, problem.lse = scale, native.address(lse)
    for name, tensor in {"q": q, "k": k, "v": v, **tensors}.items():
        if tensor is not None:
            setattr(problem, name, _Heads.of(tensor))
    if mask is not None:
        mask = _dense_rows(mask.expand(B, 1, T, S))
        problem.mask, problem.mask_batch, problem.mask_row = mask.data_ptr(), mask.stride(0), mask.stride(2)
    return problem


def _call(function: str, problem: _Problem) -> None:
    native.check(getattr(library(), function)(problem))
