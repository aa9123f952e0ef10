"""Tokens to experts and back. The definition: reference.py, with a worked example.

    order, place = sort_by_expert(experts of all pairs, number of experts)
    x = dispatch(tokens, order, place, top_k)            one row per (token, slot) pair, in expert order
    tokens = combine(results, order, place, tokens)      the sum of every token's K results

Shapes: N tokens, K slots a token, M = N·K pairs, D model.
"""

from torch import Tensor

from byrote.kernels.permute import cpu, reference


def sort_by_expert(experts_M: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(order_M, place_M), int64: pairs sorted by expert, equal experts in their old order, and the inverse.

    ValueError: an expert outside 0..num_experts − 1, where looking costs nothing (on the CPU).
    """
    backend = cpu if cpu.can_sort(experts_M) else reference
    return backend.sort_by_expert(experts_M, num_experts)


def dispatch(x_ND: Tensor, order_M: Tensor, place_M: Tensor, top_k: int) -> Tensor:
    """[M, D]: the token of every pair, in expert order. ValueError: shapes."""
    _check(order_M, place_M, x_ND.shape[0] * top_k, f"{x_ND.shape[0]} tokens in {top_k} slots")
    backend = cpu if cpu.can_run(x_ND, order_M, place_M) else reference
    return backend.dispatch(x_ND, order_M, place_M, top_k)


def combine(out_MD: Tensor, order_M: Tensor, place_M: Tensor, tokens: int) -> Tensor:
    """[N, D]: the sum of every token's K results, accumulated in fp32 and rounded once. ValueError: shapes."""
    top_k = out_MD.shape[0] // max(tokens, 1)
    _check(order_M, place_M, top_k * tokens, f"{tokens} tokens")
    _check(order_M, place_M, out_MD.shape[0], f"{out_MD.shape[0]} results")
    backend = cpu if cpu.can_run(out_MD, order_M, place_M) else reference
    return backend.combine(out_MD, order_M, place_M, tokens)


def _check(order_M: Tensor, place_M: Tensor, pairs: int, of: str) -> None:
    if order_M.shape != (pairs,) or place_M.shape != (pairs,):
        raise ValueError(f"order and place have shapes {tuple(order_M.shape)} and {tuple(place_M.shape)}; {of} need {pairs} pairs")
