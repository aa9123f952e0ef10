"""DeepSeek-V3's config.json and `ModelConfig`, both ways. No weights, no transformers.

    vocab_size, hidden_size, num_hidden_layers    vocab_size, dim, num_layers
    intermediate_size                             ffn_hidden
    num_attention_heads, q/kv_lora_rank, *_dim    attention
    rope_theta, rope_scaling, rope_interleave     attention.rope     (or `rope_parameters`, as transformers 5 writes it)
    n_routed_experts, num_experts_per_tok, …      moe                (None when every block is dense)
    first_k_dense_replace                         moe.num_dense_layers
    n_group, topk_group                           moe.num_groups, moe.top_groups
    num_nextn_predict_layers                      mtp.depth
    rms_norm_eps                                  norm_eps           (the latents' norms are fixed at 1e-6 in V3)

Written is the form of the release, which every reader knows; read are both. A key that changes the computation and cannot be
honoured is an error. What V3 has no key for (balancing rates, loss weights) comes back as its default.
"""

from collections.abc import Mapping
from typing import Any

from byrote.errors import ConfigError
from byrote.model.config import MLAConfig, ModelConfig, MoEConfig, MTPConfig, ResidualConfig, RopeConfig, YarnConfig

MODEL_TYPE = "deepseek_v3"
LATENT_NORM_EPS = 1e-6

# Keys with one admissible value, and what to do about another one. An absent key is fine.
FIXED: dict[str, tuple[object, str]] = {
    "tie_word_embeddings": (False, "byrote keeps embedding and head apart; store the head as a copy of the embedding and untie them first"),
    "attention_bias": (False, "byrote's projections have no bias"),
    "attention_dropout": (0, "byrote has no dropout; set it to 0, which changes no output in evaluation"),
    "hidden_act": ("silu", "byrote's feed-forward is SwiGLU"),
    "scoring_func": ("sigmoid", "V3 scores experts by a sigmoid"),
    "topk_method": ("noaux_tc", "V3 picks experts by biased scores, group-limited"),
    "moe_layer_freq": (1, "in V3 every block after the dense ones has experts"),
    "pretraining_tp": (1, "byrote computes each projection whole"),
}

