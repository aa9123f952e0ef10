"""Needles in text: statements hidden in a text that has nothing to do with them, and a question at its end.

    begin │ hay hay hay. │ The special number of amber river is 48213. │ hay hay … │ The special number of amber river is │ 48213
                                        needle, at a depth                                    question                    answer

Kinds (the first four and `variable` after RULER, arXiv 2404.06654, in our own words):

    single        one statement
    multi-key     the same among statements of other keys
    multi-value   three statements of one key: all numbers are asked for, in their order
    multi-query   three keys: all numbers are asked for, in the order of the question
    distractor    every other statement differs from the asked one in exactly one token of its key
    variable      a = number, b = a, c = b, beside a second such chain: which variables hold the number?

All lengths are exact: hay is cut so that begin, hay, needles, question and answer fill the tokens asked for. The asked statement goes to
the border of sentences that lies nearest to the depth, the others to random borders; those of a chain or a row of values to random
borders *behind* the first, in order. Key words are words of the hay that are one token with the space before them, so "one token" is
exact under any tokenizer, and no list of words has to fit it.
"""

import bisect
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from byrote.errors import ConfigError, DataError
from byrote.eval.harness import LanguageModel

KEY_WORDS, NUM_WORDS, FEWEST_WORDS = 3, 400, 24
NUM_OTHERS = 6  # statements beside the asked one
_SENTENCE = re.compile(r".+?(?:[.!?](?=\s)|\n+|\Z)", re.DOTALL)
_WORD = re.compile(r"\b[a-z]{4,9}\b")


class Sample(NamedTuple):
    tokens: list[int]
    scored: list[int]  # places of the answer's tokens; all must be right


class Needles(NamedTuple):
    statements: Sequence[str]  # the first one is placed at the depth
    question: str
    answer: str
    in_order: bool = False  # the statements behind the first stand behind it, in this order


class TextNeedles:
    """Samples over the hay `text`. Raises DataError where it has too few words or none of the tokenizer's tokens is a word."""

    def __init__(self, lm: LanguageModel, text: str) -> None:
        self._lm = lm
        sentences = [lm.encode(sentence) for sentence in _SENTENCE.findall(text)]
        self._hay = [token for sentence in sentences for token in sentence]
        self._borders = [0, *accumulate(map(len, sentences))]
        if not self._hay:
            raise DataError("the hay holds no text; give a file of prose or code with --hay FILE")
        counted = Counter(_WORD.findall(text))
        self._words = [word for word, _ in counted.most_common(8 * NUM_WORDS) if len(lm.encode(f" {word}")) == 1][:NUM_WORDS]
        if len(self._words) < FEWEST_WORDS:
            raise DataError(
                f"only {len(self._words)} words of the hay are one token of this tokenizer, {FEWEST_WORDS} are needed as keys; "
                "give longer hay, or a model whose tokenizer knows words"
            )

    kinds = ("single", "multi-key", "multi-value", "multi-query", "distractor", "variable")

    def sample(self, kind: str, length: int, depth: float, seed: str) -> Sample:
        """One text of exactly `length` tokens, decided by `seed`. ConfigError where needles and question need more than that."""
        rng = random.Random(seed)
        needles = _KINDS[kind](rng, self._words)
        question = self._lm.encode(needles.question)
        end = self._lm.encode(needles.question + needles.answer)
        shared = next((at for at, (one, two) in enumerate(zip(question, end)) if one != two), min(len(question), len(end)))
        pieces = [self._lm.encode(statement) for statement in needles.statements]
        room = length - len(self._lm.begin) - sum(map(len, pieces)) - len(end)
        if room < 0:
            raise ConfigError(
                f"needles of kind {kind!r} with their question take {length - room} tokens; a length of {length} is too short"
            )
        hay, borders = self._cut(rng.randrange(len(self._borders) - 1), room)
        at = min(borders, key=lambda border: abs(border - depth * room))
        later = [border for border in borders if border >= at] if needles.in_order else borders
        places = [at, *(sorted if needles.in_order else list)(rng.choices(later, k=len(pieces) - 1))]
        tokens = [*self._lm.begin, *_insert(hay, pieces, places), *end]
        return Sample(tokens, list(range(length - len(end) + shared, length)))

    def _cut(self, first: int, room: int) -> tuple[list[int], list[int]]:
        """`room` tokens of hay from a sentence on, round and round, and the borders of sentences among them."""
        start = self._borders[first]
        rounds = 2 + room // len(self._hay)
        hay = (self._hay * rounds)[start : start + room]
        borders = [border + turn * len(self._hay) - start for turn in range(rounds) for border in self._borders[:-1]]
        return hay, borders[bisect.bisect_left(borders, 0) : bisect.bisect_right(borders, room)]


