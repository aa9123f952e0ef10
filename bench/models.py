"""The models that benches compare: byrote's bench model and the same shape in transformers."""

from dataclasses import replace

import torch

from byrote.checkpoint.v4_config import config_to_v4
from byrote.checkpoint.v4_names import v4_pieces
from byrote.model.config import MLAConfig, ModelConfig, MoEConfig, ResidualConfig, RopeConfig, V4AttentionConfig, YarnConfig
from byrote.model.transformer import Model


def bench_config(dim: int = 256) -> ModelConfig:
    """V3-shaped: 6 layers (first dense), 4 heads, 16 experts top-2, plain residual."""
    scale = dim // 256
    return ModelConfig(
        vocab_size=4096,
        dim=dim,
        num_layers=6,
        ffn_hidden=688 * scale,
        attention=MLAConfig(
            num_heads=4 * scale, q_lora_rank=128 * scale, kv_lora_rank=64 * scale, qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=64
        ),
        moe=MoEConfig(num_experts=16, top_k=2, expert_hidden=128 * scale, num_dense_layers=1, balance_alpha=0.0),
        residual=ResidualConfig(kind="plain"),
    )


def bench_model(dim: int = 256, *, residual: str = "plain", seed: int = 0) -> Model:
    config = bench_config(dim)
    return Model(replace(config, residual=ResidualConfig(kind=residual)), seed=seed)


def transformers_twin(experts: str = "grouped_mm", attention: str = "sdpa") -> torch.nn.Module:
    """transformers' DeepseekV3ForCausalLM of the same shape, at the named expert and attention back ends."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    c = bench_config()
    a, m = c.attention, c.moe
    assert isinstance(a, MLAConfig) and m is not None
    config = DeepseekV3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        intermediate_size=c.ffn_hidden,
        moe_intermediate_size=m.expert_hidden,
        num_hidden_layers=c.num_layers,
        num_attention_heads=a.num_heads,
        num_key_value_heads=a.num_heads,
        n_shared_experts=1,
        n_routed_experts=m.num_experts,
        routed_scaling_factor=1.0,
        kv_lora_rank=a.kv_lora_rank,
        q_lora_rank=a.q_lora_rank,
        qk_rope_head_dim=a.qk_rope_head_dim,
        v_head_dim=a.v_head_dim,
        qk_nope_head_dim=a.qk_nope_head_dim,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=m.top_k,
        first_k_dense_replace=m.num_dense_layers,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        attn_implementation=attention,
        experts_implementation=experts,
    )
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config)


def v4_bench_config() -> ModelConfig:
    """V4-shaped: the same width and experts, experts in every block (the first by token id), mHC, two window, CSA and HCA blocks each."""
    v3 = bench_config()
    assert v3.moe is not None
    attention = V4AttentionConfig(
        num_heads=4,
        head_dim=64,
        rope_head_dim=16,
        q_lora_rank=128,
        o_groups=2,
        o_lora_rank=64,
        sliding_window=128,
        compress_ratios=(0, 0, 4, 128, 4, 128),
        index_num_heads=16,
        index_head_dim=32,
        index_top_k=64,
        compress_rope=RopeConfig(theta=160_000.0, yarn=YarnConfig(factor=16.0, original_positions=65_536)),
    )
    moe = replace(v3.moe, num_dense_layers=0, num_hash_layers=1, score="sqrt_softplus", route_scale=1.5)
    changes = {"attention": attention, "moe": moe, "residual": ResidualConfig(), "ffn_hidden": moe.expert_hidden, "swiglu_limit": 10.0}
    return replace(v3, **changes)


def v4_tiny_config() -> ModelConfig:
    """Four blocks of width 64 (window, CSA, HCA, CSA), 0.4M parameters: small enough that what grows with length is what is measured."""
    bench = v4_bench_config()
    assert isinstance(bench.attention, V4AttentionConfig) and bench.moe is not None
    sizes = {"head_dim": 32, "rope_head_dim": 8, "q_lora_rank": 32, "o_lora_rank": 16, "sliding_window": 16}
    index = {"index_num_heads": 32, "index_head_dim": 16, "index_top_k": 16, "compress_ratios": (0, 4, 128, 4)}
    moe = replace(bench.moe, num_experts=8, expert_hidden=32)
    attention = replace(bench.attention, **sizes, **index)
    return replace(bench, vocab_size=256, dim=64, num_layers=4, ffn_hidden=32, moe=moe, attention=attention, max_positions=65_536)


def v4_twins(config: ModelConfig, experts: str = "grouped_mm") -> tuple[Model, torch.nn.Module]:
    """byrote's model and transformers' DeepseekV4ForCausalLM with the same numbers."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    ours = Model(config)
    written = {key: value for key, value in config_to_v4(config, "float32").items() if key not in ("torch_dtype", "architectures")}
    theirs = DeepseekV4ForCausalLM(DeepseekV4Config(**written, experts_implementation=experts))
    held, target = ours.state_dict(), theirs.state_dict()
    for piece in v4_pieces(config, stacked=True):
        target[piece.name].copy_(piece.of(held[piece.target]))
    return ours, theirs
