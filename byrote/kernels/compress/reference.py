"""V4's compressor in plain PyTorch (arXiv 2606.19348 §2.3; the released layout).

Every M tokens of a document make one entry. A token brings values c and gates g, each channel for itself; the bias b depends on the
token's place in its group:

    entry = Σ_i softmax_i(g_i + b_i) c_i              i over the M tokens of the group, a softmax per channel
    overlapping: values and gates have two halves     i over the previous group's first halves and the group's own second halves

so that an overlapping entry pools over 2M tokens and each token speaks in two entries. The first group of a document has no
previous one: those slots weigh nothing. With weights p and the cotangent G of an entry,

    d_c_i = p_i G           d_g_i = p_i G (c_i − entry)         d_b_i = Σ over entries of d_g_i

    worked example, M = 2, overlapping, tokens 0 … 5 of one document: entry 0 pools 0b 1b, entry 1 pools 0a 1a 2b 3b, entry 2 2a 3a 4b 5b

Shapes: B batch, S tokens, E entries, M tokens of a group, W width of an entry, X = W, or 2W when overlapping.
"""

import torch
from torch import Tensor


def compress(values_BSX: Tensor, gates_BSX: Tensor, bias_MX: Tensor, last_BE: Tensor, opens_BE: Tensor, *, overlap: bool) -> Tensor:
    """[B, E, W], computed in at least fp32, in the dtype of the values."""
    work = torch.promote_types(values_BSX.dtype, torch.float32)
    span = bias_MX.shape[0]
    token_BEM = last_BE[..., None] - torch.arange(span - 1, -1, -1, device=last_BE.device)
    values, gates = (_rows(part.to(work), token_BEM) for part in (values_BSX, gates_BSX))
    gates = gates + bias_MX.to(work)
    if overlap:
        width = bias_MX.shape[1] // 2
        before, before_gates = (_rows(part[..., :width].to(work), token_BEM - span) for part in (values_BSX, gates_BSX))
        before_gates = (before_gates + bias_MX[:, :width].to(work)).masked_fill(opens_BE[..., None, None], float("-inf"))
        values, gates = torch.cat((before, values[..., width:]), dim=2), torch.cat((before_gates, gates[..., width:]), dim=2)
    entries_BEW = (torch.softmax(gates, dim=2) * values).sum(2)
    return entries_BEW.masked_fill(last_BE[..., None] < 0, 0.0).to(values_BSX.dtype)


def _rows(x_BSX: Tensor, token_BEM: Tensor) -> Tensor:
    """[B, E, M, X]; tokens before the first, which no entry reads, are the first."""
    return x_BSX[torch.arange(x_BSX.shape[0], device=x_BSX.device)[:, None, None], token_BEM.clamp_min(0)]
