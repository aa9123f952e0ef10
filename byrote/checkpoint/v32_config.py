"""DeepSeek-V3.2's config.json and `ModelConfig`, both ways: V3's, and the indexer's three sizes.

    index_n_heads, index_head_dim, index_topk     attention.index_num_heads, index_head_dim, index_top_k
    mlp_layer_types                               what first_k_dense_replace says already, block by block
    layer_types                                   "indexed_attention" in every block

Latent attention turns interleaved pairs in V3.2; there is no key for another layout. The release's Hadamard matrix and FP8 rounding of
index queries and keys have no key either: both come back off, as transformers computes.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from byrote.checkpoint import v3_config
from byrote.errors import ConfigError
from byrote.model.config import DSAConfig, MLAConfig, ModelConfig

MODEL_TYPE = "deepseek_v32"
_INDEX = {"index_n_heads": "index_num_heads", "index_head_dim": "index_head_dim", "index_topk": "index_top_k"}
_OWN = {*_INDEX, "mlp_layer_types", "layer_types", "mlp_bias"}
_NOT_WRITTEN = ("rope_interleave", "pretraining_tp")  # transformers' configuration refuses them


def config_from_v32(data: Mapping[str, Any]) -> ModelConfig:
    """Raises ConfigError for a missing key or a value byrote cannot honour."""
    plain = v3_config.config_from_v3({**{key: value for key, value in data.items() if key not in _OWN}, "model_type": v3_config.MODEL_TYPE})
    _check(data, plain)
    assert isinstance(plain.attention, MLAConfig), "V3 has no other attention"
    heads, width, top_k = (v3_config.integer(data, key) for key in _INDEX)
    return replace(plain, attention=DSAConfig(mla=plain.attention, index_num_heads=heads, index_head_dim=width, index_top_k=top_k))


def _check(data: Mapping[str, Any], plain: ModelConfig) -> None:
    ffn = ["sparse" if plain.is_moe(layer) else "dense" for layer in range(plain.num_layers)]
    wanted = {
        "mlp_layer_types": (ffn, "first_k_dense_replace says otherwise"),
        "layer_types": (["indexed_attention"] * plain.num_layers, "every block of V3.2 has an indexer"),
        "mlp_bias": (False, "byrote's feed-forwards have no bias"),
        "rope_interleave": (True, "V3.2's latent attention turns interleaved pairs"),
    }
    odd = [f"{key} is {data[key]!r}: {why}" for key, (value, why) in wanted.items() if data.get(key, value) not in (value, None)]
    if odd:
        raise ConfigError(f"this model cannot be imported. {'; '.join(odd)}")


def ignored_keys(data: Mapping[str, Any]) -> list[str]:
    """Keys of a config.json that byrote does not know; what they mean is lost."""
    return [key for key in v3_config.ignored_keys(data) if key not in _OWN]


def config_to_v32(config: ModelConfig, dtype: str, begin_id: int | None = None, end_id: int | None = None) -> dict[str, Any]:
    """The release's keys. Raises ConfigError naming every part that V3.2 cannot express."""
    check_expressible(config)
    attention = config.attention
    assert isinstance(attention, DSAConfig), "checked above"
    written = v3_config.config_to_v3(replace(config, attention=attention.mla), dtype, begin_id, end_id)
    written |= {"architectures": ["DeepseekV32ForCausalLM"], "model_type": MODEL_TYPE}
    written |= {theirs: getattr(attention, ours) for theirs, ours in _INDEX.items()}
    return {key: value for key, value in written.items() if key not in _NOT_WRITTEN}


def check_expressible(config: ModelConfig) -> None:
    """Raises ConfigError that names each part V3.2 has no words for, and what to do."""
    attention = config.attention
    if not isinstance(attention, DSAConfig):
        raise ConfigError("DeepSeek-V3.2 cannot express this model: every block needs the same DSA attention")
    problems = v3_config.foreign_parts(replace(config, attention=attention.mla))
    if attention.mla.q_lora_rank is None:
        problems.append("queries are full-rank and V3.2's are not: train with --model.attention.mla.q_lora_rank")
    if attention.mla.rope.layout != "interleaved":
        problems.append("rope.layout is 'half' and V3.2 has interleaved: train with --model.attention.mla.rope.layout interleaved")
    v3_config.refuse("DeepSeek-V3.2", problems)