# Keys that say nothing about the computation, or repeat another key.
_WITHOUT_EFFECT = {
    *("architectures", "auto_map", "bos_token_id", "eos_token_id", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "head_dim", "qk_head_dim", "problem_type"),
    *("num_key_value_heads", "ep_size", "aux_loss_alpha", "seq_aux", "chunk_size_feed_forward", "is_encoder_decoder", "id2label"),
    *("label2id", "_name_or_path", "quantization_config"),
}
_READ = {
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank"),
    *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings", "rms_norm_eps"),
    *("initializer_range", "pad_token_id", "rope_theta", "rope_scaling", "rope_parameters", "rope_interleave", "n_routed_experts"),
    *("num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "n_group", "topk_group", "norm_topk_prob"),
    *("routed_scaling_factor", "first_k_dense_replace", "num_nextn_predict_layers", "num_mtp_layers"),
}
_ROPE_READ = {
    *("type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim"),
}
_ROPE_NEUTRAL = {"partial_rotary_factor": (None, 1), "truncate": (None, True), "attention_factor": (None,)}  # key → values without effect


# --- config.json → ModelConfig ----------------------------------------------------------------------------------------


def config_from_v3(data: Mapping[str, Any]) -> ModelConfig:
    """Raises ConfigError for another model type, a missing key, or a value byrote cannot honour."""
    _check_fixed(data)
    layers, depth = integer(data, "num_hidden_layers"), mtp_layers(data)
    eps = _number(data, "rms_norm_eps", LATENT_NORM_EPS)
    return ModelConfig(
        vocab_size=integer(data, "vocab_size"),
        dim=integer(data, "hidden_size"),
        num_layers=layers,
        attention=_attention(data, None if eps == LATENT_NORM_EPS else LATENT_NORM_EPS),
        ffn_hidden=integer(data, "intermediate_size"),
        max_positions=integer(data, "max_position_embeddings"),
        moe=_moe(data) if integer(data, "first_k_dense_replace") < layers + depth else None,
        residual=ResidualConfig(kind="plain"),
        mtp=MTPConfig(depth=depth) if depth else None,
        norm_eps=eps,
        init_std=_number(data, "initializer_range", 0.02),
        pad_token=None if data.get("pad_token_id") is None else integer(data, "pad_token_id"),
    )


def ignored_keys(data: Mapping[str, Any]) -> list[str]:
    """Keys of a config.json that byrote does not know; what they mean is lost."""
    return sorted(key for key in data if key not in _READ | _WITHOUT_EFFECT | FIXED.keys())


def mtp_layers(data: Mapping[str, Any]) -> int:
    """How many MTP modules a config.json announces."""
    key = "num_nextn_predict_layers" if "num_nextn_predict_layers" in data else "num_mtp_layers"
    return integer(data, key) if data.get(key) is not None else 0


def _check_fixed(data: Mapping[str, Any]) -> None:
    if data.get("model_type") != MODEL_TYPE:
        raise ConfigError(f"model_type is {data.get('model_type')!r}, not {MODEL_TYPE!r}")
    odd = {key: advice for key, (value, advice) in FIXED.items() if data.get(key, value) != value}
    problems = [f"{key} is {data[key]!r}, not {FIXED[key][0]!r}: {advice}" for key, advice in odd.items()]
    heads, kv_heads = data.get("num_attention_heads"), data.get("num_key_value_heads")
    if kv_heads is not None and kv_heads != heads:
        problems.append(f"num_key_value_heads is {kv_heads}, num_attention_heads {heads}: in latent attention every head has its own")
    if problems:
        raise ConfigError("this model cannot be imported. " + "; ".join(problems))


def _attention(data: Mapping[str, Any], latent_norm_eps: float | None) -> MLAConfig:
    return MLAConfig(
        num_heads=integer(data, "num_attention_heads"),
        kv_lora_rank=integer(data, "kv_lora_rank"),
        qk_nope_head_dim=integer(data, "qk_nope_head_dim"),
        qk_rope_head_dim=integer(data, "qk_rope_head_dim"),
        v_head_dim=integer(data, "v_head_dim"),
        q_lora_rank=None if _value(data, "q_lora_rank") is None else integer(data, "q_lora_rank"),
        latent_norm_eps=latent_norm_eps,
        rope=_rope(data),
    )


def _moe(data: Mapping[str, Any]) -> MoEConfig:
    shared = integer(data, "n_shared_experts")
    if shared < 1:
        raise ConfigError("n_shared_experts is 0; V3 has at least one shared expert")
    return MoEConfig(
        num_experts=integer(data, "n_routed_experts"),
        top_k=integer(data, "num_experts_per_tok"),
        expert_hidden=integer(data, "moe_intermediate_size"),
        num_shared=shared,
        num_groups=integer(data, "n_group"),
        top_groups=integer(data, "topk_group"),
        normalize_gate=_flag(data, "norm_topk_prob"),
        route_scale=_number(data, "routed_scaling_factor"),
        num_dense_layers=integer(data, "first_k_dense_replace"),
    )


def _rope(data: Mapping[str, Any]) -> RopeConfig:
    given = data.get("rope_parameters") or data.get("rope_scaling") or {}
    theta = _number(given, "rope_theta") if "rope_theta" in given else _number(data, "rope_theta", 10_000.0)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ConfigError(f"rope type is {kind!r}; byrote has 'default' and 'yarn'")
    odd = sorted(key for key in given if key not in _ROPE_READ and given[key] not in _ROPE_NEUTRAL.get(key, ()))
    if odd:
        raise ConfigError(f"byrote cannot honour these rope parameters: {', '.join(f'{key} = {given[key]!r}' for key in odd)}")
    layout = "interleaved" if "rope_interleave" not in data or _flag(data, "rope_interleave") else "half"
    return RopeConfig(theta=theta, layout=layout, yarn=_yarn(given, integer(data, "max_position_embeddings")) if kind == "yarn" else None)


def _yarn(given: Mapping[str, Any], max_positions: int) -> YarnConfig:
    """`mscale` counts only together with `mscale_all_dim`: without it the amplitude is that of mscale 1."""
    original = int(_number(given, "original_max_position_embeddings", max_positions))
    mscale, all_dim = given.get("mscale") or 0.0, given.get("mscale_all_dim") or 0.0
    if all_dim and not mscale:
        raise ConfigError(f"the rope parameters hold mscale_all_dim = {all_dim!r} and no mscale; give both or neither")
    return YarnConfig(
        factor=max_positions / original if given.get("factor") is None else _number(given, "factor"),
        original_positions=original,
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        mscale=float(mscale) if all_dim else 1.0,
        mscale_all_dim=float(all_dim),
    )


def _value(data: Mapping[str, Any], key: str) -> Any:
    if key not in data:
        raise ConfigError(f"config.json has no {key}, which decides what the weights mean; add it as the model's authors published it")
    return data[key]


def integer(data: Mapping[str, Any], key: str) -> int:
    value = _value(data, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"config.json: {key} is {value!r}; it must be a whole number, 0 or more")
    return value


def _flag(data: Mapping[str, Any], key: str) -> bool:
    value = _value(data, key)
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} is {value!r}; it must be true or false")
    return value


