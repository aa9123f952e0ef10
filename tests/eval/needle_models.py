"""Stand-ins for needle tests: a tokenizer that knows words, hay, and a model that reads its answer up in the text itself."""

import functools
import random

import torch
from torch import Tensor

from byrote.tokenizer.bpe import Tokenizer, train_bpe


def make_hay(sentences: int = 200, *, seed: int = 0) -> str:
    """Sentences of invented words of four to seven letters."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(4, 7))) for _ in range(60)]
    return " ".join(" ".join(rng.choices(words, k=rng.randint(3, 9))) + "." for _ in range(sentences))


@functools.cache
def word_tokenizer() -> Tokenizer:
    """Every word of the hay is a token."""
    return train_bpe([make_hay(), " The special number of is One numbers in their order are variables that hold Let be"], 500)


class Reader:
    """Repeats what stood behind the last earlier place with the same `reach` tokens: finds needles by their key, if that is unique."""

    name = "reader"

    def __init__(self, reach: int) -> None:
        self.reach, self.begin, self.longest = reach, (0,), 0

    def encode(self, text: str) -> list[int]:
        return word_tokenizer().encode(text)

    def greedy(self, tokens_BT: Tensor, last: int) -> Tensor:
        said = [[self._next(row[: len(row) - last + place]) for place in range(last)] for row in tokens_BT.tolist()]
        return torch.tensor(said)

    def _next(self, text: list[int]) -> int:
        key = text[-self.reach :]
        for end in range(len(text) - 1, self.reach - 1, -1):
            if text[end - self.reach : end] == key:
                return text[end]
        return -1
