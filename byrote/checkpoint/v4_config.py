"""DeepSeek-V4's config.json and `ModelConfig`, both ways. No weights, no transformers.

    compress_ratios, or layer_types               attention.compress_ratios        (entries beyond the blocks are MTP's, all 0)
    head_dim, qk_rope_head_dim, q_lora_rank, …    attention
    rope_theta; compress_rope_theta, rope_scaling attention.rope; attention.compress_rope
                                                  (or `rope_parameters` with `main` and `compress`, as transformers 5 writes it)
    num_hash_layers, or mlp_layer_types           moe.num_hash_layers
    hc_mult, hc_sinkhorn_iters, hc_eps            residual
    num_nextn_predict_layers                      mtp.depth, in V4's form

Written is the form of the release; read are both. A key that changes the computation and cannot be honoured is an error. What V4 has no
key for (balancing rates, loss weights, the indexer's stage) comes back as its default. V4's rotary tables have no amplitude.
"""

from collections.abc import Mapping
from typing import Any

from byrote.checkpoint.v3_config import integer, refuse
from byrote.errors import ConfigError
from byrote.model.config import ModelConfig, MoEConfig, MTPConfig, ResidualConfig, RopeConfig, V4AttentionConfig, YarnConfig

MODEL_TYPE = "deepseek_v4"

_LAYER_TYPES = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
_RATES = {kind: ratio for kind, ratio in _LAYER_TYPES.items() if ratio}
_FIXED: dict[str, tuple[object, ...]] = {
    "tie_word_embeddings": (False, None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, None),
    "hidden_act": ("silu",),
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc", None),
    "norm_topk_prob": (True,),
    "num_key_value_heads": (1,),
    "compress_rates": (_RATES, None),
}
_SIZES = {
    "num_attention_heads": "num_heads",
    "head_dim": "head_dim",
    "qk_rope_head_dim": "rope_head_dim",
    "q_lora_rank": "q_lora_rank",
    "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank",
    "sliding_window": "sliding_window",
    "index_n_heads": "index_num_heads",
    "index_head_dim": "index_head_dim",
    "index_topk": "index_top_k",
}
_READ = {
    *_SIZES,
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "rms_norm_eps", "initializer_range"),
    *("pad_token_id", "layer_types", "compress_ratios", "mlp_layer_types", "num_hash_layers", "partial_rotary_factor", "rope_theta"),
    *("compress_rope_theta", "rope_scaling", "rope_parameters", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("n_shared_experts", "routed_scaling_factor", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "swiglu_limit", "num_nextn_predict_layers"),
}
_WITHOUT_EFFECT = {
    *("architectures", "auto_map", "bos_token_id", "eos_token_id", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "problem_type", "router_aux_loss_coef"),
    *("router_jitter_noise", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "_name_or_path", "expert_dtype"),
    *("intermediate_size", "quantization_config"),
}


def config_from_v4(data: Mapping[str, Any]) -> ModelConfig:
    """Raises ConfigError for another model type, a missing key, or a value byrote cannot honour."""
    if data.get("model_type") != MODEL_TYPE:
        raise ConfigError(f"model_type is {data.get('model_type')!r}, not {MODEL_TYPE!r}")
    odd = [f"{key} is {data[key]!r}, not {allowed[0]!r}" for key, allowed in _FIXED.items() if key in data and data[key] not in allowed]
    if odd:
        raise ConfigError(f"this model cannot be imported. {'; '.join(odd)}")
    depth = integer(data, "num_nextn_predict_layers") if data.get("num_nextn_predict_layers") else 0
    return ModelConfig(
        vocab_size=integer(data, "vocab_size"),
        dim=integer(data, "hidden_size"),
        num_layers=integer(data, "num_hidden_layers"),
        attention=_attention(data),
        ffn_hidden=integer(data, "moe_intermediate_size"),
        max_positions=integer(data, "max_position_embeddings"),
        moe=_moe(data),
        residual=ResidualConfig(
            num_streams=integer(data, "hc_mult"), sinkhorn_iters=integer(data, "hc_sinkhorn_iters"), eps=float(data.get("hc_eps", 1e-6))
        ),
        mtp=MTPConfig(depth=depth, form="streams") if depth else None,
        norm_eps=float(data.get("rms_norm_eps", 1e-6)),
        init_std=float(data.get("initializer_range", 0.02)),
        swiglu_limit=float(data.get("swiglu_limit", 10.0)),
        pad_token=None if data.get("pad_token_id") is None else integer(data, "pad_token_id"),
    )


