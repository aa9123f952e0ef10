"""The permutation in C: a stable counting sort, gathers as plain copies of rows, sums over slots in fp32. The contract is reference.py's.

Shapes: N tokens, K slots a token, M = N·K, D model.
"""

import ctypes
from ctypes import c_int, c_long, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byrote.kernels import native

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "permute.c", native.INCLUDE / "lanes.h")
FUNCTIONS = {
    "permute_sort": (c_long, c_long, *[c_void_p] * 4),  # M, experts
    "permute_spread": (c_int, *[c_long] * 5, *[c_void_p] * 3),  # threads, rows, bytes, sources, bytes between sources, slots
    "permute_gather_sum": (c_int, c_int, *[c_long] * 5, *[c_void_p] * 3),  # threads, bf16, N, K, D, sources, stride
}


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    return native.load("permute", SOURCES, FUNCTIONS)


def can_run(x: Tensor, order_M: Tensor, place_M: Tensor) -> bool:
    """Whether this back end serves such tensors here."""
    fits = x.dtype in (torch.float32, torch.bfloat16) and order_M.dtype == place_M.dtype == torch.int64
    return fits and native.can_take(x, order_M, place_M) and library() is not None


def can_sort(experts_M: Tensor) -> bool:
    """Whether this back end serves such expert numbers here."""
    return experts_M.dtype == torch.int64 and native.can_take(experts_M) and library() is not None


def sort_by_expert(experts_M: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """As the reference. ValueError: an expert outside 0..num_experts − 1."""
    experts_M = experts_M.contiguous()
    M = experts_M.shape[0]
    order_M, place_M, starts_E = (native.empty((size,), torch.int64) for size in (M, M, num_experts))
    pointers = (tensor.data_ptr() for tensor in (experts_M, starts_E, order_M, place_M))
    if _library().permute_sort(M, num_experts, *pointers):
        low, high = (int(end) for end in torch.aminmax(experts_M))
        raise ValueError(f"experts span {low}..{high}; with {num_experts} experts they must lie in 0..{num_experts - 1}")
    return order_M, place_M


def dispatch(x_ND: Tensor, order_M: Tensor, place_M: Tensor, top_k: int) -> Tensor:
    """As the reference."""
    if not native.wants_grad(x_ND):
        return _spread(x_ND, order_M, top_k)
    x_MD: Tensor = _Dispatch.apply(x_ND, order_M, place_M, top_k)
    return x_MD


def combine(out_MD: Tensor, order_M: Tensor, place_M: Tensor, tokens: int) -> Tensor:
    """As the reference."""
    if not native.wants_grad(out_MD):
        return _gather_sum(out_MD, place_M, tokens)
    y_ND: Tensor = _Combine.apply(out_MD, order_M, place_M, tokens)
    return y_ND


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_M: Tensor, place_M: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(place_M)
        ctx.tokens = x_ND.shape[0]
        return _spread(x_ND, order_M, top_k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None, None]:
        (place_M,) = ctx.saved_tensors
        return _gather_sum(grad_MD, place_M, ctx.tokens), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_MD: Tensor, order_M: Tensor, place_M: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(order_M)
        ctx.top_k = order_M.shape[0] // max(tokens, 1)
        return _gather_sum(out_MD, place_M, tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None]:
        (order_M,) = ctx.saved_tensors
        return _spread(grad_ND, order_M, ctx.top_k), None, None, None


def _spread(x_ND: Tensor, order_M: Tensor, top_k: int) -> Tensor:
    x_ND, order_M = native.rows(x_ND), order_M.contiguous()
    (N, D), M, size = x_ND.shape, order_M.shape[0], x_ND.element_size()
    out_MD = native.empty((M, D), x_ND.dtype)
    sizes = (native.threads_for(M * D), M, D * size, N, x_ND.stride(0) * size, top_k)
    _check(_library().permute_spread(*sizes, x_ND.data_ptr(), order_M.data_ptr(), out_MD.data_ptr()), M)
    return out_MD


def _gather_sum(out_MD: Tensor, place_M: Tensor, tokens: int) -> Tensor:
    out_MD, place_M = native.rows(out_MD), place_M.contiguous()
    M, D = out_MD.shape
    y_ND = native.empty((tokens, D), out_MD.dtype)
    sizes = (native.threads_for(M * D), out_MD.dtype == torch.bfloat16, tokens, M // max(tokens, 1), D, M, out_MD.stride(0))
    _check(_library().permute_gather_sum(*sizes, out_MD.data_ptr(), place_M.data_ptr(), y_ND.data_ptr()), M)
    return y_ND


def _check(code: int, pairs: int) -> None:
    if code:
        raise IndexError(f"order or place of {pairs} pairs names a row that does not exist; both come from sort_by_expert")


def _library() -> ctypes.CDLL:
    opened = library()
    assert opened is not None, "can_run comes first"
    return opened
