"""Which number of a DeepSeek-V4 checkpoint is which number of `Model`, in both vocabularies: the release's files and transformers' class.

    release                                transformers                                    ours
    layers.3.attn.wq_a.weight              model.layers.3.self_attn.q_a_proj.weight        blocks.3.attn.q_a.weight
    layers.3.ffn.experts.5.w3.weight       model.layers.3.mlp.experts.gate_up_proj[5, F:]  blocks.3.ffn.experts.gate_up.weight[5, F:]

The release stores every expert by itself and the gate (w1) and linear part (w3) of a SwiGLU apart; transformers stacks the routed ones
as we do. The release's MTP block is `mtp.0`; transformers has no place for it. What `save_pretrained` writes is neither: the
release's names with a few of the others among them.
"""

from collections.abc import Iterator

from byrote.checkpoint.v3_names import Piece
from byrote.model.config import CSA_RATIO, ModelConfig, V4AttentionConfig

# ours → (release, transformers), below a block
_BLOCK = {
    "attn_norm.weight": ("attn_norm.weight", "input_layernorm.weight"),
    "ffn_norm.weight": ("ffn_norm.weight", "post_attention_layernorm.weight"),
    "attn.q_a.weight": ("attn.wq_a.weight", "self_attn.q_a_proj.weight"),
    "attn.q_a_norm.weight": ("attn.q_norm.weight", "self_attn.q_a_norm.weight"),
    "attn.q_b.weight": ("attn.wq_b.weight", "self_attn.q_b_proj.weight"),
    "attn.kv.weight": ("attn.wkv.weight", "self_attn.kv_proj.weight"),
    "attn.kv_norm.weight": ("attn.kv_norm.weight", "self_attn.kv_norm.weight"),
    "attn.sink": ("attn.attn_sink", "self_attn.sinks"),
    "attn.o_a.weight": ("attn.wo_a.weight", "self_attn.o_a_proj.weight"),
    "attn.o_b.weight": ("attn.wo_b.weight", "self_attn.o_b_proj.weight"),
    **{f"{ours}_site.{part}": (f"hc_{ours}_{part}", f"{ours}_hc.{part}") for ours in ("attn", "ffn") for part in ("fn", "base", "scale")},
}
_COMPRESSOR = {
    "kv.weight": ("wkv.weight", "kv_proj.weight"),
    "gate.weight": ("wgate.weight", "gate_proj.weight"),
    "bias": ("ape", "position_bias"),
    "norm.weight": ("norm.weight", "kv_norm.weight"),
}
_INDEXER = {
    "attn.indexer.q_b.weight": ("attn.indexer.wq_b.weight", "self_attn.compressor.indexer.q_b_proj.weight"),
    "attn.indexer.weights.weight": ("attn.indexer.weights_proj.weight", "self_attn.compressor.indexer.scorer.weights_proj.weight"),
}
_TOP = {
    "embed.weight": ("embed.weight", "model.embed_tokens.weight"),
    "norm.weight": ("norm.weight", "model.norm.weight"),
    "head.weight": ("head.weight", "lm_head.weight"),
    **{f"read_out.{part}": (f"hc_head_{part}", f"model.hc_head.hc_{part}") for part in ("fn", "base", "scale")},
}
_MTP = {
    "embed_norm.weight": "enorm.weight",
    "hidden_norm.weight": "hnorm.weight",
    "embed_project.weight": "e_proj.weight",
    "hidden_project.weight": "h_proj.weight",
    "norm.weight": "norm.weight",
    **{f"read_out.{part}": f"hc_head_{part}" for part in ("fn", "base", "scale")},
}
_SAVED = {  # release → save_pretrained, outside of blocks
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "head.weight",
    **{f"hc_head_{part}": f"model.hc_head.hc_{part}" for part in ("fn", "base", "scale")},
}


