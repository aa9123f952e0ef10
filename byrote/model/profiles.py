"""Profiles: the same size in another architecture, so that what differs is the architecture and not the budget.

    rote    ours: MLA, mHC, memory, experts, MTP                   what our own presets are made of
    v3      DeepSeek-V3: MLA, one plain stream, no memory
    v3.2    V3 with DSA: an indexer picks a quarter of the trained length, at most 2048 keys
    v4      DeepSeek-V4: window, CSA and HCA in turn, mHC, experts in every block, the first three by token id, no memory

A profile is a function from `ModelConfig` to `ModelConfig`; `load_preset("tiny:v4")` and `load_recipe("tiny_cpu:v4")` apply one. The
released models themselves are presets: v3, v3.2, v4-flash, v4-pro.

Derived sizes, where V4 needs numbers that MLA does not have: a head as wide as MLA's query head, in which as many channels turn; output
groups of two heads each (one where their number is odd), of MLA's query rank; a window of 128; the indexer of V3.2.
"""

from collections.abc import Callable
from dataclasses import replace

from byrote.config import nearest
from byrote.errors import ConfigError
from byrote.model.config import (
    CSA_RATIO,
    HCA_RATIO,
    DSAConfig,
    MLAConfig,
    ModelConfig,
    ResidualConfig,
    RopeConfig,
    V4AttentionConfig,
)

Profile = Callable[[ModelConfig], ModelConfig]
_INDEX_HEADS, _MOST_KEYS, _WINDOW, _HASHED = 16, 2048, 128, 3


def apply_profile(config: ModelConfig, name: str) -> ModelConfig:
    """`config` in the profile called `name`. ConfigError for an unknown one, and for a configuration that is no size of ours."""
    if name not in PROFILES:
        raise ConfigError(f"unknown profile {name!r}; nearest: {nearest(name, PROFILES)}. All: {', '.join(PROFILES)}")
    return PROFILES[name](config)


def rote(config: ModelConfig) -> ModelConfig:
    if config.engram is None or config.residual.kind != "mhc":
        raise ConfigError("the profile 'rote' has memory and mHC, and this model lacks one; start from tiny, small or base")
    return replace(config, attention=_mla(config))


def v3(config: ModelConfig) -> ModelConfig:
    return replace(config, attention=_mla(config), residual=ResidualConfig(kind="plain"), engram=None)


def v32(config: ModelConfig) -> ModelConfig:
    mla = _mla(config)
    width = max(32, 1 << (mla.qk_rope_head_dim - 1).bit_length())
    attention = DSAConfig(mla=mla, index_num_heads=_INDEX_HEADS, index_head_dim=width, index_top_k=_top_k(config.max_positions))
    return replace(v3(config), attention=attention)


def v4(config: ModelConfig) -> ModelConfig:
    """Two window blocks in front, then CSA and HCA in turn (V4-Flash); experts as they are, scored by √softplus."""
    if config.moe is None:
        raise ConfigError("the profile 'v4' has experts in every block and this model has none; give it --model.moe")
    mla = _mla(config)
    ratios = tuple(0 if layer < 2 else (CSA_RATIO, HCA_RATIO)[layer % 2] for layer in range(config.num_layers))
    attention = V4AttentionConfig(
        num_heads=mla.num_heads,
        head_dim=mla.qk_head_dim,
        rope_head_dim=mla.qk_rope_head_dim,
        q_lora_rank=mla.q_lora_rank or mla.kv_lora_rank,
        o_groups=mla.num_heads // 2 if mla.num_heads % 2 == 0 else mla.num_heads,
        o_lora_rank=mla.q_lora_rank or mla.kv_lora_rank,
        sliding_window=_WINDOW,
        compress_ratios=ratios,
        index_num_heads=_INDEX_HEADS,
        index_head_dim=max(32, mla.qk_rope_head_dim),
        index_top_k=max(1, _top_k(config.max_positions) // CSA_RATIO),
        compress_rope=RopeConfig(theta=160_000.0),
    )
    moe = replace(
        config.moe, score="sqrt_softplus", num_dense_layers=0, num_hash_layers=min(_HASHED, config.num_layers), num_groups=1, top_groups=1
    )
    mtp = None if config.mtp is None else replace(config.mtp, form="streams")
    residual = config.residual if config.residual.kind == "mhc" else ResidualConfig()
    return replace(config, attention=attention, moe=moe, mtp=mtp, residual=residual, engram=None, swiglu_limit=10.0)


def _mla(config: ModelConfig) -> MLAConfig:
    if not isinstance(config.attention, MLAConfig):
        raise ConfigError("a profile starts from a size with latent attention in all blocks, such as tiny, small or base")
    return config.attention


def _top_k(positions: int) -> int:
    return min(_MOST_KEYS, max(CSA_RATIO, positions // 4))


PROFILES: dict[str, Profile] = {"rote": rote, "v3": v3, "v3.2": v32, "v4": v4}
