"""Named models: published ones, whose totals check our counting, and sizes of our own to train.

Published presets rebuild what a paper or release gives; where it leaves a choice, the one that meets the printed totals is
taken: full-rank queries, a dense feed-forward of 8 expert widths, no-position part 128 + RoPE part 64 in the mHC and
Engram models. `PUBLISHED` holds the printed figures with their convention of counting (see `byrote.model.count`), so that
`byrote plan` and the tests can set ours beside them. A size of our own in another architecture: "small:v4" (`byrote.model.profiles`).

Names follow what is in a model: `v4-flash` and `v4-pro` are the released V4 (compressed attention, no memory);
`v4-lite-200b` and `v4-1t` are what early 2026 foresaw under that name, and really of our own profile.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from byrote.config import nearest
from byrote.errors import ConfigError
from byrote.model.config import (
    DSAConfig,
    EngramConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    ResidualConfig,
    RopeConfig,
    V4AttentionConfig,
    YarnConfig,
)
from byrote.model.count import VOCABULARY_WORDS, ParameterCount
from byrote.model.profiles import apply_profile

VOCABULARY = 129_280  # of every published model here


class Published(NamedTuple):
    """A figure as printed by its source."""

    quantity: str  # "total" | "active" | "memory"
    figure: float
    half_unit: float  # half a unit of its last digit
    source: str
    vocabulary: int = 2  # how often the vocabulary matrix is counted in it
    mtp: str = "none"  # as in ParameterCount.total

    @property
    def convention(self) -> str:
        """What is counted, in words."""
        if self.quantity == "memory":
            return "all rows"
        mtp = {"none": "", "own": ", with MTP", "stored": ", with MTP and its copies of embedding and head"}[self.mtp]
        return "vocabulary " + VOCABULARY_WORDS[self.vocabulary] + mtp

    def ours(self, count: ParameterCount) -> int:
        """The same quantity, counted the same way."""
        if self.quantity == "memory":
            return count.table
        if self.quantity == "active":
            return count.active_total(vocabulary=self.vocabulary)
        return count.total(vocabulary=self.vocabulary, mtp=self.mtp)


def load_preset(name: str) -> ModelConfig:
    """The preset called `name`, or "SIZE:PROFILE" (`byrote.model.profiles`); ConfigError with the nearest name otherwise."""
    size, _, profile = name.partition(":")
    if size not in PRESETS:
        raise ConfigError(f"unknown preset {size!r}; nearest: {nearest(size, PRESETS)}. All: {', '.join(PRESETS)}")
    return apply_profile(PRESETS[size](), profile) if profile else PRESETS[size]()


# --- sizes of our own -------------------------------------------------------------------------------------------------


def tiny() -> ModelConfig:
    """Under 1M active parameters beside embedding and head, and a 33M memory: four minutes on a laptop's CPU.

    A budget of four minutes feeds some three million tokens, and for so few a wider model loses: LOG.md has the runs.
    """
    return ModelConfig(
        vocab_size=4096,
        dim=128,
        num_layers=3,
        attention=MLAConfig(num_heads=4, q_lora_rank=64, kv_lora_rank=48, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=32),
        ffn_hidden=352,
        moe=MoEConfig(num_experts=4, top_k=2, expert_hidden=96),
        residual=ResidualConfig(num_streams=2),
        engram=EngramConfig(layers=(1,), rows_per_order=65_000, head_dim=64, num_heads=4),
        mtp=MTPConfig(train_fraction=0.25),
    )


def small() -> ModelConfig:
    """About 110M active parameters and a 100M memory: one GPU."""
    return ModelConfig(
        vocab_size=32_768,
        dim=768,
        num_layers=12,
        attention=_mla(12, q_lora_rank=512, kv_lora_rank=256, nope=64, rope=32, value=64),
        ffn_hidden=2048,
        moe=MoEConfig(num_experts=32, top_k=4, expert_hidden=384),
        residual=ResidualConfig(),
        engram=EngramConfig(layers=(1, 5), rows_per_order=100_000, head_dim=32),
        mtp=MTPConfig(),
    )


def base() -> ModelConfig:
    """About 500M active parameters and a 1B memory: eight GPUs."""
    return ModelConfig(
        vocab_size=65_536,
        dim=1280,
        num_layers=20,
        attention=_mla(12, q_lora_rank=640, kv_lora_rank=384),
        ffn_hidden=4096,
        moe=MoEConfig(num_experts=64, top_k=6, expert_hidden=512),
        residual=ResidualConfig(),
        engram=EngramConfig(layers=(1, 9), rows_per_order=500_000, head_dim=64),
        mtp=MTPConfig(),
    )


# --- mHC (arXiv 2512.24880, Table 5) and Engram (arXiv 2601.07372, Table 5) --------------------------------------------


def _mhc(
    *, dim: int, num_layers: int, num_heads: int, num_experts: int, expert_hidden: int, engram: EngramConfig | None = None
) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCABULARY,
        dim=dim,
        num_layers=num_layers,
        attention=_mla(num_heads, q_lora_rank=None, kv_lora_rank=512),
        ffn_hidden=8 * expert_hidden,
        moe=MoEConfig(num_experts=num_experts, top_k=6, expert_hidden=expert_hidden, num_shared=2),
        residual=ResidualConfig(),
        engram=engram,
        norm_eps=1e-20,
        pad_token=2,
    )


def mhc_3b() -> ModelConfig:
    return _mhc(dim=1280, num_layers=12, num_heads=16, num_experts=64, expert_hidden=896)


def mhc_9b() -> ModelConfig:
    return _mhc(dim=1920, num_layers=18, num_heads=24, num_experts=64, expert_hidden=1280)


def mhc_27b() -> ModelConfig:
    return _mhc(dim=2560, num_layers=30, num_heads=32, num_experts=72, expert_hidden=1536)


def _engram_backbone(rows_per_order: int) -> ModelConfig:
    """mhc-27b with 55 experts and a memory at the paper's layers 2 and 15, which are blocks 1 and 14; their hash ids stay 2 and 15."""
    memory = EngramConfig(
        layers=(1, 14), hash_layer_ids=(2, 15), rows_per_order=rows_per_order, head_dim=80, pad_token=2, table_dtype="bfloat16"
    )
    return _mhc(dim=2560, num_layers=30, num_heads=32, num_experts=55, expert_hidden=1536, engram=memory)


