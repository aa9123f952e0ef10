"""Rotary positions in C. Assembling q, k and v reads each projection once and writes each head's rows once. Contract: reference.py's.

Nothing is kept for the backward but cosines and sines: it is the same turn with −sin, read from the heads and written to the
projections. Cotangents may come with heads and tokens in either order of memory.

Shapes: B batch, T tokens, H heads, K rotary width, P = K/2 pairs, N no-position width, V value width.
"""

import ctypes
from ctypes import c_int, c_long, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byrote.kernels import native

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "rotary.c", native.INCLUDE / "lanes.h")
FUNCTIONS = {
    "rotary_assemble": (c_int, c_int, c_int, *[c_void_p] * 9),  # threads, bf16, back, Sizes, projections, heads, angles
    "rotary_rotate": (c_int, c_int, *[c_long] * 4, c_int, *[c_void_p] * 4),  # threads, bf16, N, K, stride, shared, half
}
Triple = tuple[Tensor, Tensor, Tensor]


class Sizes(ctypes.Structure):
    """`sizes` of rotary.c."""

    _fields_ = [
        *[(name, c_long) for name in ("B", "T", "H", "N", "K", "V", "half", "q_stride", "kv_stride", "rope_stride")],
        ("head_strides", c_long * 9),
    ]


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    return native.load("rotary", SOURCES, FUNCTIONS)


def can_run(x: Tensor, *others: Tensor) -> bool:
    """Whether this back end serves such tensors here; the last two are cosines and sines."""
    projections, angles = (x, *others[:-2]), others[-2:]
    fits = x.dtype in (torch.float32, torch.bfloat16) and all(part.dtype == x.dtype for part in projections)
    plain = all(part.dtype == torch.float32 and not part.requires_grad for part in angles)
    return fits and plain and native.can_take(x, *others) and library() is not None


def rotate(x: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, layout: str) -> Tensor:
    """As the reference."""
    if not native.wants_grad(x):
        return _turned(x, cos_BTP, sin_BTP, layout)
    y: Tensor = _Rotate.apply(x, cos_BTP, sin_BTP, layout)
    return y


def assemble_qkv(q_BTX: Tensor, kv_BTY: Tensor, k_rope_BTK: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, *, heads: int, layout: str) -> Triple:
    """As the reference, in fresh memory without gaps."""
    if not native.wants_grad(q_BTX, kv_BTY, k_rope_BTK):
        return _assembled((q_BTX, kv_BTY, k_rope_BTK), (cos_BTP, sin_BTP), heads, layout)
    triple: Triple = _Assemble.apply(q_BTX, kv_BTY, k_rope_BTK, cos_BTP, sin_BTP, heads, layout)
    return triple


def _turned(x: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, layout: str) -> Tensor:
    x_NK, y = native.rows(x), native.empty(x.shape, x.dtype)
    (N, K), threads = x_NK.shape, native.threads_for(x.numel())
    tokens = x.shape[0] * x.shape[1]
    sizes = (threads, x.dtype == torch.bfloat16, N, K, x_NK.stride(0), N // max(tokens, 1), layout == "half")
    cos_BTP, sin_BTP = cos_BTP.contiguous(), sin_BTP.contiguous()
    _call("rotary_rotate", *sizes, x_NK.data_ptr(), cos_BTP.data_ptr(), sin_BTP.data_ptr(), y.data_ptr())
    return y


def _assembled(projections: Triple, angles: tuple[Tensor, Tensor], heads: int, layout: str) -> Triple:
    q, kv, k_rope = (native.rows(part) for part in projections)
    B, T, K = projections[2].shape
    nope = q.shape[1] // heads - K
    widths = (nope + K, nope + K, kv.shape[1] // heads - nope)
    q_BHTX, k_BHTX, v_BHTV = (native.empty((B, heads, T, width), q.dtype) for width in widths)
    _assemble((q, kv, k_rope), (q_BHTX, k_BHTX, v_BHTV), angles, layout, back=False)
    return q_BHTX, k_BHTX, v_BHTV


def _assemble(projections: Triple, heads: Triple, angles: tuple[Tensor, Tensor], layout: str, *, back: bool) -> None:
    """One call in either direction; projections as [tokens, columns]."""
    B, H, T, width = heads[0].shape
    K = projections[2].shape[1]
    strides = [stride for part in heads for stride in part.stride()[:3]]
    row_strides = [part.stride(0) for part in projections]
    sizes = Sizes(B, T, H, width - K, K, heads[2].shape[3], layout == "half", *row_strides, (c_long * 9)(*strides))
    tensors = (*projections, *heads, *(part.contiguous() for part in angles))
    bf16, threads = heads[0].dtype == torch.bfloat16, native.threads_for(3 * heads[0].numel())
    _call("rotary_assemble", threads, bf16, back, ctypes.byref(sizes), *(part.data_ptr() for part in tensors))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, layout: str) -> Tensor:
        ctx.save_for_backward(cos_BTP, sin_BTP)
        ctx.layout = layout
        return _turned(x, cos_BTP, sin_BTP, layout)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos_BTP, sin_BTP = ctx.saved_tensors
        return _turned(grad, cos_BTP, -sin_BTP, ctx.layout), None, None, None


class _Assemble(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, k_rope: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, heads: int, layout: str) -> Triple:
        ctx.save_for_backward(cos_BTP, sin_BTP)
        ctx.shapes, ctx.layout = (q.shape, kv.shape, k_rope.shape), layout
        return _assembled((q, kv, k_rope), (cos_BTP, sin_BTP), heads, layout)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_BTP, sin_BTP = ctx.saved_tensors
        d_q, d_kv, d_k_rope = (native.empty(shape, grads[0].dtype) for shape in ctx.shapes)
        above_q, above_k, above_v = (grad if grad.stride(3) == 1 else grad.contiguous() for grad in grads)
        flat = (d_q.flatten(0, 1), d_kv.flatten(0, 1), d_k_rope.flatten(0, 1))
        _assemble(flat, (above_q, above_k, above_v), (cos_BTP, -sin_BTP), ctx.layout, back=True)
        return d_q, d_kv, d_k_rope, None, None, None, None


def _call(function: str, *arguments: object) -> None:
    native.check(getattr(library(), function)(*arguments))
