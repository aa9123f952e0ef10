"""Tiny random transformers models of six layouts, odd in size, and packs that say something on them."""

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from byrote.graft.host import base_fingerprint, find_host
from byrote.model.config import EngramConfig
from byrote.model.pack import Pack, PackFacts, new_pack

VOCAB, DIM = 61, 24
COMMON = {"vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": 3, "num_attention_heads": 3, "max_position_embeddings": 64}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ROPE = COMMON | ENDS | {"num_key_value_heads": 1, "intermediate_size": 20}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 3,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 7,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
LAYOUTS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**ROPE)),
    "qwen": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**ROPE, head_dim=8)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCAB, n_embd=DIM, n_layer=3, n_head=3, n_positions=64, **ENDS)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**ROPE, sliding_window=7)),
    "gemma": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**ROPE, head_dim=8, sliding_window=7)),
    "deepseek": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**(ROPE | DEEPSEEK))),
}


def host(layout: str) -> Any:
    """A model with all weights large enough to be seen."""
    torch.manual_seed(0)
    model = LAYOUTS[layout]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 0.2)
    return model


def pack_for(model: Any, *, seed: int = 0, table_std: float = 0.5, layers: tuple[int, ...] = (0, 2), **changes: Any) -> Pack:
    """Every weight at work: rows, projections, gains and convolution."""
    place = find_host(model)
    config = EngramConfig(
        layers=layers, rows_per_order=53, head_dim=3, num_heads=2, canonical_vocab=VOCAB - 4, pad_token=0, table_std=table_std, **changes
    )
    facts = PackFacts(name=f"test-{seed}", tokenizer="0" * 64, base=base_fingerprint(model))
    pack = new_pack(config, dim=place.dim, vocab_size=place.vocab_size, init_std=0.5, seed=seed, facts=facts)
    pack.memory.set_canonical(torch.arange(VOCAB) % (VOCAB - 4))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in pack.named_parameters():
        if "gain" in name or "conv" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return pack


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids_BT: Tensor, **call: Any) -> Tensor:
    with torch.no_grad():
        return model(ids_BT, **call).logits
