"""Documents → rows of equal length, in one of two ways.

**cut**: without padding between them.

The documents of an epoch, shuffled, form one line of tokens; row r is cut from it at r·T. Each row takes one token more than it
feeds, the target of its last; neighbouring rows share that token, so every token is a target once an epoch.

    line      ▸ a a a ■ ▸ b b ■ ▸ c c c c ■           ▸ begin, ■ end; T = 5
    row 0     tokens ▸ a a a ■   documents 0 0 0 0 0   targets a a a ■ –
    row 1     tokens ▸ b b ■ ▸   documents 0 0 0 0 1   targets b b ■ – c
    row 2     tokens c c c c ■   documents 0 0 0 0 0   targets c c c ■ –

A document number changes where another document begins, and there the target is IGNORE (–): nothing predicts a begin token.
Numbers count from 0 in each row. A document that a row's end cuts goes on in the next row as if it began there: no context
from the row before, no begin token. The last row of an epoch is filled up with padding, document −1.

**whole**: for long rows, where a cut costs the context that the length is for. No document is cut that fits a row; a longer one gives
full rows and a rest. All pieces, longest first, each go where the least space is left that still takes them (best fit decreasing;
Ding et al. 2024, arXiv 2404.10830, pack so). An end token is never fed, as nothing follows it. What stays empty is padding; on
corpora with many short documents that is well under one per cent.

    T = 5     pieces by fed tokens  5 (▸ c c c c)  4 (▸ a a a)  3 (▸ b b)
    row 0     tokens ▸ c c c c   targets c c c c ■
    row 1     tokens ▸ a a a     targets a a a ■ –
    row 2     tokens ▸ b b       targets b b ■ – –

Shapes: B rows, T tokens fed from each.
"""

import bisect
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from byrote.data.order import permutation
from byrote.data.shards import Shard

IGNORE = -100  # the target that no loss counts
PADDING = -1  # the document of tokens that are none


class TokenBatch(NamedTuple):
    tokens_BT: Tensor  # int64
    targets_BT: Tensor  # int64; IGNORE where the next token is another document's, or padding
    document_BT: Tensor  # int32; PADDING where there is no token


class Row(NamedTuple):
    """Up to T tokens of one row, before padding."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    documents: NDArray[np.int32]


class EpochRows(Protocol):
    """All rows of one pass over a corpus."""

    num_rows: int

    def row(self, index: int) -> Row: ...


class CutRows:
    """The documents of a shard in the order that `key` decides, as one line of tokens that is cut; a row costs what it reads."""

    def __init__(self, shard: Shard, length: int, key: tuple[int, ...]) -> None:
        self._shard, self._length = shard, length
        self._order = permutation(key, shard.num_documents)
        self._starts = np.concatenate(([0], np.cumsum(np.diff(shard.offsets)[self._order])))
        self.num_rows = -(-(shard.num_tokens - 1) // length)  # as many as give every token but the first a turn as target

    def row(self, index: int) -> Row:
        tokens, documents = self._cut(index * self._length, self._length + 1)
        targets = np.full_like(tokens, IGNORE)
        targets[:-1] = np.where(documents[1:] == documents[:-1], tokens[1:], IGNORE)
        return Row(tokens[: self._length], targets[: self._length], documents[: self._length])

    def _cut(self, start: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Tokens `start` to `start + length` and their document numbers, counted from 0; fewer at the end of the line."""
        end = min(start + length, int(self._starts[-1]))
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        tokens = np.empty(end - start, dtype=np.int64)
        documents = np.empty(end - start, dtype=np.int32)
        place, number = start, first
        while place < end:
            stop = min(end, int(self._starts[number + 1]))
            source = int(self._shard.offsets[self._order[number]]) + place - int(self._starts[number])
            tokens[place - start : stop - start] = self._shard.tokens[source : source + stop - place]
            documents[place - start : stop - start] = number - first
            place, number = stop, number + 1
        return tokens, documents


class _Piece(NamedTuple):
    start: int  # in the shard's tokens
    size: int  # tokens fed


class WholeRows:
    """Documents left whole where they fit a row. `key` decides which of equally long pieces stand together."""

    def __init__(self, shard: Shard, length: int, key: tuple[int, ...]) -> None:
        self._shard = shard
        offsets = np.asarray(shard.offsets)
        order = permutation(key, shard.num_documents)
        pieces = [
            _Piece(place, min(length, end - place))
            for begin, end in zip(offsets[order].tolist(), (offsets[order + 1] - 1).tolist(), strict=True)
            for place in range(begin, end, length)
        ]
        self._rows = _best_fit(sorted(pieces, key=lambda piece: -piece.size), length)
        self.num_rows = len(self._rows)  # decided by the sizes alone, so equal for every key

    def row(self, index: int) -> Row:
        pieces = self._rows[index]
        tokens, targets = (
            np.concatenate([self._shard.tokens[start + ahead : start + ahead + size] for start, size in pieces]).astype(np.int64)
            for ahead in (0, 1)
        )
        return Row(tokens, targets, np.repeat(np.arange(len(pieces), dtype=np.int32), [piece.size for piece in pieces]))


PACKINGS: dict[str, type[CutRows] | type[WholeRows]] = {"cut": CutRows, "whole": WholeRows}


def _best_fit(pieces: list[_Piece], length: int) -> list[list[_Piece]]:
    """Each piece into the row with the least space that still takes it, or into a new one. Pieces come longest first."""
    rows: list[list[_Piece]] = []
    spaces: list[int] = []  # those that some row has, ascending
    rows_with: dict[int, list[int]] = {}
    for piece in pieces:
        at = bisect.bisect_left(spaces, piece.size)
        if at == len(spaces):
            row, space = len(rows), length
            rows.append([])
        else:
            space = spaces[at]
            row = rows_with[space].pop()
            if not rows_with[space]:
                spaces.pop(at)
        rows[row].append(piece)
        left = space - piece.size
        if left and not rows_with.setdefault(left, []):
            bisect.insort(spaces, left)
        if left:
            rows_with[left].append(row)
    return rows


def stack_rows(rows: list[Row], length: int, pad_token: int) -> TokenBatch:
    """Rows of up to T tokens → one batch, padded on the right."""
    parts = []
    for name, filler in (("tokens", pad_token), ("targets", IGNORE), ("documents", PADDING)):
        part_BT = np.full((len(rows), length), filler, dtype=getattr(rows[0], name).dtype)
        for place, row in enumerate(rows):
            values = getattr(row, name)
            part_BT[place, : len(values)] = values
        parts.append(torch.from_numpy(part_BT))
    return TokenBatch(*parts)


def shorten(batch: TokenBatch, length: int) -> TokenBatch:
    """The same tokens in rows of `length`, a divisor of T: [B, T] → [B · T ÷ length, length]. Nothing looks across the new borders."""
    return TokenBatch(*(part.reshape(-1, length) for part in batch))
