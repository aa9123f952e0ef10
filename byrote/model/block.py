"""One layer: memory (in the chosen blocks), then attention, then experts or a dense feed-forward, each on the residual streams."""

from torch import Tensor, nn

from byrote.model.batch import Batch
from byrote.model.config import MLAConfig, ModelConfig
from byrote.model.engram import Engram
from byrote.model.hyper_connection import Site, make_site
from byrote.model.mla import MLA
from byrote.model.moe import FeedForward, MoE
from byrote.model.norm import RMSNorm
from byrote.model.state import Track

Notes = dict[str, Tensor]


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
        assert isinstance(config.attention, MLAConfig), "Model refuses other kinds of attention"
        self.attn = MLA(dim, config.attention, eps)
        self.ffn_site: Site = make_site(dim, config.residual, eps)
        self.ffn_norm = RMSNorm(dim, eps)
        if config.is_moe(layer):
            assert config.moe is not None
            self.ffn: nn.Module = MoE(dim, config.moe, config.swiglu_limit)
        else:
            self.ffn = FeedForward(dim, config.ffn_hidden, config.swiglu_limit)

    def forward(self, streams_BTRD: Tensor, batch: Batch, cache: Track | None = None) -> tuple[Tensor, Notes]:
        """(streams, notes of this layer: `gates` of memory; `scores`, `experts`, `load` of the router)."""
        notes: Notes = {}
        if self.engram is not None:
            streams_BTRD, notes["gates"] = self.engram(streams_BTRD, batch)
        x_BTD, carry = self.attn_site.enter(streams_BTRD)
        streams_BTRD = self.attn_site.leave(streams_BTRD, self.attn(self.attn_norm(x_BTD), batch, cache), carry)
        x_BTD, carry = self.ffn_site.enter(streams_BTRD)
        y_BTD, routing = self._feed(self.ffn_norm(x_BTD))
        return self.ffn_site.leave(streams_BTRD, y_BTD, carry), notes | routing

    def _feed(self, x_BTD: Tensor) -> tuple[Tensor, Notes]:
        return self.ffn(x_BTD) if isinstance(self.ffn, MoE) else (self.ffn(x_BTD), {})