def engram_27b() -> ModelConfig:
    return _engram_backbone(2_262_400)


def engram_40b() -> ModelConfig:
    return _engram_backbone(7_239_680)


# --- V3 (arXiv 2412.19437) --------------------------------------------------------------------------------------------


def v3() -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCABULARY,
        dim=7168,
        num_layers=61,
        max_positions=163_840,
        attention=_mla(128, q_lora_rank=1536, kv_lora_rank=512, yarn=YarnConfig(factor=40.0, original_positions=4096)),
        ffn_hidden=18_432,
        moe=MoEConfig(num_experts=256, top_k=8, expert_hidden=2048, num_groups=8, top_groups=4, route_scale=2.5, num_dense_layers=3),
        residual=ResidualConfig(kind="plain"),
        mtp=MTPConfig(),
        init_std=0.006,
        pad_token=2,
    )


def v32() -> ModelConfig:
    """V3 with an indexer of 64 heads in every block, which picks 2048 keys (V3.2)."""
    plain = v3()
    assert isinstance(plain.attention, MLAConfig)
    attention = DSAConfig(
        mla=plain.attention, index_num_heads=64, index_head_dim=128, index_top_k=2048, index_hadamard=True, index_fp8=True
    )
    return replace(plain, attention=attention)


# --- V4 as released (arXiv 2606.19348 §4.2) ----------------------------------------------------------------------------


