"""DeepSeek sparse attention: latent attention to the keys that an indexer picks (V3.2 §2.1, Eq 1–2).

    q^I_tj = W^QI c^Q_t         J small heads, from the latent that the queries are made of
    k^I_s  = norm(W^KI x_s)     one key for all of them, a LayerNorm
    w_t    = W^w x_t / √(J · I)
    I_ts   = Σ_j w_tj ReLU(<q^I_tj, k^I_s>)          t attends to the keys of its K highest I_ts, absorbed, in latent space

The first channels of q^I and k^I turn with position like MLA's rotary part, but in *half* layout whatever MLA's is. The release also turns
both by a Hadamard matrix, which alters no product and spreads outliers, and keeps them in FP8; both can be switched on.

**How the indexer learns.** The choice has no gradient, so the language-model loss cannot teach it. It learns to say what attention
would: KL(attention summed over heads, normalised ‖ softmax(I)), from detached inputs, so that this loss in turn reaches nothing
else. A model goes through three stages:

    dense           plain MLA; the indexer is not asked
    dense_warmup    plain MLA; the indexer learns the distribution over all it may see, and nothing else learns (`train/stages.py`)
    sparse          attention to the chosen; the indexer learns the distribution over the chosen

Where no more keys are held than are to be chosen, all are, and plain MLA serves. Remembered: MLA's C + K numbers a token and the index key.

Shapes: B batch, T queries, S keys, H heads, J index heads, I index width, C latent, K rotary width, X = C + K.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from byrote.kernels.fp8 import through_fp8
from byrote.kernels.sparse_index import Chosen, Spans, attend_chosen, index_loss, select
from byrote.model.batch import Batch
from byrote.model.config import DSAConfig
from byrote.model.linear import Linear
from byrote.model.mla import MLA, Projected
from byrote.model.rope import rotate
from byrote.model.state import Drawers, Track

_KEY_NORM_EPS = 1e-6


class IndexParts(NamedTuple):
    q_BTJI: Tensor
    k_BTI: Tensor
    weight_BTJ: Tensor  # fp32, carries the scale of the scores


class Indexer(nn.Module):
    def __init__(self, dim: int, config: DSAConfig) -> None:
        super().__init__()
        self.config, width = config, config.index_head_dim
        self.q_b = Linear(config.mla.q_lora_rank or dim, config.index_num_heads * width)
        self.k = Linear(dim, width)
        self.k_norm = nn.LayerNorm(width, eps=_KEY_NORM_EPS)
        self.weights = Linear(dim, config.index_num_heads)

    def forward(self, x_BTD: Tensor, source_BTQ: Tensor, batch: Batch) -> IndexParts:
        c = self.config
        q_BTJI = self.q_b(source_BTQ).unflatten(-1, (c.index_num_heads, c.index_head_dim))
        q_BTJI, k_BTI = (self._finished(part, batch) for part in (q_BTJI, self.k_norm(self.k(x_BTD)).to(q_BTJI.dtype)))
        work = torch.promote_types(x_BTD.dtype, torch.float32)
        with torch.autocast(x_BTD.device.type, enabled=False):
            weight_BTJ = self.weights.matmul(x_BTD.to(work), self.weights.weight.to(work))
        return IndexParts(q_BTJI, k_BTI, weight_BTJ * (c.index_num_heads * c.index_head_dim) ** -0.5)

    def _finished(self, x: Tensor, batch: Batch) -> Tensor:
        """Rotated, and in the form in which index queries and keys are compared."""
        c = self.config
        turning, still = x.split((c.mla.qk_rope_head_dim, c.index_head_dim - c.mla.qk_rope_head_dim), dim=-1)
        x = torch.cat((rotate(turning, batch.turn(c.mla.qk_rope_head_dim, c.mla.rope), "half"), still), dim=-1)
        x = hadamard(x) if c.index_hadamard else x
        return through_fp8(x) if c.index_fp8 else x


def hadamard(x: Tensor) -> Tensor:
    """x times the Hadamard matrix of its width, a power of two, divided by √width: orthogonal, and its own inverse."""
    width, y = x.shape[-1], x
    for half in (1 << bit for bit in range(width.bit_length() - 1)):
        a, b = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)
    return y * width**-0.5


class DSA(nn.Module):
    """`stage` starts as the configuration says; training may move it on."""

    def __init__(self, dim: int, config: DSAConfig, eps: float) -> None:
        super().__init__()
        self.config, self.stage, self.num_heads = config, config.index_stage, config.mla.num_heads
        self.mla = MLA(dim, config.mla, eps)
        self.indexer = Indexer(dim, config)

    def new_cache(self, batch: int, *, dtype: torch.dtype, device: torch.device, max_rollback: int) -> Drawers:
        """MLA's latents, and the index keys as they are compared."""
        latents = self.mla.new_cache(batch, dtype=dtype, device=device, max_rollback=max_rollback)
        return Drawers(latents=latents, index=Track(batch, (self.config.index_head_dim,), dtype, device))

    def forward(self, x_BTD: Tensor, batch: Batch, cache: Drawers | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """([B, T, D], in training `indexer`: mean KL of the queries that see anything)."""
        new = self.mla.project(x_BTD)
        if self.stage == "dense" and cache is None:
            return self.mla.attend(new, batch), {}
        parts = self.indexer(x_BTD.detach(), new.source_BTQ.detach(), batch)
        index_BSI = parts.k_BTI if cache is None else cache["index"].append(parts.k_BTI).to(parts.k_BTI.dtype)
        latents = None if cache is None else cache["latents"]
        spans = causal_spans(batch)
        if self.stage != "sparse" or _all_are_chosen(batch, self.config.index_top_k):
            chosen, y_BTD = None, self.mla.attend(new, batch, latents)
        else:
            chosen = select(parts.q_BTJI, index_BSI, parts.weight_BTJ, spans, self.config.index_top_k)
            y_BTD = self.attend_sparsely(new, batch, chosen, latents)
        learns = self.training and torch.is_grad_enabled() and cache is None
        return y_BTD, {"indexer": self.loss(parts, new, batch, spans if chosen is None else chosen)} if learns else {}

    def attend_sparsely(self, new: Projected, batch: Batch, chosen: Chosen, latents: Track | None = None) -> Tensor:
        """[B, T, D]: absorbed attention to the chosen keys."""
        query_BTHX, kept_BTX = self.mla.absorb(new, batch)
        kept_BSX = kept_BTX if latents is None else latents.append(kept_BTX).to(kept_BTX.dtype)
        width = self.config.mla.kv_lora_rank
        return self.mla.expand(attend_chosen(query_BTHX, kept_BSX, chosen, scale=self.mla.scale, value_dim=width))

    def loss(self, parts: IndexParts, new: Projected, batch: Batch, seen: Chosen | Spans) -> Tensor:
        """Mean over queries of KL(attention ‖ index) over the keys they look at."""
        with torch.no_grad():
            query_BTHX, kept_BSX = self.mla.absorb(new, batch)
        spans = causal_spans(batch)
        queries = (spans.end_BT > spans.first_BT).sum().clamp_min(1)
        return index_loss(*parts, query_BTHX, kept_BSX, seen, scale=self.mla.scale) / queries


def _all_are_chosen(batch: Batch, top_k: int) -> bool:
    return batch.keys <= top_k


def causal_spans(batch: Batch) -> Spans:
    """From the start of a token's document to itself; nothing for padding."""

    def make() -> Spans:
        queries = batch.tokens_BT.shape[1]
        own_BT = torch.arange(batch.keys - queries, batch.keys, device=batch.place_BT.device).expand_as(batch.place_BT)
        first_BT, end_BT = own_BT - batch.place_BT, own_BT + 1
        if batch.document_BT is None:
            return Spans(first_BT, end_BT)
        real_BT = batch.document_BT >= 0
        return Spans(first_BT * real_BT, end_BT * real_BT)

    spans: Spans = batch.once("causal spans", make)
    return spans