def ignored_keys(data: Mapping[str, Any]) -> list[str]:
    """Keys of a config.json that byrote does not know; what they mean is lost."""
    return sorted(key for key in data if key not in _READ | _WITHOUT_EFFECT | _FIXED.keys())


def _attention(data: Mapping[str, Any]) -> V4AttentionConfig:
    sizes: dict[str, Any] = {ours: integer(data, theirs) for theirs, ours in _SIZES.items() if theirs != "qk_rope_head_dim"}
    main, compress = _ropes(data)
    return V4AttentionConfig(
        **sizes,
        rope_head_dim=_rope_width(data, sizes["head_dim"]),
        compress_ratios=_ratios(data, integer(data, "num_hidden_layers")),
        rope=main,
        compress_rope=compress,
    )


def _rope_width(data: Mapping[str, Any], head_dim: int) -> int:
    """qk_rope_head_dim, or the share of head_dim that transformers keeps instead."""
    if data.get("qk_rope_head_dim") is not None:
        return integer(data, "qk_rope_head_dim")
    given = (data.get("rope_parameters") or {}).get("main", {}).get("partial_rotary_factor", data.get("partial_rotary_factor"))
    if given is None:
        raise ConfigError("config.json has neither qk_rope_head_dim nor partial_rotary_factor, which say what channels carry position")
    return round(head_dim * given)


def _ratios(data: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    if data.get("layer_types") is not None:
        unknown = sorted(set(data["layer_types"]) - _LAYER_TYPES.keys())
        if unknown:
            raise ConfigError(f"layer_types holds {', '.join(unknown)}; byrote has {', '.join(_LAYER_TYPES)}")
        return tuple(_LAYER_TYPES[kind] for kind in data["layer_types"])
    ratios = data.get("compress_ratios")
    if ratios is None:
        raise ConfigError("config.json has neither compress_ratios nor layer_types, which say what each block attends to")
    if len(ratios) < layers or any(ratios[layers:]):
        raise ConfigError(f"compress_ratios is {ratios}; {layers} blocks need as many, and MTP blocks behind them have 0")
    return tuple(ratios[:layers])


def _ropes(data: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig]:
    """(of blocks with the window alone, of blocks with entries)."""
    given = data.get("rope_parameters") or {}
    if "main" in given and "compress" in given:
        return _rope(given["main"], data), _rope(given["compress"], data)
    scaling = given or data.get("rope_scaling") or {}
    scaling = {key: value for key, value in scaling.items() if key != "rope_theta"}
    return (
        _rope({"rope_theta": data.get("rope_theta", 10_000.0)}, data),
        _rope({**scaling, "rope_theta": data.get("compress_rope_theta", 160_000.0)}, data),
    )


def _rope(given: Mapping[str, Any], data: Mapping[str, Any]) -> RopeConfig:
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "yarn") or given.get("attention_factor", 1.0) not in (None, 1.0):
        raise ConfigError(f"rope parameters are {dict(given)!r}; byrote has V4's 'default' and 'yarn', without an amplitude")
    yarn = None
    if kind == "yarn":
        original = int(given.get("original_max_position_embeddings") or data["max_position_embeddings"])
        fast, slow = float(given.get("beta_fast") or 32), float(given.get("beta_slow") or 1)
        yarn = YarnConfig(factor=float(given["factor"]), original_positions=original, beta_fast=fast, beta_slow=slow)
    return RopeConfig(theta=float(given["rope_theta"]), yarn=yarn)


