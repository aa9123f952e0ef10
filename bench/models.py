"""The models that benches compare: byrote's bench model and the same shape in transformers."""

from dataclasses import replace

import torch

from byrote.model.config import MLAConfig, ModelConfig, MoEConfig, ResidualConfig
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
