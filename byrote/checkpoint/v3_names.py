"""Which number of a DeepSeek-V3 checkpoint is which number of `Model`.

V3 stores gate and linear part of a SwiGLU apart and each routed expert by itself; byrote fuses the one and stacks the other. So
a tensor of V3 is a region of one of ours: the whole, some rows of it, one expert of it, or some rows of one expert.

    model.layers.3.mlp.experts.5.up_proj.weight   =   blocks.3.ffn.experts.gate_up.weight[5, F:2F]

transformers' class stacks the experts too (`experts.gate_up_proj`); `stacked=True` gives its names. MTP module k is stored as
layer num_hidden_layers + k, with copies of embedding and head that byrote, like the paper, shares with the model.

    enorm, hnorm, eh_proj                         embed_norm, hidden_norm, project
    shared_head.norm                              norm
    embed_tokens, shared_head.head                embed, head of the model (copies)
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from byrote.model.config import MLAConfig, ModelConfig


class Piece(NamedTuple):
    """One tensor of V3 and the region of ours it fills."""

    name: str  # in V3
    target: str  # in `Model.state_dict()`
    expert: int | None = None  # index into a stack of experts
    rows: tuple[int, int] | None = None  # of a fused projection
    is_copy: bool = False  # fills nothing new: must equal what another piece brought

    def of(self, target: Tensor) -> Tensor:
        """The region, as a view."""
        part = target if self.expert is None else target[self.expert]
        return part if self.rows is None else part[self.rows[0] : self.rows[1]]


_ATTENTION = {
    "q_proj": "q",
    "q_a_proj": "q_a",
    "q_a_layernorm": "q_a_norm",
    "q_b_proj": "q_b",
    "kv_a_proj_with_mqa": "kv_a",
    "kv_a_layernorm": "kv_a_norm",
    "kv_b_proj": "kv_b",
    "o_proj": "o",
}
_FULL_RANK = ("q_proj",)
_LOW_RANK = ("q_a_proj", "q_a_layernorm", "q_b_proj")


def v3_pieces(config: ModelConfig, *, stacked: bool = False) -> list[Piece]:
    """Every tensor of the model in V3's order. Each number of ours is covered by exactly one piece that is no copy."""
    pieces = [Piece("model.embed_tokens.weight", "embed.weight")]
    for layer in range(config.num_layers):
        pieces += _block(config, layer, f"model.layers.{layer}.", f"blocks.{layer}.", stacked)
    pieces += [Piece("model.norm.weight", "norm.weight"), Piece("lm_head.weight", "head.weight")]
    for depth in range(config.mtp.depth if config.mtp else 0):
        pieces += _mtp(config, depth, stacked)
    return pieces


def _mtp(config: ModelConfig, depth: int, stacked: bool) -> Iterator[Piece]:
    layer = config.num_layers + depth
    v3, ours = f"model.layers.{layer}.", f"mtp.{depth}."
    yield Piece(f"{v3}embed_tokens.weight", "embed.weight", is_copy=True)
    yield Piece(f"{v3}enorm.weight", f"{ours}embed_norm.weight")
    yield Piece(f"{v3}hnorm.weight", f"{ours}hidden_norm.weight")
    yield Piece(f"{v3}eh_proj.weight", f"{ours}project.weight")
    yield from _block(config, layer, v3, f"{ours}block.", stacked)
    yield Piece(f"{v3}shared_head.norm.weight", f"{ours}norm.weight")
    yield Piece(f"{v3}shared_head.head.weight", "head.weight", is_copy=True)


def _block(config: ModelConfig, layer: int, v3: str, ours: str, stacked: bool) -> Iterator[Piece]:
    attention = config.attention
    assert isinstance(attention, MLAConfig), "checked where the configuration is read"
    absent = _LOW_RANK if attention.q_lora_rank is None else _FULL_RANK
    yield Piece(f"{v3}input_layernorm.weight", f"{ours}attn_norm.weight")
    for name, target in _ATTENTION.items():
        if name not in absent:
            yield Piece(f"{v3}self_attn.{name}.weight", f"{ours}attn.{target}.weight")
    yield Piece(f"{v3}post_attention_layernorm.weight", f"{ours}ffn_norm.weight")
    if config.is_moe(layer):
        yield from _experts(config, f"{v3}mlp.", f"{ours}ffn.", stacked)
    else:
        yield from _feed_forward(f"{v3}mlp.", f"{ours}ffn.", config.ffn_hidden)


def _experts(config: ModelConfig, v3: str, ours: str, stacked: bool) -> Iterator[Piece]:
    moe = config.moe
    assert moe is not None
    yield Piece(f"{v3}gate.weight", f"{ours}router")
    yield Piece(f"{v3}gate.e_score_correction_bias", f"{ours}bias")
    if stacked:
        yield Piece(f"{v3}experts.gate_up_proj", f"{ours}experts.gate_up.weight")
        yield Piece(f"{v3}experts.down_proj", f"{ours}experts.down.weight")
    else:
        for expert in range(moe.num_experts):
            yield from _feed_forward(f"{v3}experts.{expert}.", f"{ours}experts.", moe.expert_hidden, expert)
    if moe.num_shared:
        yield from _feed_forward(f"{v3}shared_experts.", f"{ours}shared.", moe.num_shared * moe.expert_hidden)


def _feed_forward(v3: str, ours: str, hidden: int, expert: int | None = None) -> Iterator[Piece]:
    yield Piece(f"{v3}gate_proj.weight", f"{ours}gate_up.weight", expert, (0, hidden))
    yield Piece(f"{v3}up_proj.weight", f"{ours}gate_up.weight", expert, (hidden, 2 * hidden))
    yield Piece(f"{v3}down_proj.weight", f"{ours}down.weight", expert)
