"""Tiny DeepSeek-V3 models, transformers' and ours, odd in every size, for the twins and the exchange tests."""

from dataclasses import replace
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from byrote.model.config import MLAConfig, ModelConfig, MoEConfig, MTPConfig, ResidualConfig, RopeConfig, YarnConfig
from byrote.model.moe import MoE
from byrote.model.transformer import Model

YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "groups and low-rank queries": {},
    "full-rank queries": {"q_lora_rank": None},
    "no groups, gates not normalised": {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 0.7},
    "yarn": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}, "max_position_embeddings": 128},
    "yarn without mscale, half layout": {"rope_parameters": YARN, "max_position_embeddings": 128, "rope_interleave": False},
    "experts in every block": {"first_k_dense_replace": 0, "n_shared_experts": 1},
    "no experts": {"first_k_dense_replace": 3, "num_hidden_layers": 3},
    "another epsilon than the latents'": {"rms_norm_eps": 1e-3},
    "one head, one block, values wider than keys": {
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "v_head_dim": 13,
    },
}


SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 20,
    "intermediate_size": 11,
    "moe_intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_shared_experts": 2,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 9,
    "kv_lora_rank": 7,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 6,
    "v_head_dim": 3,
    "max_position_embeddings": 64,
}


def tiny_v3_config(**changes: Any) -> DeepseekV3Config:
    return DeepseekV3Config(**(SIZES | changes), experts_implementation="eager")  # its grouped product refuses odd widths


def tiny_v3(seed: int = 0, **changes: Any) -> DeepseekV3ForCausalLM:
    """Weights far from their small initial values, so that every part has a say in the logits."""
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(tiny_v3_config(**changes)).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.1)
    return model


PLAIN = ModelConfig(
    vocab_size=261,
    dim=10,
    num_layers=3,
    attention=MLAConfig(num_heads=3, kv_lora_rank=7, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=3, q_lora_rank=9),
    ffn_hidden=11,
    max_positions=100,
    moe=MoEConfig(num_experts=6, top_k=2, expert_hidden=7, num_shared=2, num_groups=3, top_groups=2, route_scale=1.5),
    residual=ResidualConfig(kind="plain"),
    mtp=MTPConfig(depth=2),
)
_OUR_YARN = YarnConfig(factor=4.0, original_positions=25, mscale=0.7, mscale_all_dim=0.4)
CONFIGS = {
    "experts, groups and MTP": PLAIN,
    "dense": replace(PLAIN, moe=None),
    "full-rank queries": replace(PLAIN, attention=replace(PLAIN.attention, q_lora_rank=None), mtp=None),
    "yarn": replace(PLAIN, attention=replace(PLAIN.attention, rope=RopeConfig(theta=500.0, layout="half", yarn=_OUR_YARN)), pad_token=2),
    "another epsilon": replace(PLAIN, norm_eps=1e-5, attention=replace(PLAIN.attention, latent_norm_eps=1e-6)),
    "no group limit": replace(PLAIN, moe=MoEConfig(num_experts=4, top_k=3, expert_hidden=5, normalize_gate=False, num_dense_layers=0)),
}


def random_model(config: ModelConfig = PLAIN) -> Model:
    """Always the same numbers."""
    model, generator = Model(config, seed=1), torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, MoE):
            module.bias.normal_(0, 0.1, generator=generator)
    return model
