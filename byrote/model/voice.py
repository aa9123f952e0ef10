"""Packs in one call of the model: which rows each pack reads, for which sequences, and what it adds before a block.

    listen(packs, …) → voices        before the first block: every pack in use reads its rows, once for all its layers
    voice.speak(block, streams, …)   before each block: the streams with this pack's memory added, and how far its gates opened

A pack reads token ids through its own canonical map and keeps its own history, so packs of different hashes stand side by side. What
it must remember of a text lies in the text's `DecodeState` (`new_tails`): its canonical ids, and the tail of each convolution.

Shapes: B batch, T tokens, S tokens so far, R streams, D model, E numbers of all rows of a token, C sequences that use a pack,
N n-gram history.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from byrote.errors import RequestError
from byrote.memory.conditional import Memory, Rows
from byrote.memory.ngram import NgramHistory
from byrote.model.state import DecodeState, Tail, Track

if TYPE_CHECKING:
    from byrote.model.batch import Batch
    from byrote.model.pack import Pack

_OTHER_TEXT = "A state remembers a text for the packs it was made for: start a new one with model.new_state()"


class Voice(NamedTuple):
    """A pack in one call of the model: what it read, and for whom."""

    name: str
    pack: "Pack"
    rows: Rows
    sequences_C: Tensor | None  # indices of the sequences it speaks to; None: all

    def speak(self, block: int, streams_BTRD: Tensor, batch: "Batch") -> tuple[Tensor, Tensor | None]:
        """(the streams before block `block` with this pack's memory added, its gates [B, T, R]: NaN for sequences it does not speak to;
        None where it has no layer)."""
        engram = self.pack.engram(block)
        if engram is None:
            return streams_BTRD, None
        tail = None if batch.state is None else batch.state.tails.get((self.name, block))
        assert tail is None or isinstance(tail, Tail)
        documents_BS = None if batch.document_BT is None else batch.keys_document_BS
        rows_CTE = self.rows.layer(engram.slot)
        if self.sequences_C is None:
            return engram.speak(streams_BTRD, rows_CTE, document_BS=documents_BS, extend=None if tail is None else tail.append)
        spoken_CTRD, gates_CTR = engram.speak(
            streams_BTRD[self.sequences_C],
            rows_CTE,
            document_BS=None if documents_BS is None else documents_BS[self.sequences_C],
            extend=None if tail is None else lambda normed_CTRD: self._extend_some(tail, normed_CTRD, len(streams_BTRD)),
        )
        gates_BTR = gates_CTR.new_full((len(streams_BTRD), *gates_CTR.shape[1:]), float("nan"))
        return streams_BTRD.index_copy(0, self.sequences_C, spoken_CTRD), gates_BTR.index_copy(0, self.sequences_C, gates_CTR)

    def _extend_some(self, tail: Tail, normed_CTRD: Tensor, sequences: int) -> Tensor:
        """Others of the batch remember zeros: this pack has said nothing to them."""
        assert self.sequences_C is not None
        normed_BTRD = normed_CTRD.new_zeros(sequences, *normed_CTRD.shape[1:]).index_copy(0, self.sequences_C, normed_CTRD)
        return tail.append(normed_BTRD)[self.sequences_C]


class _Past(NamedTuple):
    """What `Memory.fetch` asks of a decode state, as one pack remembers it."""

    state: DecodeState
    ids: Track  # the pack's canonical ids so far
    memory: Memory
    sequences_C: Tensor | None

    def ngram_history(self, *, numbered: bool) -> NgramHistory:
        reach = self.memory.hash.max_order - 1
        have = min(reach, self.ids.length)
        ids_BN = torch.full((self.state.batch, reach), self.memory.hash.pad, dtype=torch.int64, device=self.ids.values.device)
        ids_BN[:, reach - have :] = self.ids.all()[:, self.ids.length - have :]
        documents = self.state.documents
        if documents is None and not numbered:
            return NgramHistory(self._some(ids_BN), None)
        document_BN = torch.full_like(ids_BN, -1)
        document_BN[:, reach - have :] = 0 if documents is None else documents.all()[:, self.ids.length - have :]
        return NgramHistory(self._some(ids_BN), self._some(document_BN))

    def _some(self, x_BN: Tensor) -> Tensor:
        return x_BN if self.sequences_C is None else x_BN[self.sequences_C]


def new_tails(
    packs: Mapping[str, "Pack"], batch: int, *, dtype: torch.dtype, device: torch.device, max_rollback: int
) -> dict[Hashable, Tail | Track]:
    """What the packs will remember of a text, as drawers of its state."""
    tails: dict[Hashable, Tail | Track] = {}
    for name, pack in packs.items():
        tails[name, "ids"] = Track(batch, (), torch.int64, device)
        for block in pack.config.layers if pack.config.conv_kernel else ():
            reach = (pack.config.conv_kernel - 1) * pack.config.dilation
            tails[name, block] = Tail(batch, (pack.streams, pack.dim), reach, max_rollback, dtype, device)
    return tails


def listen(
    packs: Mapping[str, "Pack"],
    chosen: Sequence[Iterable[str]] | None,
    tokens_BT: Tensor,
    document_BT: Tensor | None,
    state: DecodeState | None,
) -> tuple[Voice, ...]:
    """Read the rows of every pack that somebody in the batch uses. `chosen`: the packs of each sequence; None: all of them, everywhere."""
    users = dict.fromkeys(packs) if chosen is None else _users(packs, [set(names) for names in chosen], tokens_BT)
    voices = []
    for name, sequences_C in users.items():
        memory, past = packs[name].memory, None
        if state is not None:
            ids = state.tails.get((name, "ids"))
            if not isinstance(ids, Track) or ids.length != state.length:
                raise RequestError(f"the pack {name!r} was attached after this text had begun. {_OTHER_TEXT}")
            past = _Past(state, ids, memory, sequences_C)
        some = slice(None) if sequences_C is None else sequences_C
        rows = memory.fetch(tokens_BT[some], None if document_BT is None else document_BT[some], past)
        voices.append(Voice(name, packs[name], rows, sequences_C))
    if state is not None:
        _remember(packs, tokens_BT, state)
    return tuple(voices)


def _users(packs: Mapping[str, "Pack"], chosen: list[set[str]], tokens_BT: Tensor) -> dict[str, Tensor | None]:
    """Pack → its sequences, for those that have any."""
    unknown = sorted(set().union(*chosen) - set(packs))
    if unknown or len(chosen) != len(tokens_BT):
        raise RequestError(
            f"packs names {unknown[0]!r}, which is not attached; attached are: {', '.join(packs) or 'none'}"
            if unknown
            else f"packs has {len(chosen)} entries, the batch {len(tokens_BT)} sequences; give the names of each sequence's packs"
        )
    users: dict[str, Tensor | None] = {}
    for name in packs:
        sequences = [number for number, names in enumerate(chosen) if name in names]
        if len(sequences) == len(tokens_BT):
            users[name] = None
        elif sequences:
            users[name] = torch.tensor(sequences, device=tokens_BT.device)
    return users


def _remember(packs: Mapping[str, "Pack"], tokens_BT: Tensor, state: DecodeState) -> None:
    """Every pack the state knows keeps the ids, so that it may be chosen later in the text."""
    for name, pack in packs.items():
        ids = state.tails.get((name, "ids"))
        if isinstance(ids, Track) and ids.length == state.length:
            ids.append(pack.memory.canonical(tokens_BT))
