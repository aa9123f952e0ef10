"""Tiny DeepSeek-V4 models, transformers' and ours with the same numbers, odd in every size, and the model of the published vectors."""

import zlib
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from byrote.checkpoint.v4_config import config_from_v4
from byrote.checkpoint.v4_names import v4_pieces
from byrote.model.transformer import Model

VOCAB = 53
YARN = {"type": "yarn", "factor": 16.0, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 256}


def tiny_v4(seed: int = 0, **changes: Any) -> DeepseekV4ForCausalLM:
    """A window block with hash routing, CSA, HCA, CSA; weights far from their small initial values, so that every part has a say."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 20,
        "moe_intermediate_size": 6,
        "num_hidden_layers": 4,
        "compress_ratios": [0, 4, 128, 4],
        "num_hash_layers": 1,
        "num_attention_heads": 6,
        "head_dim": 10,
        "qk_rope_head_dim": 6,
        "q_lora_rank": 9,
        "o_groups": 3,
        "o_lora_rank": 5,
        "sliding_window": 7,
        "n_routed_experts": 5,
        "num_experts_per_tok": 2,
        "index_n_heads": 16,
        "index_head_dim": 8,
        "index_topk": 4096,
        "rope_scaling": dict(YARN),
        "max_position_embeddings": 4096,
        "hc_mult": 3,
    }
    torch.manual_seed(seed)
    config = DeepseekV4Config(**(sizes | changes), experts_implementation="eager", attn_implementation="eager")
    model = DeepseekV4ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        mean, std = (1.0, 0.3) if "norm" in name or name.endswith("scale") else (0.0, 0.3)
        parameter.data.normal_(mean, std)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.1)
        if name.endswith("tid2eid"):
            buffer.copy_(torch.rand(len(buffer), config.n_routed_experts).topk(buffer.shape[1]).indices)
    return model


def twin_of(theirs: DeepseekV4ForCausalLM) -> Model:
    """Our model with the same numbers."""
    data = {**theirs.config.to_dict(), "num_nextn_predict_layers": 0}
    ours = Model(config_from_v4(data)).eval()
    tensors, targets, seen = theirs.state_dict(), ours.state_dict(), set()
    for piece in v4_pieces(ours.config, stacked=True):
        piece.of(targets[piece.target]).copy_(tensors[piece.name])
        seen.add(piece.name)
    assert seen == tensors.keys()
    return ours


def published_v4() -> DeepseekV4ForCausalLM:
    """The model behind the published logits; its numbers follow from their names and places."""
    theirs = tiny_v4(
        vocab_size=256,
        hidden_size=64,
        moe_intermediate_size=32,
        num_attention_heads=4,
        head_dim=32,
        qk_rope_head_dim=8,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=16,
        n_routed_experts=8,
        sliding_window=16,
        index_n_heads=32,
        index_head_dim=16,
        index_topk=16,
        hc_mult=4,
        pad_token_id=2,
    )
    for name, tensor in theirs.state_dict().items():
        tensor.copy_(_by_formula(name, tensor))
    return theirs


def _by_formula(name: str, tensor: Tensor) -> Tensor:
    if name.endswith("tid2eid"):
        token_V = torch.arange(len(tensor))
        return torch.stack((7 * token_V % 8, (7 * token_V + 3) % 8), dim=1)
    v = (torch.arange(tensor.numel()) * 2654435761 + zlib.crc32(name.encode())) % 2**32
    for _ in range(2):
        v = ((v ^ (v >> 16)) * 73244475) % 2**32
    u = (v ^ (v >> 16)).double().div(2**32).view(tensor.shape)
    if "norm" in name:
        return 1 + 0.4 * (u - 0.5)
    if name.endswith(("sinks", "position_bias")):
        return 2 * (u - 0.5)
    if name.endswith("base"):
        return 1.2 * (u - 0.5)
    if name.endswith("scale"):
        return torch.ones_like(u)
    if name.endswith("e_score_correction_bias"):
        return 0.2 * (u - 0.5)
    return (2 * u - 1) * (3 if "embed_tokens" in name else 3 / tensor.shape[-1]) ** 0.5
