"""Tokens to experts and back in plain PyTorch, as gathers in both directions of the gradient (a scatter-add would be slow and
unordered).

`order_M` lists, expert by expert, which flat (token, slot) pair stands there; `place_M` is its inverse. Token n's K pairs are
n·K … n·K + K − 1. Worked example with two tokens that chose experts (1, 0) and (0, 2): the pairs' experts are 1 0 0 2, so
order = 1 2 0 3 (expert 0 has pairs 1 and 2, expert 1 pair 0, expert 2 pair 3) and place = 2 0 1 3.

Shapes: N tokens, K slots a token, M = N·K, D model.
"""

import torch
from torch import Tensor


def sort_by_expert(experts_M: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(order_M, place_M), int64: pairs sorted by expert, equal experts in their old order, and the inverse."""
    order_M = experts_M.argsort(stable=True)
    place_M = torch.empty_like(order_M)
    place_M[order_M] = torch.arange(order_M.shape[0], device=order_M.device)
    return order_M, place_M


def dispatch(x_ND: Tensor, order_M: Tensor, place_M: Tensor, top_k: int) -> Tensor:
    """[M, D]: the token of every pair, in expert order."""
    return _Dispatch.apply(x_ND, order_M, place_M, top_k)


def combine(out_MD: Tensor, order_M: Tensor, place_M: Tensor, tokens: int) -> Tensor:
    """[N, D]: the sum of every token's K results, accumulated in fp32 and rounded once."""
    return _Combine.apply(out_MD, order_M, place_M, tokens)


def _spread(x_ND: Tensor, order_M: Tensor, top_k: int) -> Tensor:
    return x_ND.index_select(0, order_M.div(top_k, rounding_mode="floor"))


def _gather_sum(out_MD: Tensor, place_M: Tensor, tokens: int) -> Tensor:
    if tokens == 0:
        return out_MD.new_zeros(0, out_MD.shape[-1])
    picked_NKD = out_MD.index_select(0, place_M).view(tokens, -1, out_MD.shape[-1])
    return picked_NKD.sum(1, dtype=torch.promote_types(out_MD.dtype, torch.float32)).to(out_MD.dtype)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, order_M: Tensor, place_M: Tensor, top_k: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(place_M)
        ctx.tokens = x_ND.shape[0]
        return _spread(x_ND, order_M, top_k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_MD: Tensor):  # type: ignore[no-untyped-def]
        (place_M,) = ctx.saved_tensors
        return _gather_sum(grad_MD, place_M, ctx.tokens), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out_MD: Tensor, order_M: Tensor, place_M: Tensor, tokens: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(order_M)
        ctx.top_k = order_M.shape[0] // max(tokens, 1)
        return _gather_sum(out_MD, place_M, tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_ND: Tensor):  # type: ignore[no-untyped-def]
        (order_M,) = ctx.saved_tensors
        return _spread(grad_ND, order_M, max(ctx.top_k, 1)), None, None, None
