"""Small packs for tests: everything a pack can hold, in a few kilobytes."""

from pathlib import Path

import torch

from byrote.checkpoint.packs import save_pack
from byrote.memory.heavy import TopNgram
from byrote.model.config import EngramConfig
from byrote.model.pack import Pack, PackFacts, new_pack

VOCAB, CLASSES, DIM, STREAMS = 11, 7, 4, 2
CANONICAL_V = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6, 5, 4, 3])
TOP = [TopNgram("of the", 2, 9), TopNgram("a b c", 3, 4)]
CONFIG = EngramConfig(
    layers=(0, 2), rows_per_order=11, head_dim=5, num_heads=2, max_order=3, canonical_vocab=CLASSES, pad_token=1, table_std=0.5
)


def make_pack(*, seed: int = 0, name: str = "A", config: EngramConfig = CONFIG, projections: int = 0) -> Pack:
    """Random weights, rows and visits (zero for about a third of the rows). `projections` seeds the weights alone."""
    facts = PackFacts(name=name, tokenizer="a" * 64, base="b" * 64, provenance="made by a test", licence="CC0-1.0")
    pack = new_pack(config, dim=DIM, streams=STREAMS, vocab_size=VOCAB, seed=seed, facts=facts)
    if config.canonical_vocab is not None:
        pack.memory.set_canonical(CANONICAL_V)
    generator = torch.Generator().manual_seed(projections)
    with torch.no_grad():
        for parameter in pack.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    visits_N = torch.randint(-3, 7, pack.memory.store.visits_N.shape, generator=generator.manual_seed(seed)).clamp(min=0)
    pack.memory.store.visits_N.copy_(visits_N)
    return pack


def write_small(folder: Path, *, top: bool = True, **how: object) -> Path:
    return save_pack(make_pack(**how), folder, card="## Measured\n\nnothing", top=TOP if top else ())
