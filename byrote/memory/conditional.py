"""Conditional memory, whole: token ids in, the rows that these tokens read out.

    tokens → canonical ids → n-gram rows of every memory layer → global row ids → unique rows → one read of the store

The model receives the result as `Rows` and computes with it; it never calls a store. Gradients end in `Rows.vectors_UE`, the
one autograd leaf, so what an optimizer sees is as large as the batch and not as the table.

Shapes: B batch, T tokens, L memory layers, N rows per token and layer, U unique rows of the batch, E numbers in a row.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from byrote.errors import ConfigError
from byrote.memory.ngram import NgramHash, NgramHistory
from byrote.memory.table import Slab, TableStore, Ticket


class Rows(NamedTuple):
    """The unique vectors a batch reads, and which read is which."""

    vectors_UE: Tensor  # the autograd leaf
    inverse_BTLN: Tensor  # int64: index into vectors_UE of every read
    rows_U: Tensor  # int64: global row ids, unique and sorted
    slab: Slab | None = None  # in training: the rows with their state, so that the optimizer need not read them again

    def layer(self, slot: int) -> Tensor:
        """[B, T, N·E]: the concatenated rows of memory layer `slot`."""
        inverse_BTN = self.inverse_BTLN[:, :, slot]
        return torch.nn.functional.embedding(inverse_BTN, self.vectors_UE).flatten(2)


class PendingRows(NamedTuple):
    """Rows that are being read."""

    ticket: Ticket
    inverse_BTLN: Tensor
    rows_U: Tensor

    def wait(self) -> Rows:
        """As of after every update before this call."""
        slab = self.ticket.wait()
        return Rows(_leaf(slab.vectors_UE), self.inverse_BTLN.to(slab.vectors_UE.device), self.rows_U, slab)


class HasHistory(Protocol):
    """What a decode state tells memory: the tokens just before the chunk."""

    def ngram_history(self, *, numbered: bool) -> NgramHistory: ...


class Memory:
    """Canonical map, hash and store of all memory layers of one model. Not a module: `.to()` and `state_dict()` pass it by."""

    def __init__(self, hash_: NgramHash, store: TableStore, *, vocab_size: int, needs_canonical: bool = False, pad_token: int = 0) -> None:
        if sum(hash_.num_rows) != store.num_rows:
            raise ConfigError(f"the hash addresses {sum(hash_.num_rows)} rows, the table holds {store.num_rows}")
        self.hash, self.store = hash_, store
        self.canonical_V: Tensor | None = None
        self._vocab_size, self._needs_canonical, self._pad_token = vocab_size, needs_canonical, pad_token
        layer_start_L = torch.tensor((0, *hash_.num_rows[:-1]), device="cpu").cumsum(0)
        self._starts_LN = hash_.offsets_LN + layer_start_L[:, None].to(hash_.offsets_LN.device)
        self.to(store.device)

    def to(self, device: torch.device | str) -> "Memory":
        """Rows shall land on `device`. Map and hash constants go where the store wants rows named. Returns self."""
        self.store.to(device)
        index_device = self.store.index_device
        self.hash.to(index_device)
        self._starts_LN = self._starts_LN.to(index_device)
        self.canonical_V = None if self.canonical_V is None else self.canonical_V.to(index_device)
        return self

    @property
    def rows_per_token(self) -> tuple[int, int]:
        """(memory layers, rows read per layer)."""
        return len(self.hash.layers), (self.hash.max_order - 1) * self.hash.num_heads

    def set_canonical(self, canonical_V: Tensor) -> None:
        """Give the tokenizer's map, int64 [V]: token id → class (`memory.canonical.canonical_ids`)."""
        if canonical_V.shape != (self._vocab_size,):
            raise ConfigError(f"the canonical map has shape {tuple(canonical_V.shape)}; the model's vocabulary needs ({self._vocab_size},)")
        low, high = torch.aminmax(canonical_V)
        if int(low) < 0 or int(high) >= self.hash.canonical_vocab:
            raise ConfigError(
                f"the canonical map holds classes {int(low)}..{int(high)}, the hash is made for 0..{self.hash.canonical_vocab - 1}"
            )
        self.canonical_V = canonical_V.to(self.store.index_device, torch.int64)
        self.hash.pad = int(canonical_V[self._pad_token])

    def canonical(self, tokens_BT: Tensor) -> Tensor:
        """int64 [B, T]: the class of every token."""
        if self.canonical_V is None:
            if self._needs_canonical:
                raise ConfigError(
                    "engram.canonical_vocab is set but the map is not: call model.memory.set_canonical(map) with the tokenizer's classes"
                )
            return tokens_BT
        classes = self.canonical_V.index_select(0, tokens_BT.flatten().to(self.canonical_V.device))
        return classes.view(tokens_BT.shape).to(tokens_BT.device)

    def global_rows(self, tokens_BT: Tensor, document_BT: Tensor | None = None, history: NgramHistory | None = None) -> Tensor:
        """int64 [B, T, L, N]: global ids of every row read."""
        where = self.store.index_device
        document_BT = None if document_BT is None else document_BT.to(where)
        history = None if history is None else history.to(where)
        ids_BT = self.canonical(tokens_BT.to(where))
        return self.hash.rows(ids_BT, document_BT=document_BT, history_BN=history, starts_LN=self._starts_LN)

    def fetch(self, tokens_BT: Tensor, document_BT: Tensor | None = None, state: HasHistory | None = None) -> Rows:
        """Read what these tokens need. `state` supplies the tokens before them when a text comes in chunks."""
        rows_U, inverse_BTLN = self._wanted(tokens_BT, document_BT, state)
        slab = self.store.gather(rows_U) if torch.is_grad_enabled() else None
        vectors_UE = self.store.read(rows_U) if slab is None else slab.vectors_UE
        return Rows(_leaf(vectors_UE), inverse_BTLN.to(vectors_UE.device), rows_U, slab)

    def prefetch(self, tokens_BT: Tensor, document_BT: Tensor | None = None, state: HasHistory | None = None) -> PendingRows:
        """Begin to read what these tokens need; `wait()` gives what `fetch` would give then."""
        rows_U, inverse_BTLN = self._wanted(tokens_BT, document_BT, state)
        return PendingRows(self.store.prefetch(rows_U), inverse_BTLN, rows_U)

    def _wanted(self, tokens_BT: Tensor, document_BT: Tensor | None, state: HasHistory | None) -> tuple[Tensor, Tensor]:
        """(unique rows, which of them each read is)."""
        history = None if state is None else state.ngram_history(numbered=document_BT is not None)
        rows_U, inverse_BTLN = torch.unique(self.global_rows(tokens_BT, document_BT, history), return_inverse=True)
        return rows_U, inverse_BTLN


def _leaf(vectors_UE: Tensor) -> Tensor:
    """Gradients end here; the slab beside it stays free of them."""
    return vectors_UE.detach().requires_grad_(torch.is_grad_enabled())
