"""The index of sparse attention in plain PyTorch, with all scores at once.

Choosing (V3.2 §2, Eq 1–2; V4 §2.3 scores compressed entries the same way):

    I_ts   = Σ_j w_tj ReLU(<q_tj, k_s>)          over the keys s in [first_t, end_t) that query t may see
    chosen = the K best; the higher score first, of equal scores the lower key first

Of a ReLU many scores are exactly zero, so the rule for equals is no detail: without one the set depends on length and machine.

Attending to the chosen set S_t, one key head for all query heads, the value of a key being its first V channels:

    P_th  = softmax over s in S_t of scale · <q_th, k_s>, with an optional sink logit a_h in the denominator only
    out_th = Σ_s P_ths k_s[:V]

Teaching the index (V3.2 §2): the target p_t is the attention of all heads, summed and divided by its sum, over the same set as the
softmax of I_t; the loss of a query is KL(p_t ‖ softmax(I_t)) = Σ_s p_ts (log p_ts − log softmax(I_t)_s).

Shapes: B batch, T queries, S keys, J index heads, I index width, H heads, X key width, V value width, K chosen keys.
"""

import torch
from torch import Tensor

from byrote.kernels.sparse_index.sets import Chosen, Spans


def index_scores(q_BTJI: Tensor, k_BSI: Tensor, weight_BTJ: Tensor) -> Tensor:
    """[B, T, S], in at least fp32. `k_BSI` may also be [B, T, S, I], each query's own keys."""
    work = torch.promote_types(q_BTJI.dtype, torch.float32)
    with torch.autocast(q_BTJI.device.type, enabled=False):
        return torch.einsum("btj,btjs->bts", weight_BTJ.to(work), _products(q_BTJI.to(work), k_BSI.to(work)).relu())


def best(scores_BTS: Tensor, spans: Spans, top_k: int) -> Chosen:
    """The `top_k` best keys of each query inside its span."""
    scores_BTS = (scores_BTS + 0.0).masked_fill(~spans.mask(scores_BTS.shape[2]), float("-inf"))  # + 0.0: −0 becomes 0
    order_BTK = scores_BTS.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    count_BT1 = (spans.end_BT - spans.first_BT)[..., None]
    valid_BTK = torch.arange(order_BTK.shape[2], device=order_BTK.device) < count_BT1
    index_BTK = order_BTK.masked_fill(~valid_BTK, scores_BTS.shape[2]).sort(dim=-1).values
    return Chosen(index_BTK.masked_fill(~valid_BTK, 0), valid_BTK)


def select(q_BTJI: Tensor, k_BSI: Tensor, weight_BTJ: Tensor, spans: Spans, top_k: int) -> Chosen:
    return best(index_scores(q_BTJI, k_BSI, weight_BTJ), spans, top_k)


def attention_weights(q_BTHX: Tensor, keys: Tensor, valid_BTK: Tensor, scale: float, sink_H: Tensor | None = None) -> Tensor:
    """[B, T, H, K]: the softmax over the valid slots; zeros where a query has none. `keys` as for `_products`."""
    scores_BTHK = (_products(q_BTHX, keys) * scale).masked_fill(~valid_BTK[:, :, None], float("-inf"))
    if sink_H is None:
        return torch.softmax(scores_BTHK, dim=-1).masked_fill(~valid_BTK.any(-1)[..., None, None], 0.0)
    sink_BTH1 = sink_H.to(scores_BTHK.dtype)[:, None].expand(*scores_BTHK.shape[:3], 1)
    return torch.softmax(torch.cat((scores_BTHK, sink_BTH1), dim=-1), dim=-1)[..., :-1]


def _products(q_BTHX: Tensor, keys: Tensor) -> Tensor:
    """[B, T, H, K] with keys [B, T, K, X] of each query, or [B, K, X] of all."""
    return torch.einsum("bthx,bkx->bthk" if keys.dim() == 3 else "bthx,btkx->bthk", q_BTHX, keys)


def attend_chosen(
    q_BTHX: Tensor, keys_BSX: Tensor, chosen: Chosen, *, scale: float, value_dim: int | None = None, sink_H: Tensor | None = None
) -> Tensor:
    """[B, T, H, V], computed in at least fp32, in the dtype of q."""
    work = torch.promote_types(q_BTHX.dtype, torch.float32)
    with torch.autocast(q_BTHX.device.type, enabled=False):
        keys_BTKX = chosen.gather(keys_BSX.to(work))
        weights_BTHK = attention_weights(q_BTHX.to(work), keys_BTKX, chosen.valid_BTK, scale, sink_H)
        return torch.einsum("bthk,btkv->bthv", weights_BTHK, keys_BTKX[..., :value_dim]).to(q_BTHX.dtype)


def divergence(target_BTK: Tensor, scores_BTK: Tensor, valid_BTK: Tensor) -> Tensor:
    """[B, T]: KL(target ‖ softmax of the scores over the valid slots); 0 where a query has none."""
    scores_BTK = scores_BTK.masked_fill(~valid_BTK, float("-inf")).masked_fill(~valid_BTK.any(-1, keepdim=True), 0.0)
    log_BTK = torch.log_softmax(scores_BTK, dim=-1).masked_fill(~valid_BTK, 0.0)
    return (torch.xlogy(target_BTK, target_BTK) - target_BTK * log_BTK).sum(-1)


def index_loss(
    q_BTJI: Tensor, k_BSI: Tensor, weight_BTJ: Tensor, attending_BTHX: Tensor, keys_BSX: Tensor, seen: Chosen | Spans, *, scale: float
) -> Tensor:
    """Sum over queries of the divergence over what is seen; differentiable in q, k and weight."""
    work = torch.promote_types(q_BTJI.dtype, torch.float32)
    with torch.autocast(q_BTJI.device.type, enabled=False):
        keys, index_k, valid_BTK = (
            keys_BSX.detach().to(work),
            k_BSI.to(work),
            seen.mask(k_BSI.shape[1]) if isinstance(seen, Spans) else seen[1],
        )
        if isinstance(seen, Chosen):
            keys, index_k = seen.gather(keys), seen.gather(index_k)
        target_BTK = attention_weights(attending_BTHX.detach().to(work), keys, valid_BTK, scale).mean(2)  # the weights of a head sum to one
        return divergence(target_BTK, index_scores(q_BTJI, index_k, weight_BTJ), valid_BTK).sum()