def _moe(data: Mapping[str, Any]) -> MoEConfig:
    kinds = data.get("mlp_layer_types")
    hashed = integer(data, "num_hash_layers") if kinds is None else kinds.count("hash_moe")
    if kinds is not None and kinds != ["hash_moe"] * hashed + ["moe"] * (len(kinds) - hashed):
        raise ConfigError(f"mlp_layer_types is {kinds}; byrote has hash-routed blocks in front, and 'moe' after them")
    return MoEConfig(
        num_experts=integer(data, "n_routed_experts"),
        top_k=integer(data, "num_experts_per_tok"),
        expert_hidden=integer(data, "moe_intermediate_size"),
        num_shared=integer(data, "n_shared_experts"),
        score="sqrt_softplus",
        route_scale=float(data["routed_scaling_factor"]),
        num_dense_layers=0,
        num_hash_layers=hashed,
    )


# --- ModelConfig → config.json ----------------------------------------------------------------------------------------


def config_to_v4(config: ModelConfig, dtype: str, begin_id: int | None = None, end_id: int | None = None) -> dict[str, Any]:
    """The release's keys. Raises ConfigError naming every part that V4 cannot express."""
    check_expressible(config)
    attention, moe = config.attention, config.moe
    assert isinstance(attention, V4AttentionConfig) and moe is not None, "checked above"
    depth = config.mtp.depth if config.mtp else 0
    fixed = {key: allowed[0] for key, allowed in _FIXED.items() if key not in ("compress_rates", "mlp_bias")}
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": MODEL_TYPE,
        **fixed,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_nextn_predict_layers": depth,
        **{theirs: getattr(attention, ours) for theirs, ours in _SIZES.items()},
        "compress_ratios": [*(_ratio(config, layer) for layer in range(config.num_layers)), *[0] * depth],
        "rope_theta": attention.rope.theta,
        "compress_rope_theta": attention.compress_rope.theta,
        "rope_scaling": _rope_scaling(attention.compress_rope.yarn),
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_hidden,
        "n_shared_experts": moe.num_shared,
        "num_hash_layers": moe.num_hash_layers,
        "routed_scaling_factor": moe.route_scale,
        "hc_mult": config.residual.num_streams,
        "hc_sinkhorn_iters": config.residual.sinkhorn_iters,
        "hc_eps": config.residual.eps,
        "swiglu_limit": config.swiglu_limit,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "bos_token_id": begin_id,
        "eos_token_id": end_id,
        "pad_token_id": config.pad_token,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def _ratio(config: ModelConfig, layer: int) -> int:
    attention = config.attention_of(layer)
    assert isinstance(attention, V4AttentionConfig), "checked before"
    return attention.ratio


def _rope_scaling(yarn: YarnConfig | None) -> dict[str, Any] | None:
    if yarn is None:
        return None
    return {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_positions,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }


def check_expressible(config: ModelConfig) -> None:
    """Raises ConfigError that names each part V4 has no words for."""
    attention, moe, problems = config.attention, config.moe, []
    if not isinstance(attention, V4AttentionConfig):
        problems.append("the blocks' attention is not one V4AttentionConfig")
    elif attention.rope.yarn is not None or "half" in (attention.rope.layout, attention.compress_rope.layout):
        problems.append("rotary tables: V4 turns interleaved pairs, with YaRN for blocks with entries alone")
    if config.residual.kind != "mhc":
        problems.append(f"residual.kind is {config.residual.kind!r} and V4 has mHC")
    if config.engram is not None:
        problems.append("engram does not exist in V4: train with --model.engram none")
    if config.swiglu_limit is None:
        problems.append("swiglu_limit is none and V4 clamps: train with --model.swiglu_limit 10")
    if config.mtp is not None and config.mtp.form != "streams":
        problems.append("mtp.form is 'joined' and V4's is 'streams'")
    plain = moe is not None and moe.num_dense_layers == 0 and moe.num_groups == 1 and moe.normalize_gate and moe.num_shared == 1
    if moe is None or not plain or moe.score != "sqrt_softplus":
        problems.append("experts: V4 has them in every block, √softplus scores, normalised, no groups, one shared")
    refuse("DeepSeek-V4", problems)