def _number(data: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = default if default is not None and data.get(key) is None else _value(data, key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"config.json: {key} is {value!r}; it must be a number")
    return float(value)


# --- ModelConfig → config.json ----------------------------------------------------------------------------------------


def config_to_v3(config: ModelConfig, dtype: str, begin_id: int | None = None, end_id: int | None = None) -> dict[str, Any]:
    """The release's keys. Raises ConfigError naming every part that V3 cannot express."""
    check_expressible(config)
    attention = config.attention
    assert isinstance(attention, MLAConfig), "checked above"
    rope = attention.rope
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": MODEL_TYPE,
        **{key: value for key, (value, _) in FIXED.items()},
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_hidden,
        "num_hidden_layers": config.num_layers,
        "num_nextn_predict_layers": config.mtp.depth if config.mtp else 0,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        **_experts(config),
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.yarn is None else _rope_scaling(rope.yarn),
        "rope_interleave": rope.layout == "interleaved",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "bos_token_id": begin_id,
        "eos_token_id": end_id,
        "pad_token_id": config.pad_token,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def _experts(config: ModelConfig) -> dict[str, Any]:
    """A dense model is a V3 whose dense blocks never end; the other numbers then describe no tensor."""
    moe = config.moe
    if moe is None:
        everything = config.num_layers + (config.mtp.depth if config.mtp else 0)
        moe = MoEConfig(num_experts=2, top_k=1, expert_hidden=config.ffn_hidden, num_dense_layers=everything)
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_hidden,
        "n_shared_experts": moe.num_shared,
        "n_group": moe.num_groups,
        "topk_group": moe.top_groups,
        "norm_topk_prob": moe.normalize_gate,
        "routed_scaling_factor": moe.route_scale,
        "first_k_dense_replace": moe.num_dense_layers,
    }


def _rope_scaling(yarn: YarnConfig) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_positions,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


def check_expressible(config: ModelConfig) -> None:
    """Raises ConfigError that names each part V3 has no words for, and what to do."""
    refuse("DeepSeek-V3", foreign_parts(config))


def refuse(architecture: str, problems: list[str]) -> None:
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise ConfigError(f"{architecture} cannot express this model; byrote's own checkpoint (byrote.save) can.{listed}")


def foreign_parts(config: ModelConfig) -> list[str]:
    return [*_foreign_streams(config), *_foreign_attention(config), *([] if config.moe is None else _foreign_experts(config.moe))]


def _foreign_streams(config: ModelConfig) -> list[str]:
    problems = []
    if config.residual.kind != "plain":
        problems.append(f"residual.kind is {config.residual.kind!r} and V3 has one plain stream: train with --model.residual.kind plain")
    if config.engram is not None:
        blocks = ", ".join(map(str, config.engram.layers))
        problems.append(f"engram (memory in blocks {blocks}) does not exist in V3: train with --model.engram none")
    if config.swiglu_limit is not None:
        problems.append(f"swiglu_limit is {config.swiglu_limit} and V3 does not clamp: train with --model.swiglu_limit none")
    return problems


def _foreign_attention(config: ModelConfig) -> list[str]:
    attention, problems = config.attention, []
    if not isinstance(attention, MLAConfig):
        return ["attention is not one MLA for all blocks, as V3 has it: train with an MLA configuration"]
    eps = config.norm_eps if attention.latent_norm_eps is None else attention.latent_norm_eps
    if eps != LATENT_NORM_EPS:
        advice = "train with --model.attention.latent_norm_eps 1e-6"
        problems.append(f"the latents' norms use ε = {eps:g} and V3 fixes {LATENT_NORM_EPS:g}: {advice}")
    yarn = attention.rope.yarn
    if yarn is not None and not yarn.mscale_all_dim and yarn.mscale != 1.0:
        problems.append(f"rope.yarn.mscale is {yarn.mscale} without mscale_all_dim, and readers then take 1: set mscale to 1 or give both")
    if yarn is not None and yarn.mscale_all_dim and not yarn.mscale:
        problems.append("rope.yarn.mscale is 0 with mscale_all_dim, and readers then take 1: give both or neither")
    return problems


def _foreign_experts(moe: MoEConfig) -> list[str]:
    problems = []
    if moe.score != "sigmoid":
        problems.append(f"moe.score is {moe.score!r} and V3 has sigmoid: train with --model.moe.score sigmoid")
    if moe.num_shared < 1:
        problems.append("moe.num_shared is 0 and V3 has at least one shared expert: train with --model.moe.num_shared 1")
    if moe.num_experts // moe.num_groups < 2:
        problems.append("a group of experts has one member, and V3 scores a group by its best two: train with fewer --model.moe.num_groups")
    return problems
