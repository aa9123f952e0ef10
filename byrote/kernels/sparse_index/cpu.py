"""The index of sparse attention in C. The contract is the package's, the formulas are reference.py's.

Kept for the backward of `attend_chosen`, beside the inputs: the output in fp32 and one log-sum-exp per head and query. Its gradient of the
keys is summed by each thread for itself, so it needs threads · B · S · X numbers.

Shapes: B batch, T queries, S keys, J index heads, I index width, H heads, X key width, V value width, K chosen keys.
"""

import ctypes
from ctypes import POINTER, c_double, c_long, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byrote.kernels import native
from byrote.kernels.sparse_index.sets import Chosen, Spans

FOLDER = Path(__file__).parent
SOURCES = (
    *(FOLDER / name for name in ("select.c", "attend.c", "sparse_index.h", "threshold.h")),
    native.INCLUDE / "product.h",
    native.INCLUDE / "lanes.h",
)


class _KeyRows(ctypes.Structure):
    """`key_rows` of sparse_index.h."""

    _fields_ = (("start", c_void_p), ("batch", c_long), ("row", c_long))

    @classmethod
    def of(cls, keys_BSX: Tensor) -> "_KeyRows":
        return cls(keys_BSX.data_ptr(), *keys_BSX.stride()[:2])


class _Selection(ctypes.Structure):
    """`selection` of sparse_index.h."""

    _fields_ = (
        *((name, c_long) for name in ("threads", "bf16", "B", "T", "S", "J", "I", "top_k")),
        *(("q", c_void_p), ("k", _KeyRows)),
        *((name, c_void_p) for name in ("weight", "first", "end", "index", "valid")),
    )


class _Attending(ctypes.Structure):
    """`attending` of sparse_index.h."""

    _fields_ = (
        *((name, c_long) for name in ("threads", "bf16", "B", "T", "S", "H", "X", "V", "K")),
        *(("q", c_void_p), ("keys", _KeyRows)),
        *((name, c_void_p) for name in ("index", "valid", "sink", "out", "lse", "d_out", "delta", "d_q", "d_keys")),
        ("scale", c_double),
    )


FUNCTIONS = {"index_select": (POINTER(_Selection),), **dict.fromkeys(("attend_forward", "attend_backward"), (POINTER(_Attending),))}


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    return native.load("sparse_index", SOURCES, FUNCTIONS)


def can_run(*tensors: Tensor) -> bool:
    """Whether this back end serves these queries and keys here: all fp32 or all bf16, at least one number each."""
    dtypes = {tensor.dtype for tensor in tensors}
    fits = len(dtypes) == 1 and dtypes <= {torch.float32, torch.bfloat16} and all(tensor.numel() for tensor in tensors)
    return fits and native.can_take(*tensors) and library() is not None


@torch.no_grad()
def select(q_BTJI: Tensor, k_BSI: Tensor, weight_BTJ: Tensor, spans: Spans, top_k: int) -> Chosen:
    """As the package's."""
    (B, T, J, width), S = q_BTJI.shape, k_BSI.shape[1]
    q_BTJI, weight_BTJ, k_BSI = q_BTJI.contiguous(), weight_BTJ.float().contiguous(), _dense_rows(k_BSI)
    first_BT, end_BT = (edge_BT.to(torch.int64).contiguous() for edge_BT in spans)
    index_BTK, valid_BTK = native.empty((B, T, top_k), torch.int64), native.empty((B, T, top_k), torch.bool)
    problem = _Selection(native.threads_for(B * T * S), q_BTJI.dtype == torch.bfloat16, B, T, S, J, width, top_k, q_BTJI.data_ptr())
    problem.k = _KeyRows.of(k_BSI)
    tensors = {"weight": weight_BTJ, "first": first_BT, "end": end_BT, "index": index_BTK, "valid": valid_BTK}
    for name, tensor in tensors.items():
        setattr(problem, name, native.address(tensor))
    native.check(_functions().index_select(problem))
    return Chosen(index_BTK, valid_BTK)


def attend_chosen(
    q_BTHX: Tensor, keys_BSX: Tensor, chosen: Chosen, *, scale: float, value_dim: int | None = None, sink_H: Tensor | None = None
) -> Tensor:
    """As the package's."""
    value_dim = keys_BSX.shape[-1] if value_dim is None else value_dim
    trains = native.wants_grad(q_BTHX, keys_BSX, sink_H)
    out_BTHV: Tensor = _Attend.apply(q_BTHX, keys_BSX, sink_H, *chosen, scale, value_dim, trains)
    return out_BTHV


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, keys: Tensor, sink: Tensor | None, index: Tensor, valid: Tensor, scale: float, value_dim: int, trains: bool
    ) -> Tensor:
        q, keys, index, valid = q.contiguous(), _dense_rows(keys), index.contiguous(), valid.contiguous()
        sink = None if sink is None else sink.float().contiguous()
        out = native.empty((*q.shape[:3], value_dim), torch.float32)
        lse = native.empty(q.shape[:3], torch.float32) if trains else None
        _run("attend_forward", q, keys, index, valid, scale, value_dim, sink=sink, out=out, lse=lse)
        ctx.save_for_backward(q, keys, sink, index, valid, out, lse)
        ctx.scale = scale
        return out.to(q.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, keys, sink, index, valid, out, lse = ctx.saved_tensors
        d_out = grad.float().contiguous()
        delta = (d_out * out).sum(-1)
        threads = native.threads_for(index.numel())
        d_q, d_keys = native.empty(q.shape, torch.float32), native.empty((threads, *keys.shape), torch.float32)
        made = {"lse": lse, "d_out": d_out, "delta": delta, "d_q": d_q, "d_keys": d_keys}
        _run("attend_backward", q, keys, index, valid, ctx.scale, out.shape[-1], **made)
        d_sink = None if sink is None else -((sink - lse).exp() * delta).sum((0, 1))
        return d_q.to(q.dtype), d_keys[0].to(keys.dtype), d_sink, None, None, None, None, None


def _run(
    function: str, q: Tensor, keys: Tensor, index: Tensor, valid: Tensor, scale: float, value_dim: int, **tensors: Tensor | None
) -> None:
    (B, T, H, X), S, K = q.shape, keys.shape[1], index.shape[2]
    problem = _Attending(native.threads_for(index.numel()), q.dtype == torch.bfloat16, B, T, S, H, X, value_dim, K, q.data_ptr())
    problem.keys, problem.scale = _KeyRows.of(keys), scale
    for name, tensor in {"index": index, "valid": valid, **tensors}.items():
        setattr(problem, name, native.address(tensor))
    native.check(getattr(_functions(), function)(problem))


def _functions() -> ctypes.CDLL:
    opened = library()
    assert opened is not None, "can_run is asked first"
    return opened


def _dense_rows(x_BSX: Tensor) -> Tensor:
    return x_BSX if x_BSX.stride(-1) == 1 else x_BSX.contiguous()
