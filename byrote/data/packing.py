"""Documents → rows of equal length, without padding between them.

The documents of an epoch, shuffled, form one line of tokens; row r is cut from it at r·T. Each row takes one token more than it
feeds, the target of its last; neighbouring rows share that token, so every token is a target once an epoch.

    line      ▸ a a a ■ ▸ b b ■ ▸ c c c c ■           ▸ begin, ■ end; T = 5
    row 0     tokens ▸ a a a ■   documents 0 0 0 0 0   targets a a a ■ –
    row 1     tokens ▸ b b ■ ▸   documents 0 0 0 0 1   targets b b ■ – c
    row 2     tokens c c c c ■   documents 0 0 0 0 0   targets c c c ■ –

A document number changes where another document begins, and there the target is IGNORE (–): nothing predicts a begin token.
Numbers count from 0 in each row. A document that a row's end cuts goes on in the next row as if it began there: no context
from the row before, no begin token. The last row of an epoch is filled up with padding, document −1.

Shapes: B rows, T tokens fed from each.
"""

from typing import NamedTuple

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


class Line:
    """All documents of a shard in the order that `key` decides, as one line of tokens; a cut costs what it reads."""

    def __init__(self, shard: Shard, key: tuple[int, ...]) -> None:
        self._shard = shard
        self._order = permutation(key, shard.num_documents)
        lengths = np.diff(shard.offsets)[self._order]
        self._starts = np.concatenate(([0], np.cumsum(lengths)))

    def cut(self, start: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
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


def count_rows(num_tokens: int, sequence_length: int) -> int:
    """Rows in one epoch: as many as give every token but the first a turn as target."""
    return -(-(num_tokens - 1) // sequence_length)


def pack_rows(cuts: list[tuple[NDArray[np.int64], NDArray[np.int32]]], sequence_length: int, pad_token: int) -> TokenBatch:
    """Cuts of up to T + 1 tokens → one batch."""
    tokens = np.full((len(cuts), sequence_length + 1), pad_token, dtype=np.int64)
    documents = np.full((len(cuts), sequence_length + 1), PADDING, dtype=np.int32)
    for row, (cut_tokens, cut_documents) in enumerate(cuts):
        tokens[row, : len(cut_tokens)] = cut_tokens
        documents[row, : len(cut_documents)] = cut_documents
    targets_BT = np.where(documents[:, 1:] == documents[:, :-1], tokens[:, 1:], IGNORE)
    targets_BT[documents[:, :-1] == PADDING] = IGNORE
    feeds = slice(None), slice(0, sequence_length)
    return TokenBatch(*(torch.from_numpy(np.ascontiguousarray(part)) for part in (tokens[feeds], targets_BT, documents[feeds])))