def v4_pieces(config: ModelConfig, *, stacked: bool = False) -> list[Piece]:
    """Every tensor of the model under the release's names, or with `stacked` transformers'. Each number of ours is in one piece."""
    pieces = [Piece(names[stacked], ours) for ours, names in _TOP.items()]
    for layer in range(config.num_layers):
        pieces += _block(config, layer, f"model.layers.{layer}." if stacked else f"layers.{layer}.", f"blocks.{layer}.", stacked)
    for depth in range(config.mtp.depth if config.mtp and not stacked else 0):
        pieces += [Piece(f"mtp.{depth}.{theirs}", f"mtp.{depth}.{ours}") for ours, theirs in _MTP.items()]
        pieces += _block(config, config.num_layers + depth, f"mtp.{depth}.", f"mtp.{depth}.block.", stacked)
    return pieces


def v4_saved(config: ModelConfig) -> list[Piece]:
    """The names that transformers' save_pretrained writes."""
    pieces = (piece for piece in v4_pieces(config) if not piece.name.startswith("mtp."))
    return [piece._replace(name=_SAVED.get(piece.name) or _saved_in_block(piece.name)) for piece in pieces]


def _saved_in_block(release: str) -> str:
    return "model." + release.replace(".attn.kv_norm.", ".attn.norm.")


def _block(config: ModelConfig, layer: int, theirs: str, ours: str, stacked: bool) -> Iterator[Piece]:
    attention = config.attention_of(layer)
    assert isinstance(attention, V4AttentionConfig), "checked where the configuration is read"
    names = dict(_BLOCK)
    if attention.ratio:
        names |= _compressor("attn.compressor.", "attn.compressor.", "self_attn.compressor.")
    if attention.ratio == CSA_RATIO:
        names |= _INDEXER | _compressor("attn.indexer.compressor.", "attn.indexer.compressor.", "self_attn.compressor.indexer.")
    yield from (Piece(theirs + pair[stacked], ours + name) for name, pair in names.items())
    yield from _experts(config, layer, f"{theirs}{'mlp' if stacked else 'ffn'}.", f"{ours}ffn.", stacked)


def _compressor(ours: str, release: str, transformers: str) -> dict[str, tuple[str, str]]:
    return {ours + name: (release + pair[0], transformers + pair[1]) for name, pair in _COMPRESSOR.items()}


def _experts(config: ModelConfig, layer: int, theirs: str, ours: str, stacked: bool) -> Iterator[Piece]:
    moe = config.moe
    assert moe is not None, "every block of V4 has experts"
    yield Piece(f"{theirs}gate.weight", f"{ours}router")
    if config.is_hashed(layer):
        yield Piece(f"{theirs}gate.tid2eid", f"{ours}table_VK")
    else:
        yield Piece(f"{theirs}gate.{'e_score_correction_bias' if stacked else 'bias'}", f"{ours}bias")
    if stacked:
        yield Piece(f"{theirs}experts.gate_up_proj", f"{ours}experts.gate_up.weight")
        yield Piece(f"{theirs}experts.down_proj", f"{ours}experts.down.weight")
    for expert in range(0 if stacked else moe.num_experts):
        yield from _feed_forward(f"{theirs}experts.{expert}.", f"{ours}experts.", moe.expert_hidden, ("w1", "w3", "w2"), expert)
    parts = ("gate_proj", "up_proj", "down_proj") if stacked else ("w1", "w3", "w2")
    yield from _feed_forward(f"{theirs}shared_experts.", f"{ours}shared.", moe.num_shared * moe.expert_hidden, parts)


def _feed_forward(theirs: str, ours: str, hidden: int, parts: tuple[str, str, str], expert: int | None = None) -> Iterator[Piece]:
    gate, up, down = parts
    yield Piece(f"{theirs}{gate}.weight", f"{ours}gate_up.weight", expert, (0, hidden))
    yield Piece(f"{theirs}{up}.weight", f"{ours}gate_up.weight", expert, (hidden, 2 * hidden))
    yield Piece(f"{theirs}{down}.weight", f"{ours}down.weight", expert)
