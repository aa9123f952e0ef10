"""Batches for training: shuffled, packed, mixed, prepared one step ahead, and resumable exactly.

Every choice follows from the seed and a few counters:

    row n of the training     its source: mixture.py
    row m of a source         epoch e = m ÷ rows per epoch; documents shuffled by (seed, source, e); rows too
    its tokens                packing.py, or synthetic.py
    the length of its rows    a function of the number of the batch, where the run warms its length up (optim/schedule.py)

so the state that a checkpoint saves is those counters, and the batches after loading it are bitwise those of a training that was
never interrupted. A thread prepares the next two batches meanwhile; the state is always that of the last batch *given out*.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from byrote.data.mixture import Mixture
from byrote.data.order import permutation
from byrote.data.packing import PACKINGS, PADDING, EpochRows, Row, TokenBatch, shorten, stack_rows
from byrote.data.shards import Shard
from byrote.errors import DataError

AHEAD = 2  # batches prepared before they are asked for
_DOCUMENTS, _ROWS = 2, 3  # streams of random order, beside the mixture's


class Position(NamedTuple):
    """How far a training has read."""

    rows: int  # of all sources together
    drawn: tuple[int, ...]  # of each source
    tokens: int  # that were fed, padding not counted


class Source(Protocol):
    """Endless rows of one source."""

    @property
    def num_rows(self) -> int: ...  # in an epoch
    @property
    def checksum(self) -> str: ...  # equal for sources whose rows are
    def row(self, number: int) -> Row: ...


class Loader:
    """Endless batches from the rows of sources. `next_batch`, `state_dict` and `load_state_dict` are for one thread.

    `row_length`: number of the batch → a divisor of `sequence_length`; the batch's rows are cut to it.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float], *, sequence_length: int, batch_sequences: int, pad_token: int, seed: int,
        row_length: Callable[[int], int] | None = None,
    ) -> None:  # fmt: skip
        self._sources = sources
        self._mixture = Mixture(weights, seed)
        self._sequence_length, self._batch_sequences, self._pad_token = sequence_length, batch_sequences, pad_token
        self._row_length = row_length
        self._identity = {
            "shards": [source.checksum for source in sources],
            "weights": list(weights),
            "sequence_length": sequence_length,
            "seed": seed,
        }
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: deque[Future[tuple[TokenBatch, Position]]] = deque()
        self._given = self._reached = Position(0, (0,) * len(sources), 0)

    @property
    def tokens_seen(self) -> int:
        """Tokens in all batches given out."""
        return self._given.tokens

    @property
    def epochs(self) -> tuple[float, ...]:
        """How often each source has been read."""
        return tuple(drawn / source.num_rows for drawn, source in zip(self._given.drawn, self._sources, strict=True))

    def next_batch(self) -> TokenBatch:
        self._prepare_ahead(AHEAD + 1)
        batch, self._given = self._ahead.popleft().result()
        return batch

    def peek(self, count: int) -> list[TokenBatch]:
        """The `count` batches that come next; they are still to be given out."""
        self._prepare_ahead(count)
        return [self._ahead[place].result()[0] for place in range(count)]

    def _prepare_ahead(self, count: int) -> None:
        while len(self._ahead) < count:
            self._ahead.append(self._thread.submit(self._prepare))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: small, and plain JSON."""
        return {**self._identity, "rows": self._given.rows, "drawn": list(self._given.drawn), "tokens": self._given.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken. Raises DataError if it belongs to other data, another seed or another row length."""
        changed = [name for name, value in self._identity.items() if state.get(name) != value]
        if changed:
            raise DataError(
                f"the saved position in the data does not fit: {', '.join(changed)} changed since. "
                "Resume with the corpus, Python and settings of the first part, or start a new run"
            )
        self._forget()
        self._given = self._reached = Position(state["rows"], tuple(state["drawn"]), state["tokens"])

    def close(self) -> None:
        """End the thread. The loader starts no other."""
        self._forget()
        self._thread.shutdown()

    def _forget(self) -> None:
        """Drop what was prepared; afterwards the thread rests."""
        while self._ahead:
            pending = self._ahead.pop()
            if not pending.cancel():
                pending.exception()

    def _prepare(self) -> tuple[TokenBatch, Position]:
        """The batch after the last prepared one. Only the thread calls this, so batches follow one another."""
        rows, drawn, tokens = self._reached
        counts, cuts = list(drawn), []
        for source in self._mixture.choose(rows, self._batch_sequences):
            cuts.append(self._sources[source].row(counts[source]))
            counts[source] += 1
        batch = stack_rows(cuts, self._sequence_length, self._pad_token)
        if self._row_length is not None:
            batch = shorten(batch, self._row_length(rows // self._batch_sequences))
        fed = int(np.count_nonzero(batch.document_BT.numpy() != PADDING))
        self._reached = Position(rows + self._batch_sequences, tuple(counts), tokens + fed)
        return batch, self._reached


class ShardRows:
    """The endless rows of a shard, epoch after epoch; `packing` is one of PACKINGS."""

    def __init__(self, shard: Shard, sequence_length: int, key: tuple[int, ...], packing: str = "cut") -> None:
        self._shard, self._length, self._key, self._packing = shard, sequence_length, key, packing
        self.checksum = shard.checksum if packing == "cut" else f"{shard.checksum} {packing}"
        self._rows = self._open(0)
        self.num_rows = self._rows.num_rows

    def _open(self, epoch: int) -> EpochRows:
        self._epoch = epoch
        rows = PACKINGS[self._packing](self._shard, self._length, (*self._key, _DOCUMENTS, epoch))
        self._order: NDArray[np.int64] = permutation((*self._key, _ROWS, epoch), rows.num_rows)
        return rows

    def row(self, number: int) -> Row:
        epoch, index = divmod(number, self.num_rows)
        if epoch != self._epoch:
            self._rows = self._open(epoch)
        return self._rows.row(int(self._order[index]))
