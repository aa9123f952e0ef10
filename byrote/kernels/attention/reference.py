"""Attention in plain PyTorch, with all scores at once.

    scores_ts = scale · <q_t, k_s>        over the keys s that query t may see
    out_t     = Σ_s P_ts v_s,    P_ts = exp(scores_ts − L_t),    L_t = log Σ_s exp(scores_ts)

For a backward it is enough to keep out and L: with the cotangent g of out,

    d_v_s = Σ_t P_ts g_t       D_ts = P_ts (<g_t, v_s> − <g_t, out_t>)       d_q_t = scale Σ_s D_ts k_s       d_k_s = scale Σ_t D_ts q_t

Both need the keys of a query in any order and any portions, so that no [T, S] tensor has to exist (arXiv 2205.14135, 2307.08691).

Shapes: B batch, H heads, T queries, S keys, K query/key width, V value width.
"""

import torch
from torch import Tensor


def attend(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, *, scale: float, mask_B1TS: Tensor | None = None, causal: bool = False
) -> Tensor:
    """[B, H, T, V], computed in at least fp32, in the dtype of v."""
    work = torch.promote_types(v_BHSV.dtype, torch.float32)
    with torch.autocast(v_BHSV.device.type, enabled=False):
        scores_BHTS = torch.einsum("bhtk,bhsk->bhts", q_BHTK.to(work), k_BHSK.to(work)) * scale
        if causal:
            mask_B1TS = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=scores_BHTS.device).tril()[None, None]
        if mask_B1TS is not None:
            scores_BHTS = scores_BHTS.masked_fill(~mask_B1TS, float("-inf"))
        weights_BHTS = torch.softmax(scores_BHTS, dim=-1)
        if mask_B1TS is not None:
            weights_BHTS = weights_BHTS.masked_fill(~mask_B1TS.any(-1, keepdim=True), 0.0)
        return torch.einsum("bhts,bhsv->bhtv", weights_BHTS, v_BHSV.to(work)).to(v_BHSV.dtype)
