"""DecodeState: everything a model remembers between two calls on the same text.

Per block the attention latents, per memory layer the tail of the short convolution, and for the whole model one track a token
each of document, position and canonical id. Roll-back cuts n tokens off every part, which is what speculation needs; a snapshot
is a length plus the tails as they were.

Tracks keep every token, tails only the newest: `floor` is the shortest length they can still be cut to. Worked example with
max_rollback 16: after 100 tokens it is 84; roll back 10, append 2, and 92 tokens are held, but the tails reach no further than before.

Shapes: B batch, T new tokens, S all tokens so far, W values a tail keeps.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from byrote.errors import CapacityError, RequestError
from byrote.memory.ngram import NgramHistory
from byrote.model.documents import document_runs, mask_padding

_FIRST_CAPACITY = 256


class Track:
    """A buffer [B, capacity, ...] that grows by doubling and is cut by changing its length."""

    def __init__(self, batch: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.zeros(batch, 0, *shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, new_BT: Tensor) -> Tensor:
        """Add T entries; returns a view [B, S, ...] of all."""
        end = self.length + new_BT.shape[1]
        if end > self.values.shape[1]:
            self._grow(end)
        self.values[:, self.length : end] = new_BT
        self.length = end
        return self.values[:, :end]

    def _grow(self, need: int) -> None:
        capacity = max(_FIRST_CAPACITY, 2 * self.values.shape[1], need)
        bigger = self.values.new_zeros(self.values.shape[0], capacity, *self.values.shape[2:])
        bigger[:, : self.length] = self.values[:, : self.length]
        self.values = bigger

    def all(self) -> Tensor:
        return self.values[:, : self.length]

    def select(self, rows_B: Tensor) -> None:
        self.values = self.values.index_select(0, rows_B)


class Tail:
    """The last `reach` entries before the present, plus `max_rollback` older ones for roll-backs; zeros before the start."""

    def __init__(self, batch: int, shape: tuple[int, ...], reach: int, max_rollback: int, dtype: torch.dtype, device: torch.device) -> None:
        self.reach = reach
        self.values = torch.zeros(batch, reach + max_rollback, *shape, dtype=dtype, device=device)

    def append(self, new_BT: Tensor) -> Tensor:
        """Add T entries; returns [B, reach + T, ...]: what the new entries may look back on, then they themselves."""
        keep = self.values.shape[1]
        whole = torch.cat((self.values, new_BT.to(self.values.dtype)), dim=1)
        self.values = whole[:, -keep:].clone()  # a view would keep a whole prefill in memory
        return whole[:, keep - self.reach :]

    def rollback(self, tokens: int) -> None:
        if tokens:
            self.values = torch.cat((torch.zeros_like(self.values[:, :tokens]), self.values[:, :-tokens]), dim=1)

    def select(self, rows_B: Tensor) -> None:
        self.values = self.values.index_select(0, rows_B)


class Snapshot(NamedTuple):
    length: int
    floor: int
    tails: tuple[Tensor, ...]


class DecodeState:
    """Built by `model.new_state(batch)`. The forward pass appends; the caller rolls back, selects and restores."""

    def __init__(
        self,
        *,
        batch: int,
        latent_dims: tuple[int, ...],
        tail_shapes: dict[int, tuple[int, int, int]],
        ngram_reach: int,
        pad: int,
        dtype: torch.dtype,
        device: torch.device,
        max_rollback: int = 16,
        max_tokens: int | None = None,
    ) -> None:
        self.batch, self.max_rollback, self.max_tokens, self.device = batch, max_rollback, max_tokens, device
        self.latents = [Track(batch, (dim,), dtype, device) for dim in latent_dims]
        self.tails = {slot: Tail(batch, shape[1:], shape[0], max_rollback, dtype, device) for slot, shape in tail_shapes.items()}
        self.documents: Track | None = None  # made when a document number is first given; until then every row is document 0
        self.runs: Track | None = None  # beside it: `documents.document_runs`
        self.positions = Track(batch, (), torch.int64, device)
        self.canonical = Track(batch, (), torch.int64, device)
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
        runs_BS = self.runs.append(document_runs(document_BT, *last))
        return mask_padding(runs_BS, self.documents.append(document_BT.to(torch.int64)))

    def rollback(self, tokens: int) -> None:
        """Forget the last `tokens` tokens (at most `max_rollback` of the longest text there was, since the tails keep no more)."""
        floor = self.floor
        if not 0 <= tokens <= self.length - floor:
            raise RequestError(
                f"cannot roll back {tokens} tokens: {self.length} are held, "
                f"and with max_rollback {self.max_rollback} at least {floor} must stay"
            )
        self._floor = floor
        self._cut(self.length - tokens)
        for tail in self.tails.values():
            tail.rollback(tokens)

    def snapshot(self) -> Snapshot:
        """A point to come back to as long as only appends and roll-backs to later points happen."""
        return Snapshot(self.length, self.floor, tuple(tail.values for tail in self.tails.values()))

    def restore(self, snapshot: Snapshot) -> None:
        if snapshot.length > self.length:
            raise RequestError(f"snapshot of {snapshot.length} tokens, but only {self.length} are held")
        self._cut(snapshot.length)
        self._floor = snapshot.floor
        for tail, values in zip(self.tails.values(), snapshot.tails, strict=True):
            tail.values = values

    def select(self, rows_B: Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may appear more than once."""
        self.batch = rows_B.shape[0]
        parts: list[Track | Tail] = [*self._tracks(), *self.tails.values()]
        for part in parts:
            part.select(rows_B)

    def _tracks(self) -> list[Track]:
        numbered = [track for track in (self.documents, self.runs) if track is not None]
        return [*self.latents, self.positions, self.canonical, *numbered]

    def _cut(self, length: int) -> None:
        for track in self._tracks():
            track.length = min(track.length, length)
