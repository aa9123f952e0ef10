"""Which documents are held back for validation: decided by their names alone, so the same on every machine.

    limit = the smaller of `validation_bytes` and a tenth of the corpus
    1. Put the documents in order of SHA-256(name as UTF-8).
    2. Take them in that order while their total stays within the limit; the first that would pass it ends the list. If that
       is the very first, it is taken alone. A document that is more than half of its source is passed over.
    3. If rule 2 finds none (the corpus is one big file), the end of the first is held back instead: `limit` bytes from the
       next start of a line on. The rest of it is trained on.

Adding a document to a corpus moves at most a few others. Copies of one text under two names are not detected: one of them can
be trained on while the other validates.

Only the candidates are kept while the corpus streams by: a heap of the smallest hashes, cut back to the first that passes
`validation_bytes`, so memory is that many bytes and one document.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from byrote.data.sources import Document
from byrote.errors import DataError

LARGEST_SHARE = 10  # validation is at most one part in this many
RULE = "documents in order of SHA-256(name) while their total stays within the smaller of {limit:,} bytes and a tenth of the corpus"


class Place(NamedTuple):
    """Where a document stands: the number of its source, and its number within."""

    source: int
    number: int


class Split(NamedTuple):
    """The documents held back, and how to tell them from the others when the corpus is read again."""

    validation: tuple[Document, ...]
    held: frozenset[Place]  # documents that are not trained on at all
    cut: dict[Place, int]  # documents trained on only up to this character
    training_bytes: tuple[int, ...]  # per source


class _Candidate(NamedTuple):
    key: tuple[int, int, int]  # negated (hash, source, number): the heap gives back the largest hash first
    num_bytes: int
    document: Document

    @property
    def place(self) -> Place:
        return Place(-self.key[1], -self.key[2])


def split_documents(sources: Iterable[Iterable[Document]], validation_bytes: int) -> Split:
    """Read every source once and choose what is held back. Raises DataError where a source would have nothing left to train on."""
    candidates: list[_Candidate] = []
    held_bytes, totals = 0, []
    for source, documents in enumerate(sources):
        totals.append(0)
        for number, document in enumerate(documents):
            size = len(document.text.encode("utf-8"))
            totals[-1] += size
            heapq.heappush(candidates, _Candidate((-_order(document.name), -source, -number), size, document))
            held_bytes += size
            while held_bytes - candidates[0].num_bytes > validation_bytes:
                held_bytes -= heapq.heappop(candidates).num_bytes
    in_order = sorted(candidates, key=lambda candidate: candidate.key, reverse=True)
    return _choose(in_order, min(validation_bytes, sum(totals) // LARGEST_SHARE), totals)


def training_documents(documents: Iterable[Document], source: int, split: Split) -> Iterator[Document]:
    """The documents of one source that are not held back, in the order they are read."""
    for number, (name, text) in enumerate(documents):
        place = Place(source, number)
        if place not in split.held:
            yield Document(name, text[: split.cut.get(place)])


def _order(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest(), "big")


def _choose(in_order: list[_Candidate], limit: int, totals: list[int]) -> Split:
    if limit == 0 or not in_order:
        return Split((), frozenset(), {}, tuple(totals))
    taken: list[_Candidate] = []
    left = limit
    for candidate in in_order:
        if candidate.num_bytes * 2 > totals[candidate.place.source]:
            continue
        left -= candidate.num_bytes
        if left >= 0 or not taken:
            taken.append(candidate)
        if left < 0:
            break
    return _hold(taken, totals) if taken else _cut_end(in_order[0], limit, totals)


def _hold(taken: list[_Candidate], totals: list[int]) -> Split:
    training = list(totals)
    for candidate in taken:
        training[candidate.place.source] -= candidate.num_bytes
    _check_something_left(training)
    return Split(tuple(one.document for one in taken), frozenset(one.place for one in taken), {}, tuple(training))


def _cut_end(one: _Candidate, limit: int, totals: list[int]) -> Split:
    name, text = one.document
    tail = text.encode("utf-8")[-limit:].decode("utf-8", "ignore")  # half a character at the cut is left out
    tail = tail[tail.find("\n") + 1 :] or tail
    training = list(totals)
    training[one.place.source] -= len(tail.encode("utf-8"))
    _check_something_left(training)
    return Split((Document(f"{name}#end", tail),), frozenset(), {one.place: len(text) - len(tail)}, tuple(training))


def _check_something_left(training: list[int]) -> None:
    empty = [str(source) for source, num_bytes in enumerate(training) if num_bytes == 0]
    if empty:
        raise DataError(
            f"all of source {', '.join(empty)} (counted from 0) is held back for validation, nothing of it is left to train on; "
            "lower data.validation_bytes or give more text"
        )
