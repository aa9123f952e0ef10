"""One layer: memory (in the chosen blocks), then attention, then experts or a dense feed-forward, each on the residual streams."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from byrote.model.batch import Batch
from byrote.model.config import DSAConfig, MLAConfig, ModelConfig, V4AttentionConfig
from byrote.model.csa import V4Attention
from byrote.model.dsa import DSA
from byrote.model.engram import Engram
from byrote.model.hyper_connection import Site, make_site
from byrote.model.mla import MLA
from byrote.model.moe import FeedForward, MoE
from byrote.model.norm import RMSNorm
from byrote.model.state import Cache

Notes = dict[str, Tensor]


class Attention(Protocol):
    """What every kind of attention is to the rest; a module, built as (dim, configuration, eps)."""

    num_heads: int

    def __call__(self, x_BTD: Tensor, batch: Batch, cache: Any = None) -> tuple[Tensor, Notes]:
        """([B, T, D], notes: `indexer`, a scalar loss for it alone, where there is one). With a cache, it is read and appended to."""
        ...

    def new_cache(self, batch: int, *, dtype: torch.dtype, device: torch.device, max_rollback: int) -> Cache: ...


ATTENTION: dict[type, Callable[..., Attention]] = {MLAConfig: MLA, DSAConfig: DSA, V4AttentionConfig: V4Attention}


class Block(nn.Module):
    """`layer` is the 0-based block index; MTP blocks count on from `num_layers` and have no memory."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        slot = config.engram_slot(layer)
        self.engram = None
        if config.engram is not None and slot is not None:
            self.engram = Engram(dim, config.residual.streams, config.engram, eps, slot)
        self.attn_site: Site = make_site(dim, config.residual, eps)
        self.attn_norm = RMSNorm(dim, eps)
        kind = config.attention_of(layer)
        self.attn: Attention = ATTENTION[type(kind)](dim, kind, eps)
        self.ffn_site: Site = make_site(dim, config.residual, eps)
        self.ffn_norm = RMSNorm(dim, eps)
        if config.is_moe(layer):
            assert config.moe is not None
            vocabulary = config.vocab_size if config.is_hashed(layer) else None
            self.ffn: nn.Module = MoE(dim, config.moe, config.swiglu_limit, vocabulary)
        else:
            self.ffn = FeedForward(dim, config.ffn_hidden, config.swiglu_limit)

    def forward(self, streams_BTRD: Tensor, batch: Batch, cache: Cache | None = None) -> tuple[Tensor, Notes]:
        """(streams, notes of this layer: `gates` of memory; `indexer` of attention; `scores`, `experts`, `load` of the router)."""
        notes: Notes = {}
        if self.engram is not None:
            streams_BTRD, notes["gates"] = self.engram(streams_BTRD, batch)
        x_BTD, carry = self.attn_site.enter(streams_BTRD)
        y_BTD, attended = self.attn(self.attn_norm(x_BTD), batch, cache)
        streams_BTRD = self.attn_site.leave(streams_BTRD, y_BTD, carry)
        x_BTD, carry = self.ffn_site.enter(streams_BTRD)
        y_BTD, routing = self._feed(self.ffn_norm(x_BTD), batch)
        return self.ffn_site.leave(streams_BTRD, y_BTD, carry), notes | attended | routing

    def _feed(self, x_BTD: Tensor, batch: Batch) -> tuple[Tensor, Notes]:
        return self.ffn(x_BTD, batch.tokens_BT) if isinstance(self.ffn, MoE) else (self.ffn(x_BTD), {})