def _v4(*, dim: int, attention: V4AttentionConfig, num_experts: int, expert_hidden: int, route_scale: float) -> ModelConfig:
    """Every block has experts, so `ffn_hidden` describes no matrix; it repeats the expert width."""
    return ModelConfig(
        vocab_size=VOCABULARY,
        dim=dim,
        num_layers=len(attention.compress_ratios),
        max_positions=1_048_576,
        attention=attention,
        ffn_hidden=expert_hidden,
        moe=MoEConfig(
            num_experts=num_experts,
            top_k=6,
            expert_hidden=expert_hidden,
            score="sqrt_softplus",
            route_scale=route_scale,
            num_dense_layers=0,
            num_hash_layers=3,
        ),
        residual=ResidualConfig(),
        mtp=MTPConfig(form="streams"),
        swiglu_limit=10.0,
        pad_token=2,
    )


def _v4_attention(num_heads: int, q_lora_rank: int, o_groups: int, index_top_k: int, ratios: tuple[int, ...]) -> V4AttentionConfig:
    return V4AttentionConfig(
        num_heads=num_heads,
        head_dim=512,
        rope_head_dim=64,
        q_lora_rank=q_lora_rank,
        o_groups=o_groups,
        o_lora_rank=1024,
        sliding_window=128,
        compress_ratios=ratios,
        index_num_heads=64,
        index_head_dim=128,
        index_top_k=index_top_k,
        compress_rope=RopeConfig(theta=160_000.0, yarn=YarnConfig(factor=16.0, original_positions=65_536)),
    )


def v4_flash() -> ModelConfig:
    attention = _v4_attention(64, 1024, 8, 512, (0, 0, *(4, 128) * 20, 4))
    return _v4(dim=4096, attention=attention, num_experts=256, expert_hidden=2048, route_scale=1.5)


def v4_pro() -> ModelConfig:
    attention = _v4_attention(128, 1536, 16, 1024, (128, *(128, 4) * 30))
    return _v4(dim=7168, attention=attention, num_experts=384, expert_hidden=3072, route_scale=2.5)


# --- foreseen in early 2026, never released ----------------------------------------------------------------------------


def _foreseen(*, dim: int, num_layers: int, num_heads: int, moe: MoEConfig, ffn_hidden: int, engram: EngramConfig) -> ModelConfig:
    """MLA, mHC, Engram, experts and MTP: the parts DeepSeek had published when those articles appeared."""
    return ModelConfig(
        vocab_size=VOCABULARY,
        dim=dim,
        num_layers=num_layers,
        attention=_mla(num_heads, q_lora_rank=1536, kv_lora_rank=512),
        ffn_hidden=ffn_hidden,
        moe=moe,
        residual=ResidualConfig(),
        engram=engram,
        mtp=MTPConfig(),
        pad_token=2,
    )


def v4_lite_200b() -> ModelConfig:
    """The "lite" model of early 2026 articles, 200B in total. Only the total was foreseen: every shape is our reading.

    About a quarter of the sparse parameters are memory, the best share in the Engram paper (§3.1).
    """
    return _foreseen(
        dim=4096,
        num_layers=48,
        num_heads=64,
        ffn_hidden=12_288,
        moe=MoEConfig(num_experts=160, top_k=8, expert_hidden=1536, route_scale=2.5),
        engram=EngramConfig(layers=(1, 14), rows_per_order=12_800_000, head_dim=128, pad_token=2, table_dtype="bfloat16"),
    )


def v4_1t() -> ModelConfig:
    """The 1T / 37B model of early 2026 articles. Only these two figures were foreseen: every shape is our reading.

    V3's backbone with 288 experts on mHC streams, and a quarter of the sparse parameters in memory.
    """
    return _foreseen(
        dim=7168,
        num_layers=61,
        num_heads=128,
        ffn_hidden=18_432,
        moe=MoEConfig(num_experts=288, top_k=8, expert_hidden=2048, num_groups=8, top_groups=4, route_scale=2.5, num_dense_layers=3),
        engram=EngramConfig(layers=(1, 14), rows_per_order=30_000_000, head_dim=256, pad_token=2, table_dtype="bfloat16"),
    )


