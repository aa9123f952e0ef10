"""Needle tests: does a model find what a long text said, over depth × length?

A cell is a kind of needle, a length and a depth. Its score is the share of samples whose answer is right in every token under greedy
decoding (`harness.py` says why one forward pass decides that), with a Wilson interval:

    centre = (p + z²/2n) / (1 + z²/n)        half width = z √(p(1−p)/n + z²/4n²) / (1 + z²/n)        z = 1.96: 95 %

which stays inside [0, 1] and is honest where every or no sample is right (200 of 200: 98.1 … 100 %).

All samples of a cell have one length, so they go through the model together. What a sample holds is decided by the seed, the cell and
its number; a finished cell is written down at once, and an evaluation that is called again with the same settings goes on behind it.

Where the hay comes from is a `NeedleSource`: text (`haystack.py`), or the synthetic task a model was trained on (`RecallNeedles`).
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from byrote.data.config import RecallConfig
from byrote.data.packing import IGNORE
from byrote.data.synthetic import Alphabet, num_pairs, validation_documents
from byrote.errors import ConfigError
from byrote.eval.harness import LanguageModel
from byrote.eval.haystack import Sample

Z95 = 1.959964
MANY, FEW, MANY_UP_TO = 200, 50, 2048  # samples of a cell, up to this length and above
BATCH_TOKENS = 8192


class Interval(NamedTuple):
    low: float
    high: float


class Cell(NamedTuple):
    kind: str
    length: int
    depth: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Right answers of one cell, or of several together."""

    hits: int
    samples: int

    @property
    def share(self) -> float:
        return self.hits / self.samples

    @property
    def interval(self) -> Interval:
        return wilson(self.hits, self.samples)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.share:.0f} ({100 * low:.0f}–{100 * high:.0f})"


class NeedleSource(Protocol):
    @property
    def kinds(self) -> Sequence[str]: ...

    def sample(self, kind: str, length: int, depth: float, seed: str) -> Sample: ...


class RecallNeedles:
    """Documents of the synthetic task that training cannot have seen: one pair, as many as in training, or four questions at once."""

    kinds = ("single", "multi-key", "multi-query")

    def __init__(self, config: RecallConfig, letters: Alphabet) -> None:
        self._config, self._letters = config, letters

    def sample(self, kind: str, length: int, depth: float, seed: str) -> Sample:
        pairs = 1 if kind == "single" else num_pairs(self._config, length)
        questions = min(4, pairs) if kind == "multi-query" else 1
        number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")
        made = validation_documents(self._config, self._letters, length, 1, seed=number, pairs=pairs, questions=questions, depth=depth)
        answers = (made.targets_NL[0] != IGNORE).nonzero()[0] + 1
        return Sample(made.tokens_NL[0].tolist(), answers.tolist())


def wilson(hits: int, samples: int, z: float = Z95) -> Interval:
    """Where the true share lies, with 95 % confidence."""
    share, weight = hits / samples, z * z / samples
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / samples + weight / (4 * samples)) / (1 + weight)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def grid(kinds: Sequence[str], lengths: Sequence[int], depths: Sequence[float]) -> list[Cell]:
    return [Cell(kind, length, depth) for kind in kinds for length in sorted(lengths) for depth in depths]


def even_depths(count: int) -> list[float]:
    """0 … 1 in equal steps; a single one is the middle."""
    if count < 1:
        raise ConfigError(f"--depths is {count}; give at least 1")
    return [0.5] if count == 1 else [round(number / (count - 1), 4) for number in range(count)]


def score_cells(
    lm: LanguageModel, source: NeedleSource, cells: Sequence[Cell], *, samples: int | None = None, seed: int = 0,
    done: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Cell, Score]]:  # fmt: skip
    """Score cell after cell. `samples`: of each, by default 200 up to 2,048 tokens and 50 above; `done` is told samples done and in all.

    ConfigError where a cell cannot hold its needles, before any is scored.
    """
    for cell in cells:
        source.sample(*cell, f"{seed} {cell} 0")
    counts = [samples or (MANY if cell.length <= MANY_UP_TO else FEW) for cell in cells]
    before, total = 0, sum(counts)
    for cell, count in zip(cells, counts, strict=True):
        hits, batch = 0, max(1, BATCH_TOKENS // cell.length)
        for first in range(0, count, batch):
            texts = [source.sample(*cell, f"{seed} {cell} {number}") for number in range(first, min(first + batch, count))]
            hits += count_right(lm, texts)
            if done is not None:
                done(before + first + len(texts), total)
        before += count
        yield cell, Score(hits=hits, samples=count)


def count_right(lm: LanguageModel, texts: Sequence[Sample]) -> int:
    """How many of these texts of one length the model answers right in every token."""
    tokens_BT = torch.tensor([text.tokens for text in texts])
    length = tokens_BT.shape[1]
    last = length - min(min(text.scored) for text in texts)
    is_right_BN = lm.greedy(tokens_BT, last) == tokens_BT[:, -last:]
    return sum(all(is_right_N[place - length] for place in text.scored) for is_right_N, text in zip(is_right_BN.tolist(), texts))


def pooled(scores: dict[Cell, Score], **wanted: Any) -> Score | None:
    """All cells with these values together: `pooled(scores, kind="single", length=512)`; None where there are none."""
    some = [score for cell, score in scores.items() if all(getattr(cell, name) == value for name, value in wanted.items())]
    return Score(hits=sum(one.hits for one in some), samples=sum(one.samples for one in some)) if some else None
