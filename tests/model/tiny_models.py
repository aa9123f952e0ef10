"""Small models in which every part is at work, with no weight left at a value, such as zero, that would hide it."""

from typing import Any

import torch
from torch import Tensor

from byrote.model.config import EngramConfig, MLAConfig, ModelConfig, MoEConfig, MTPConfig, ResidualConfig
from byrote.model.transformer import Model
from tests.tolerances import assert_close_fp32

VOCAB = 29
ATTENTION = MLAConfig(num_heads=3, q_lora_rank=7, kv_lora_rank=6, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=6)
MOE = MoEConfig(num_experts=5, top_k=2, expert_hidden=8)
ENGRAM = EngramConfig(layers=(0, 2), rows_per_order=53, head_dim=3, num_heads=2, table_std=0.5)
RESIDUALS = {
    "mhc": ResidualConfig(num_streams=3),
    "hc": ResidualConfig(kind="hc", num_streams=2),
    "plain": ResidualConfig(kind="plain"),
}


def whole(**changes: Any) -> ModelConfig:
    """MLA, experts, mHC, memory in the first and last block, two MTP modules."""
    parts = {
        "vocab_size": VOCAB,
        "dim": 16,
        "num_layers": 3,
        "attention": ATTENTION,
        "ffn_hidden": 24,
        "moe": MOE,
        "residual": RESIDUALS["mhc"],
        "engram": ENGRAM,
        "mtp": MTPConfig(depth=2),
        "init_std": 0.2,
    }
    return ModelConfig(**(parts | changes))


def bare(**changes: Any) -> ModelConfig:
    """Attention and dense feed-forwards on a plain residual, nothing else."""
    return whole(**({"moe": None, "residual": RESIDUALS["plain"], "engram": None, "mtp": None} | changes))


def build(config: ModelConfig, *, seed: int = 0) -> Model:
    """A model whose zeros and ones (norms, convolutions, mixing, router bias) have moved a little."""
    model = Model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():  # experts chosen by token id are whole numbers
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    return model.eval()


def text(rows: int, length: int, *, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def next_tokens(tokens_BT: Tensor, document_BT: Tensor | None = None) -> Tensor:
    """Targets: the next token of the same document."""
    targets_BT = torch.full_like(tokens_BT, -100)
    targets_BT[:, :-1] = tokens_BT[:, 1:]
    if document_BT is not None:
        targets_BT[:, :-1].masked_fill_(document_BT[:, 1:] != document_BT[:, :-1], -100)
        targets_BT.masked_fill_(document_BT < 0, -100)
    return targets_BT


def gradients(model: Model) -> dict[str, Tensor]:
    """Gradient of every parameter that has one."""
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def assert_same_gradients(got: Model, want: Model) -> None:
    """In fp64 each parameter by itself; in fp32 all as one vector, as terms that cancel leave small ones without correct digits."""
    ours, theirs = gradients(got), gradients(want)
    assert ours.keys() == theirs.keys()
    if got.embed.weight.dtype == torch.float64:
        for name, gradient in ours.items():
            assert_close_fp32(gradient, theirs[name])
    else:
        assert_close_fp32(*(torch.cat([gradient.flatten() for gradient in some.values()]) for some in (ours, theirs)))