def _insert(hay: list[int], pieces: list[list[int]], places: list[int]) -> list[int]:
    tokens, done = [], 0
    for place, piece in sorted(zip(places, pieces, strict=True), key=lambda pair: pair[0]):  # stable: equal places keep their order
        tokens += hay[done:place] + piece
        done = place
    return tokens + hay[done:]


# --- kinds ------------------------------------------------------------------------------------------------------------


def _statement(key: str, number: str) -> str:
    return f" The special number of {key} is {number}."


def _keys(rng: random.Random, words: Sequence[str], count: int) -> list[str]:
    """Keys that share no word."""
    drawn = rng.sample(words, count * KEY_WORDS)
    return [" ".join(drawn[at : at + KEY_WORDS]) for at in range(0, len(drawn), KEY_WORDS)]


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(10_000, 100_000), count)]


def _single(rng: random.Random, words: Sequence[str], others: int = 0) -> Needles:
    keys = _keys(rng, words, 1 + others)
    numbers = _numbers(rng, len(keys))
    return Needles([*map(_statement, keys, numbers)], f" The special number of {keys[0]} is", f" {numbers[0]}")


def _multi_key(rng: random.Random, words: Sequence[str]) -> Needles:
    return _single(rng, words, NUM_OTHERS)


def _multi_value(rng: random.Random, words: Sequence[str]) -> Needles:
    (key,), numbers = _keys(rng, words, 1), _numbers(rng, 3)
    statements = [f" One of the special numbers of {key} is {number}." for number in numbers]
    return Needles(statements, f" The special numbers of {key}, in their order, are", f" {', '.join(numbers)}", in_order=True)


def _multi_query(rng: random.Random, words: Sequence[str]) -> Needles:
    keys, numbers = _keys(rng, words, 3), _numbers(rng, 3)
    question = f" The special numbers of {keys[0]}, of {keys[1]} and of {keys[2]} are"
    return Needles([*map(_statement, keys, numbers)], question, f" {', '.join(numbers)}")


def _distractor(rng: random.Random, words: Sequence[str]) -> Needles:
    drawn = rng.sample(words, KEY_WORDS + NUM_OTHERS)
    asked, spare = drawn[:KEY_WORDS], drawn[KEY_WORDS:]
    keys = [asked]
    for number, word in enumerate(spare):
        place = number % KEY_WORDS
        keys.append([*asked[:place], word, *asked[place + 1 :]])
    numbers = _numbers(rng, len(keys))
    statements = [_statement(" ".join(one), number) for one, number in zip(keys, numbers, strict=True)]
    return Needles(statements, f" The special number of {' '.join(asked)} is", f" {numbers[0]}")


def _variable(rng: random.Random, words: Sequence[str]) -> Needles:
    names, numbers = rng.sample(words, 6), _numbers(rng, 2)
    chains = [_chain(names[:3], numbers[0]), _chain(names[3:], numbers[1])]
    statements = [statement for pair in zip(*chains, strict=True) for statement in pair]
    return Needles(statements, f" The variables that hold {numbers[0]} are", f" {', '.join(names[:3])}", in_order=True)


def _chain(names: Sequence[str], number: str) -> list[str]:
    return [f" Let {name} be {value}." for name, value in zip(names, [number, *names], strict=False)]


_KINDS: dict[str, Callable[[random.Random, Sequence[str]], Needles]] = {
    "single": _single,
    "multi-key": _multi_key,
    "multi-value": _multi_value,
    "multi-query": _multi_query,
    "distractor": _distractor,
    "variable": _variable,
}
