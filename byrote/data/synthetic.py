"""Synthetic recall: key–value pairs hidden in meaningless hay, then asked for. What attention is for, and nothing else.

    begin  h h K1 V1 h h h K2 V2 h … K1 V1  K2 V2            h hay, loss only on the values of the questions at the end
                                        ▲▲     ▲▲

A document of L tokens holds L ÷ `pair_every` pairs (at most `max_pairs`) at random places, and ends with as many questions, each for
a pair drawn anew: were every pair asked for once, a model could strike out the values already said, and does. A row of T tokens
is filled with documents of one length, drawn from `shortest`, 2·`shortest` … T: short ones teach the mechanism, long ones stretch
it. To answer, a model has to find the key before it and copy what stood behind it (associative recall; Arora et al. 2023, arXiv
2312.04927, show how attention and its substitutes part on it). Keys, values and hay are ordinary ids of whatever tokenizer the run
has, so the task can be mixed with text, and no id says what it is by itself.

Every choice is a hash of (seed, source, number of the row): nothing is stored, a resumed run reads on bitwise. Training and
validation are disjoint by construction: the set of associations of a document hashes to one or the other (1 in HELD_OUT is
validation), and a draw on the wrong side is drawn again.

Shapes: N documents, L tokens each, P pairs, Q questions.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from byrote.data.config import RecallConfig
from byrote.data.order import counter_hash
from byrote.data.packing import IGNORE, Row
from byrote.errors import ConfigError
from byrote.tokenizer.bpe import Tokenizer

HELD_OUT = 8  # one set of associations in this many is validation's
_LENGTH, _PAIRS, _PLACES, _HAY = range(4)  # streams of random order within a row
_VALIDATION = -1  # stands for the source where validation documents are drawn

Ids = NDArray[np.int64]


class Alphabet(NamedTuple):
    """Which ids play which part; token ids, disjoint."""

    begin: int
    keys: Ids
    values: Ids
    hay: Ids


def alphabet(config: RecallConfig, tokenizer: Tokenizer) -> Alphabet:
    """The lowest ordinary ids, split into keys, values and hay. ConfigError where the vocabulary has too few."""
    special = (tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id)
    ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), special)
    cuts = np.cumsum((config.num_keys, config.num_values, config.num_hay))
    if cuts[-1] > len(ordinary):
        raise ConfigError(
            f"the recall task needs {cuts[-1]} ordinary tokens (recall.num_keys + num_values + num_hay), the vocabulary has "
            f"{len(ordinary)}; raise data.vocab_size or lower these"
        )
    return Alphabet(tokenizer.begin_id, *np.split(ordinary, cuts)[:3])


class RecallRows:
    """The endless rows of one source. There are no epochs: every number is another row, and `num_rows` only sets a scale."""

    num_rows = 1 << 20

    def __init__(self, config: RecallConfig, letters: Alphabet, sequence_length: int, key: tuple[int, ...]) -> None:
        self._config, self._letters, self._length, self._key = config, letters, sequence_length, key
        self._lengths = lengths(config, sequence_length)
        self.checksum = f"recall-1 {config}"

    def row(self, number: int) -> Row:
        bits = counter_hash((*self._key, _LENGTH), np.array([number]))
        length = self._lengths[int(bits[0] % np.uint64(len(self._lengths)))]
        documents = recall_documents(self._config, self._letters, length, self._length // length, (*self._key, number))
        numbers = np.repeat(np.arange(len(documents.tokens_NL), dtype=np.int32), length)
        return Row(documents.tokens_NL.ravel(), documents.targets_NL.ravel(), numbers)


class RecallDocuments(NamedTuple):
    tokens_NL: Ids
    targets_NL: Ids  # the value behind each question's key; IGNORE elsewhere


def recall_documents(
    config: RecallConfig,
    letters: Alphabet,
    length: int,
    count: int,
    key: tuple[int, ...],
    *,
    held_out: bool = False,
    pairs: int | None = None,
    questions: int | None = None,
    depth: float | None = None,
) -> RecallDocuments:
    """`count` documents that `key` decides. With `depth` (0 first, 1 last) the first question asks for a pair that stands there.

    `pairs` and `questions` default to what training uses at this length; with `depth` no two questions are the same. ConfigError where
    they do not fit.
    """
    pairs = num_pairs(config, length) if pairs is None else pairs
    questions = pairs if questions is None else questions
    items = length - 1 - 2 * questions - pairs  # pairs and single hay tokens before the questions
    if not 1 <= questions <= pairs <= min(items, len(letters.keys)):
        raise ConfigError(
            f"{pairs} pairs and {questions} questions do not fit a recall document of {length} tokens with {len(letters.keys)} keys; "
            "make it longer or ask for fewer"
        )
    keys_NP, values_NP = _associations(letters, count, pairs, (*key, _PAIRS), held_out)
    places_NP, asked_NP = _places(count, items, pairs, (*key, _PLACES), depth)
    tokens_NL = letters.hay[_below(len(letters.hay), (*key, _HAY), (count, length))]
    tokens_NL[:, 0] = letters.begin
    rows_N1 = np.arange(count)[:, None]
    starts_NP = 1 + places_NP + np.arange(pairs)  # every pair before takes one token more than an item
    tokens_NL[rows_N1, starts_NP], tokens_NL[rows_N1, starts_NP + 1] = keys_NP, values_NP
    asked_NQ = asked_NP[:, :questions]
    ends_Q = length - 2 * questions + 2 * np.arange(questions)
    tokens_NL[:, ends_Q], tokens_NL[:, ends_Q + 1] = keys_NP[rows_N1, asked_NQ], values_NP[rows_N1, asked_NQ]
    targets_NL = np.full_like(tokens_NL, IGNORE)
    targets_NL[:, ends_Q] = tokens_NL[:, ends_Q + 1]
    return RecallDocuments(tokens_NL, targets_NL)


def validation_documents(
    config: RecallConfig, letters: Alphabet, length: int, count: int, *, seed: int, pairs: int | None = None,
    questions: int | None = None, depth: float | None = None,
) -> RecallDocuments:  # fmt: skip
    """Documents that training never draws, whatever its seed."""
    key = (seed, _VALIDATION, length, 0 if depth is None else 1 + round(depth * 1000))
    return recall_documents(config, letters, length, count, key, held_out=True, pairs=pairs, questions=questions, depth=depth)


def lengths(config: RecallConfig, sequence_length: int) -> list[int]:
    """Lengths of documents in rows of `sequence_length` tokens. ConfigError where they do not fill a row."""
    found = [config.shortest]
    while found[-1] * 2 <= sequence_length:
        found.append(found[-1] * 2)
    if found[-1] != sequence_length:
        raise ConfigError(
            f"data.sequence_length is {sequence_length}; with recall.shortest {config.shortest} it must be that times a power of two, "
            f"such as {found[-1]}"
        )
    return found


def num_pairs(config: RecallConfig, length: int) -> int:
    return max(1, min(length // config.pair_every, config.max_pairs))


def _associations(letters: Alphabet, count: int, pairs: int, key: tuple[int, ...], held_out: bool) -> tuple[Ids, Ids]:
    """Distinct keys and their values, [N, P] each, on the right side of the split."""
    keys_NP, values_NP = np.empty((2, count, pairs), dtype=np.int64)
    missing_M, attempt = np.arange(count), 0
    while len(missing_M):
        order_NK = np.argsort(_bits((*key, attempt, 0), (count, len(letters.keys))), axis=1, kind="stable")
        keys_NP[missing_M] = letters.keys[order_NK[missing_M, :pairs]]
        values_NP[missing_M] = letters.values[_below(len(letters.values), (*key, attempt, 1), (count, pairs))[missing_M]]
        missing_M = missing_M[is_held_out(keys_NP[missing_M], values_NP[missing_M]) != held_out]
        attempt += 1
    return keys_NP, values_NP


def is_held_out(keys_NP: Ids, values_NP: Ids) -> NDArray[np.bool_]:
    """Whether a set of associations belongs to validation: decided by the set alone, not by its order."""
    bits_NP = counter_hash((), (keys_NP << 32) + values_NP)
    return np.bitwise_xor.reduce(bits_NP, axis=1) % np.uint64(HELD_OUT) == 0


def _places(count: int, items: int, pairs: int, key: tuple[int, ...], depth: float | None) -> tuple[Ids, Ids]:
    """(items that are pairs, ascending; the pairs that are asked for), [N, P] each."""
    bits_NI = _bits((*key, 0), (count, items))
    if depth is None:
        return np.sort(np.argsort(bits_NI, axis=1, kind="stable")[:, :pairs], axis=1), _below(pairs, (*key, 1), (count, pairs))
    there = round(depth * (items - 1))
    bits_NI[:, there] = 0  # taken first; two hashes of zero among 64 bits are not to be expected
    places_NP = np.sort(np.argsort(bits_NI, axis=1, kind="stable")[:, :pairs], axis=1)
    order_NP = _bits((*key, 1), (count, pairs))
    order_NP[places_NP == there] = 0
    return places_NP, np.argsort(order_NP, axis=1, kind="stable")


def _bits(key: tuple[int, ...], shape: tuple[int, int]) -> NDArray[np.uint64]:
    return counter_hash(key, np.arange(shape[0] * shape[1]).reshape(shape))


def _below(limit: int, key: tuple[int, ...], shape: tuple[int, int]) -> Ids:
    """Whole numbers below `limit`; its share of 2⁶⁴ makes the bias unmeasurable."""
    return (_bits(key, shape) % np.uint64(limit)).astype(np.int64)
