"""Which number of a DeepSeek-V3.2 checkpoint is which number of `Model`: V3's, and in every block an indexer beside latent attention.

self_attn.q_a_proj … o_proj             attn.mla.q_a … o
self_attn.indexer.wq_b                  attn.indexer.q_b
self_attn.indexer.wk, k_norm            attn.indexer.k, k_norm       (a LayerNorm: weight and bias)
self_attn.indexer.weights_proj          attn.indexer.weights
"""

from collections.abc import Iterator
from dataclasses import replace

from byrote.checkpoint.v3_names import Piece, v3_pieces
from byrote.model.config import DSAConfig, ModelConfig

_INDEXER = {
    "wq_b.weight": "q_b.weight",
    "wk.weight": "k.weight",
    "k_norm.weight": "k_norm.weight",
    "k_norm.bias": "k_norm.bias",
    "weights_proj.weight": "weights.weight",
}


def v32_pieces(config: ModelConfig, *, stacked: bool = False) -> list[Piece]:
    """Every tensor of the model. Each number of ours is covered by exactly one piece that is no copy."""
    attention = config.attention
    assert isinstance(attention, DSAConfig), "checked where the configuration is read"
    return [part for piece in v3_pieces(replace(config, attention=attention.mla), stacked=stacked) for part in _with_indexer(piece)]


def _with_indexer(piece: Piece) -> Iterator[Piece]:
    block, is_attention, rest = piece.target.partition(".attn.")
    yield piece._replace(target=f"{block}.attn.mla.{rest}") if is_attention else piece
    if is_attention and rest == "o.weight":
        names = piece.name.removesuffix("o_proj.weight")
        yield from (Piece(f"{names}indexer.{theirs}", f"{block}.attn.indexer.{ours}") for theirs, ours in _INDEXER.items())
