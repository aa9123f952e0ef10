"""Sparse attention by an index: choose keys for each query cheaply, attend to those, and teach the index what attention would choose.

    chosen = select(index queries, index keys, index weights, spans, top_k)      V3.2's lightning indexer; V4's over compressed entries
    out    = attend_chosen(queries, keys, chosen, scale=…)                       one key head for all query heads (MLA absorbed, V4)
    loss   = index_loss(…)                                                       KL of the index to the attention

The definition: reference.py. Back ends: C for the CPU (cpu.py), else blocks of queries in PyTorch (portable.py). None of them ever holds
scores of all queries.

Shapes: B batch, T queries, S keys, J index heads, I index width, H heads, X key width, V value width, K chosen keys.
"""

from torch import Tensor

from byrote.kernels.sparse_index import cpu, portable
from byrote.kernels.sparse_index.sets import Chosen, Spans

__all__ = ["Chosen", "Spans", "attend_chosen", "index_loss", "select"]


def select(q_BTJI: Tensor, k_BSI: Tensor, weight_BTJ: Tensor, spans: Spans, top_k: int) -> Chosen:
    """The K = min(top_k, S) best keys of each query inside its span, in ascending order, valid slots first. No gradient.

    The higher score first, of equal scores (0 and −0 are equal) the lower key first. `weight_BTJ` carries the scale of the scores.
    ValueError: shapes that do not fit.
    """
    B, T, J, width = q_BTJI.shape
    _check("select", k_BSI.shape == (B, k_BSI.shape[1], width) and weight_BTJ.shape == (B, T, J) and top_k > 0, q_BTJI, k_BSI, weight_BTJ)
    _check("select", spans.first_BT.shape == spans.end_BT.shape == (B, T), q_BTJI, *spans)
    backend = cpu if cpu.can_run(q_BTJI, k_BSI) else portable
    return backend.select(q_BTJI, k_BSI, weight_BTJ, spans, min(top_k, k_BSI.shape[1]))


def attend_chosen(
    q_BTHX: Tensor, keys_BSX: Tensor, chosen: Chosen, *, scale: float, value_dim: int | None = None, sink_H: Tensor | None = None
) -> Tensor:
    """[B, T, H, V] in the dtype of q, V = `value_dim`, or X when None. Zeros for a query without a valid slot.

    `sink_H`: one logit a head, not scaled, in the denominator of the softmax only. ValueError: shapes that do not fit.
    """
    B, T, H, X = q_BTHX.shape
    _check("attend_chosen", keys_BSX.shape == (B, keys_BSX.shape[1], X) and chosen.index_BTK.shape[:2] == (B, T), q_BTHX, keys_BSX, *chosen)
    _check("attend_chosen", sink_H is None or sink_H.shape == (H,), q_BTHX, *(() if sink_H is None else (sink_H,)))
    backend = cpu if cpu.can_run(q_BTHX, keys_BSX) else portable
    return backend.attend_chosen(q_BTHX, keys_BSX, chosen, scale=scale, value_dim=value_dim, sink_H=sink_H)


def index_loss(
    q_BTJI: Tensor, k_BSI: Tensor, weight_BTJ: Tensor, attending_BTHX: Tensor, keys_BSX: Tensor, seen: Chosen | Spans, *, scale: float
) -> Tensor:
    """Σ over queries of KL(attention ‖ index) over `seen`: a chosen set (sparse training) or whole spans (dense warm-up).

    `attending_BTHX`, `keys_BSX` and `scale` are the attention's; they get no gradient, and only `q_BTJI`, `k_BSI` and `weight_BTJ` do.
    ValueError: shapes that do not fit.
    """
    B, T, J, width = q_BTJI.shape
    _check("index_loss", k_BSI.shape == (B, k_BSI.shape[1], width) and weight_BTJ.shape == (B, T, J), q_BTJI, k_BSI, weight_BTJ)
    _check("index_loss", attending_BTHX.shape[:2] == (B, T) and keys_BSX.shape[1] == k_BSI.shape[1], attending_BTHX, keys_BSX, k_BSI)
    return portable.index_loss(q_BTJI, k_BSI, weight_BTJ, attending_BTHX, keys_BSX, seen, scale=scale)


def _check(function: str, fits: bool, *tensors: Tensor) -> None:
    if not fits:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(f"{function} got shapes {shapes} that do not belong together; see the shapes in byrote/kernels/sparse_index")