def _mla(
    num_heads: int,
    *,
    q_lora_rank: int | None,
    kv_lora_rank: int,
    nope: int = 128,
    rope: int = 64,
    value: int = 128,
    yarn: YarnConfig | None = None,
) -> MLAConfig:
    return MLAConfig(
        num_heads=num_heads,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=kv_lora_rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=value,
        rope=RopeConfig(yarn=yarn),
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "tiny": tiny,
    "small": small,
    "base": base,
    "mhc-3b": mhc_3b,
    "mhc-9b": mhc_9b,
    "mhc-27b": mhc_27b,
    "engram-27b": engram_27b,
    "engram-40b": engram_40b,
    "v3": v3,
    "v3.2": v32,
    "v4-flash": v4_flash,
    "v4-pro": v4_pro,
    "v4-lite-200b": v4_lite_200b,
    "v4-1t": v4_1t,
}

_MHC, _ENGRAM, _V3 = "arXiv 2512.24880, Table 5", "arXiv 2601.07372, Table 5", "arXiv 2412.19437"
_V4, _ARTICLES = "arXiv 2606.19348, §4.2", "articles of early 2026"

# V4-Pro's 1.6T is the main model rounded up (1.573T) or that with its MTP module (1.599T). V4-Flash's 284B is without one;
# the report does not say which of the two holds for Pro, so both readings stand here. Engram-27B's 5.7B is 5.792B cut off.
PUBLISHED: dict[str, tuple[Published, ...]] = {
    "mhc-3b": (Published("total", 2.97e9, 5e6, _MHC), Published("active", 612e6, 5e5, _MHC, vocabulary=1)),
    "mhc-9b": (Published("total", 9.18e9, 5e6, _MHC), Published("active", 1.66e9, 5e6, _MHC, vocabulary=1)),
    "mhc-27b": (Published("total", 27.0e9, 5e7, _MHC), Published("active", 4.14e9, 5e6, _MHC, vocabulary=1)),
    "engram-27b": (
        Published("total", 26.7e9, 5e7, _ENGRAM, vocabulary=1),
        Published("active", 3.8e9, 5e7, _ENGRAM, vocabulary=0),
        Published("memory", 5.7e9, 5e7, _ENGRAM),
    ),
    "engram-40b": (
        Published("total", 39.5e9, 5e7, _ENGRAM, vocabulary=1),
        Published("active", 3.8e9, 5e7, _ENGRAM, vocabulary=0),
        Published("memory", 18.5e9, 5e7, _ENGRAM),
    ),
    "v3": (
        Published("total", 671e9, 5e8, _V3),
        Published("total", 685e9, 5e8, "released files; they also hold FP8 scales, 0.04B", mtp="stored"),
        Published("active", 37e9, 5e8, _V3, vocabulary=1),
    ),
    "v3.2": (Published("total", 671e9, 5e8, f"{_V3}; V3.2 says no other, its indexers add 0.9B"),),
    "v4-flash": (Published("total", 284e9, 5e8, _V4), Published("active", 13e9, 5e8, _V4, vocabulary=1)),
    "v4-pro": (
        Published("total", 1.6e12, 5e10, _V4),
        Published("total", 1.6e12, 5e10, _V4, mtp="own"),
        Published("active", 49e9, 5e8, _V4, vocabulary=1),
    ),
    "v4-lite-200b": (Published("total", 200e9, 5e8, _ARTICLES),),
    "v4-1t": (Published("total", 1e12, 5e9, _ARTICLES), Published("active", 37e9, 5e8, _ARTICLES, vocabulary=1)),
}

# Tokens of the published pre-training runs.
PUBLISHED_TOKENS = {
    "mhc-3b": 39.3e9,
    "mhc-9b": 105e9,
    "mhc-27b": 262e9,
    "engram-27b": 262e9,
    "engram-40b": 262e9,
    "v3": 14.8e12,
    "v4-flash": 32e12,
    "v4-pro": 33e12,
}
