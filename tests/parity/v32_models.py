"""Tiny DeepSeek-V3.2 models of transformers', odd in every size. Sixteen index heads: with few, whole rows of scores are exactly zero."""

from typing import Any

import torch
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

from tests.parity.v3_models import SIZES, YARN

VARIANTS: dict[str, dict[str, Any]] = {
    "groups": {},
    "experts in every block, no groups": {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    "no experts": {"first_k_dense_replace": 2},
    "yarn": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}, "max_position_embeddings": 128},
    "index heads all rotary, another epsilon": {"index_head_dim": 6, "index_n_heads": 19, "rms_norm_eps": 1e-3},
    "one head, one block, values wider than keys": {
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "v_head_dim": 13,
    },
}


def tiny_v32(seed: int = 0, *, std: float = 0.3, **changes: Any) -> DeepseekV32ForCausalLM:
    """Weights far from their small initial values, so that every part has a say in the logits."""
    sizes = SIZES | {"index_n_heads": 16, "index_head_dim": 11, "index_topk": 7}
    config = DeepseekV32Config(**(sizes | changes), experts_implementation="eager", attn_implementation="eager")
    torch.manual_seed(seed)
    model = DeepseekV32ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm.weight" in name or "layernorm" in name else 0.0, std)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.1)
    return model
