"""A GPT-2-shaped model that the tests train themselves, tokenizer too, and a domain that it has not read.

The model learns sentences about animals; the domain is a catalogue of planets whose facts follow from nothing but the text.
"""

import random
from pathlib import Path
from typing import Any

import torch
import transformers

from byrote.tokenizer.bpe import train_bpe

ANIMALS = ["fox", "cat", "dog", "owl", "bear", "wolf", "crow", "mole", "hare", "toad"]
VERBS = ["sees", "hears", "follows", "fears", "meets", "helps", "finds", "likes"]
PLACES = ["forest", "river", "meadow", "village", "garden", "barn", "harbour", "valley"]
SYLLABLES = ["za", "ko", "mir", "tel", "pu", "nor", "vex", "shi", "lan", "dro", "qui", "bas"]
METALS = ["iron", "copper", "zinc", "nickel", "cobalt", "silver", "tin", "lead"]


def animal_text(number: int, sentences: int = 40) -> str:
    draw = random.Random(number)
    parts = [tuple(map(draw.choice, (ANIMALS, VERBS, ANIMALS, PLACES))) for _ in range(sentences)]
    return " ".join(f"The {one} {verb} the {other} in the {place}." for one, verb, other, place in parts)


def planets() -> list[tuple[str, str, str]]:
    """(name, metal, moons)."""
    draw = random.Random(7)
    names = list(dict.fromkeys("".join(draw.choices(SYLLABLES, k=3)).capitalize() for _ in range(60)))[:40]
    return [(name, draw.choice(METALS), str(draw.randint(2, 99))) for name in names]


def planet_text(number: int, sentences: int = 40) -> str:
    draw = random.Random(1000 + number)
    some = [draw.choice(planets()) for _ in range(sentences)]
    return " ".join(draw.choice((f"The metal of {name} is {metal}.", f"{name} has {moons} moons.")) for name, metal, moons in some)


def write_folder(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text)
    return folder


def train_host(folder: Path, *, dim: int = 32, steps: int = 120) -> Path:
    """Model and tokenizer in a folder that transformers loads."""
    texts = [animal_text(number) for number in range(60)]
    tokenizer = train_bpe([*texts, *(planet_text(number) for number in range(20))], 400)
    config = transformers.GPT2Config(
        vocab_size=410, n_embd=dim, n_layer=3, n_head=2, n_positions=256, bos_token_id=tokenizer.begin_id, eos_token_id=tokenizer.end_id
    )
    torch.manual_seed(0)
    model: Any = transformers.GPT2LMHeadModel(config).train()
    line = torch.tensor([token for text in texts for token in [tokenizer.begin_id, *tokenizer.encode(text), tokenizer.end_id]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(line) - 64, (8,), generator=generator)
        ids_BT = torch.stack([line[start : start + 64] for start in starts])
        model(ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder
