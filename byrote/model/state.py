"""DecodeState: everything a model remembers between two calls on the same text.

Per block what its attention keeps (`attn.new_cache`), per memory layer the tail of the short convolution, per MTP module what it
drafts from, and for the whole model one track a token each of document, place, position and canonical id. Roll-back cuts n tokens
off every part, which is what speculation needs; a snapshot is what each part needs to come back.

All parts are drawers behind one protocol (`Cache`), made of three kinds:

    Track     every token, cut by changing a length            latents, index keys of DSA
    Tail      the newest tokens and `max_rollback` older ones  window, open groups of compressors, convolution
    Entries   fewer entries than tokens, a number per row      compressed entries, their index keys
    Drawers   several of these under names

`floor` is the shortest length that tails can still be cut to. Worked example with max_rollback 16: after 100 tokens it is 84; roll
back 10, append 2, and 92 tokens are held, but the tails reach no further than before.

Shapes: B batch, T new tokens, S all tokens so far, E entries, W values a tail keeps.
"""

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from byrote.errors import CapacityError, RequestError
from byrote.memory.ngram import NgramHistory
from byrote.model.documents import document_runs, mask_padding

_FIRST_CAPACITY = 256
_TAIL_ROOM = 64  # entries that a tail extends by before it is copied to a new buffer


class Cache(Protocol):
    """One drawer. Appending is each kind's own; a snapshot holds until something before it is cut off."""

    def rollback(self, tokens: int) -> None: ...
    def snapshot(self) -> Any: ...
    def restore(self, snapshot: Any) -> None: ...
    def select(self, rows_B: Tensor) -> None: ...
    @property
    def nbytes(self) -> int: ...


class Track:
    """A buffer [B, capacity, ...] that grows by doubling and is cut by changing its length."""

    def __init__(self, batch: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.zeros(batch, 0, *shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, new_BT: Tensor) -> Tensor:
        """Add T entries; returns a view [B, S, ...] of all."""
        self.extend(new_BT.shape[1])
        self.values.narrow(1, self.length - new_BT.shape[1], new_BT.shape[1]).copy_(new_BT)
        return self.all()

    def extend(self, tokens: int) -> None:
        """Make room for entries that the caller writes into `values`."""
        self.length += tokens
        self.values = _grown(self.values, self.length)

    def all(self) -> Tensor:
        return self.values[:, : self.length]

    def rollback(self, tokens: int) -> None:
        self.length = max(self.length - tokens, 0)

    def snapshot(self) -> int:
        return self.length

    def restore(self, snapshot: int) -> None:
        self.length = min(self.length, snapshot)

    def select(self, rows_B: Tensor) -> None:
        self.values = self.values.index_select(0, rows_B)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


class Tail:
    """The last `reach` entries before the present, plus `max_rollback` older ones for roll-backs; zeros before the start."""

    def __init__(self, batch: int, shape: tuple[int, ...], reach: int, max_rollback: int, dtype: torch.dtype, device: torch.device) -> None:
        self.reach = reach
        self.values = torch.zeros(batch, reach + max_rollback, *shape, dtype=dtype, device=device)
        self._buffer, self._extended, self._end = self.values, self.values, reach + max_rollback

    def extend(self, tokens: int) -> tuple[Tensor, int]:
        """Make room for entries that the caller writes: (buffer, place of the first new one); what they look back on lies before it.

        Behind what was extended last, where there is room, and nobody has seen that place: cut, restored or selected values are others.
        """
        keep = self.values.shape[1]
        if self._extended is not self.values or self._end + tokens > self._buffer.shape[1]:
            self._buffer = self.values.new_empty(len(self.values), keep + max(tokens, _TAIL_ROOM), *self.values.shape[2:])
            self._buffer[:, :keep], self._end = self.values, keep
        start, self._end = self._end, self._end + tokens
        self.values = self._extended = self._buffer[:, self._end - keep : self._end]
        return self._buffer, start

    def append(self, new_BT: Tensor) -> Tensor:
        """Add T entries; returns [B, reach + T, ...]: what the new entries may look back on, then they themselves."""
        keep = self.values.shape[1]
        whole = torch.cat((self.values, new_BT.to(self.values.dtype)), dim=1)
        self.values = whole[:, whole.shape[1] - keep :].clone()  # a view would keep a whole prefill in memory
        return whole[:, keep - self.reach :]

    def rollback(self, tokens: int) -> None:
        if tokens:
            self.values = torch.cat((torch.zeros_like(self.values[:, :tokens]), self.values[:, :-tokens]), dim=1)

    def snapshot(self) -> Tensor:
        return self.values

    def restore(self, snapshot: Tensor) -> None:
        self.values = snapshot

    def select(self, rows_B: Tensor) -> None:
        self.values = self.values.index_select(0, rows_B)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


class Entries:
    """Compressed entries [B, capacity, W]. Rows fill at their own pace: row b holds `counts_B[b]`, what lies beyond means nothing."""

    def __init__(self, batch: int, width: int, max_rollback: int, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.zeros(batch, 0, width, dtype=dtype, device=device)
        self.counts_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self._closing = Tail(batch, (), 0, max_rollback, torch.int64, device)  # 1 for a token that brought an entry

    def append(self, new_BEW: Tensor, closes_BT: Tensor, limit: int) -> Tensor:
        """Add each row's entries, one per token that closes a group, in order; rows never hold more than `limit`. Returns all."""
        held_B = self.extend(closes_BT, limit, closes=new_BEW.shape[1] > 0)
        if new_BEW.shape[1]:
            keep_BE = torch.arange(new_BEW.shape[1], device=held_B.device) < (self.counts_B - held_B)[:, None]
            row, entry = keep_BE.nonzero(as_tuple=True)
            self.values[row, held_B[row] + entry] = new_BEW[row, entry].to(self.values.dtype)
        return self.values

    def extend(self, closes_BT: Tensor, limit: int, *, closes: bool) -> Tensor:
        """Make room for entries that the caller writes into `values` behind the returned counts [B]; `closes`: whether there is any."""
        self._closing.append(closes_BT)
        held_B = self.counts_B
        if closes:
            self.values, self.counts_B = _grown(self.values, limit), held_B + closes_BT.sum(1)
        return held_B

    def rollback(self, tokens: int) -> None:
        closing_BT = self._closing.values
        self.counts_B = self.counts_B - closing_BT[:, closing_BT.shape[1] - tokens :].sum(1)
        self._closing.rollback(tokens)

    def snapshot(self) -> tuple[Tensor, Tensor]:
        return self.counts_B, self._closing.snapshot()

    def restore(self, snapshot: tuple[Tensor, Tensor]) -> None:
        self.counts_B, closing = snapshot
        self._closing.restore(closing)

    def select(self, rows_B: Tensor) -> None:
        self.values, self.counts_B = self.values.index_select(0, rows_B), self.counts_B.index_select(0, rows_B)
        self._closing.select(rows_B)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.counts_B.nbytes + self._closing.nbytes


class Drawers:
    """Several caches under names, handled as one."""

    def __init__(self, **parts: Any) -> None:
        self.parts: dict[str, Any] = parts

    def __getitem__(self, name: str) -> Any:
        return self.parts[name]

    def rollback(self, tokens: int) -> None:
        for part in self.parts.values():
            part.rollback(tokens)

    def snapshot(self) -> tuple[Any, ...]:
        return tuple(part.snapshot() for part in self.parts.values())

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        for part, held in zip(self.parts.values(), snapshot, strict=True):
            part.restore(held)

    def select(self, rows_B: Tensor) -> None:
        for part in self.parts.values():
            part.select(rows_B)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


def _grown(values: Tensor, need: int) -> Tensor:
    """The buffer, copied to one of at least twice the capacity where `need` passes it."""
    if need <= values.shape[1]:
        return values
    bigger = values.new_zeros(values.shape[0], max(_FIRST_CAPACITY, 2 * values.shape[1], need), *values.shape[2:])
    bigger[:, : values.shape[1]] = values
    return bigger


class Snapshot(NamedTuple):
    length: int
    floor: int
    parts: tuple[Any, ...]


class DecodeState:
    """Built by `model.new_state(batch)`. The forward pass appends; the caller rolls back, selects and restores.

    `caches`: one per block. `drafts`: one per MTP module that drafts; module k is k + 1 tokens behind, as it needs the token after.
    """

    def __init__(
        self,
        *,
        batch: int,
        caches: Iterable[Cache],
        tails: dict[Hashable, Tail | Track],
        drafts: Iterable[Drawers],
        ngram_reach: int,
        pad: int,
        device: torch.device,
        max_rollback: int = 16,
        max_tokens: int | None = None,
    ) -> None:
        self.batch, self.max_rollback, self.max_tokens, self.device = batch, max_rollback, max_tokens, device
        self.caches, self.tails, self.drafts = list(caches), tails, list(drafts)
        self.documents: Track | None = None  # made when a document number is first given; until then every row is document 0
        self.runs: Track | None = None  # beside it: `documents.document_runs`
        self.places, self.positions, self.canonical = (Track(batch, (), torch.int64, device) for _ in range(3))
        self._ngram_reach, self._pad = ngram_reach, pad
        self._floor = 0  # as of the last cut; see `floor`

    @property
    def length(self) -> int:
        """Tokens appended so far."""
        return self.positions.length

    @property
    def floor(self) -> int:
        """The shortest length that a roll-back may leave."""
        return max(self._floor, self.length - self.max_rollback)

    def check_room(self, batch: int, tokens: int) -> None:
        """Refuse a chunk that does not fit, before anything of it is appended."""
        if batch != self.batch:
            raise RequestError(f"this state holds {self.batch} texts, the tokens have {batch} rows; make one with new_state(batch={batch})")
        if self.max_tokens is not None and self.length + tokens > self.max_tokens:
            raise CapacityError(
                f"{self.length} tokens so far and {tokens} more pass this state's limit of {self.max_tokens}; "
                "start a new state or shorten the prompt"
            )

    def ngram_history(self, *, numbered: bool) -> NgramHistory:
        """The last canonical ids, oldest first; with their documents where the next tokens are `numbered` or earlier ones were."""
        reach, have = self._ngram_reach, min(self._ngram_reach, self.length)
        ids_BN = torch.full((self.batch, reach), self._pad, dtype=torch.int64, device=self.device)
        ids_BN[:, reach - have :] = self.canonical.all()[:, self.length - have :]
        if self.documents is None and not numbered:
            return NgramHistory(ids_BN, None)
        document_BN = torch.full_like(ids_BN, -1)
        document_BN[:, reach - have :] = 0 if self.documents is None else self.documents.all()[:, self.length - have :]
        return NgramHistory(ids_BN, document_BN)

    def fill_documents(self, document_BT: Tensor | None, tokens: int) -> Tensor | None:
        """Append the chunk's documents; returns the runs of all tokens [B, S], or None while every row is one document."""
        if document_BT is None and self.documents is None:
            return None
        if self.documents is None or self.runs is None:
            zeros_BS = torch.zeros(self.batch, self.length, dtype=torch.int64, device=self.device)
            self.documents, self.runs = (Track(self.batch, (), torch.int64, self.device) for _ in range(2))
            self.documents.append(zeros_BS)
            self.runs.append(zeros_BS)
        last = (self.documents.all()[:, -1:], self.runs.all()[:, -1:]) if self.length else (None, None)
        if document_BT is None:
            document_BT = self.documents.all()[:, -1:].expand(self.batch, tokens)
        self.runs.append(document_runs(document_BT, *last))
        self.documents.append(document_BT.to(torch.int64))
        return self.numbered_runs()

    def numbered_runs(self) -> Tensor | None:
        """Runs of all tokens [B, S], −1 where there is padding; None while every row is one document."""
        return None if self.documents is None or self.runs is None else mask_padding(self.runs.all(), self.documents.all())

    def pretend(self) -> None:
        """Count one more token, of the last document, that only drafts have read: to be undone by `restore`."""
        for track in self._tracks():
            last_B1 = track.all()[:, -1:]
            track.append(last_B1 + 1 if track in (self.places, self.positions) else last_B1.clone())

    def rollback(self, tokens: int) -> None:
        """Forget the last `tokens` tokens (at most `max_rollback` of the longest text there was, since the tails keep no more)."""
        floor = self.floor
        if not 0 <= tokens <= self.length - floor:
            raise RequestError(
                f"cannot roll back {tokens} tokens: {self.length} are held, "
                f"and with max_rollback {self.max_rollback} at least {floor} must stay"
            )
        before, self._floor = self.length, floor
        for part in (*self._tracks(), *self.caches, *self.tails.values()):
            part.rollback(tokens)
        for module, draft in enumerate(self.drafts):
            draft.rollback(max(before - 1 - module, 0) - max(self.length - 1 - module, 0))

    def snapshot(self) -> Snapshot:
        """A point to come back to as long as only appends and roll-backs to later points happen."""
        return Snapshot(self.length, self.floor, tuple(part.snapshot() for part in self._parts()))

    def restore(self, snapshot: Snapshot) -> None:
        if snapshot.length > self.length:
            raise RequestError(f"snapshot of {snapshot.length} tokens, but only {self.length} are held")
        for track in self._tracks():
            track.restore(snapshot.length)
        self._floor = snapshot.floor
        for part, held in zip(self._parts(), snapshot.parts, strict=True):
            part.restore(held)

    def select(self, rows_B: Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may appear more than once."""
        self.batch = rows_B.shape[0]
        for part in (*self._tracks(), *self._parts()):
            part.select(rows_B)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, room for growth included."""
        return sum(part.nbytes for part in (*self._tracks(), *self._parts()))

    def _parts(self) -> list[Cache]:
        return [*self.caches, *self.tails.values(), *self.drafts]

    def _tracks(self) -> list[Track]:
        numbered = [track for track in (self.documents, self.runs) if track is not None]
        return [self.places, self.positions, self.canonical, *numbered]
