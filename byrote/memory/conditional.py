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
from byrote.memory.table import DeviceTable


class Rows(NamedTuple):
    """The unique vectors a batch reads, and which read is which."""

    vectors_UE: Tensor  # the autograd leaf
    inverse_BTLN: Tensor  # int64: index into vectors_UE of every read
    rows_U: Tensor  # int64: global row ids, unique and sorted

    def layer(self, slot: int) -> Tensor:
        """[B, T, N·E]: the concatenated rows of memory layer `slot`."""
        inverse_BTN = self.inverse_BTLN[:, :, slot]
        return torch.nn.functional.embedding(inverse_BTN, self.vectors_UE).flatten(2)


class HasHistory(Protocol):
    """What a decode state tells memory: the tokens just before the chunk."""

    def ngram_history(self) -> NgramHistory | None: ...


class Memory:
    """Canonical map, hash and store of all memory layers of one model. Not a module: `.to()` and `state_dict()` pass it by."""

    def __init__(self, hash_: NgramHash, store: DeviceTable, canonical_V: Tensor | None = None) -> None:
        if sum(hash_.num_rows) != store.num_rows:
            raise ConfigError(f"the hash addresses {sum(hash_.num_rows)} rows, the table holds {store.num_rows}")
        self.hash, self.store, self.canonical_V = hash_, store, canonical_V
        starts = torch.tensor((0, *hash_.num_rows[:-1])).cumsum(0)
        self._layer_start_L = starts.to(store.device)
        hash_.to(store.device)

    def canonical(self, tokens_BT: Tensor) -> Tensor:
        """int64 [B, T]: the class of every token."""
        if self.canonical_V is None:
            return tokens_BT
        return self.canonical_V.index_select(0, tokens_BT.flatten()).view(tokens_BT.shape)

    def global_rows(self, tokens_BT: Tensor, document_BT: Tensor | None = None, history: NgramHistory | None = None) -> Tensor:
        """int64 [B, T, L, N]: global ids of every row read."""
        rows_BTLN = self.hash.rows(self.canonical(tokens_BT), document_BT=document_BT, history_BN=history)
        return rows_BTLN + self._layer_start_L[:, None]

    def fetch(self, tokens_BT: Tensor, document_BT: Tensor | None = None, state: HasHistory | None = None) -> Rows:
        """Read what these tokens need. `state` supplies the tokens before them when a text comes in chunks."""
        history = None if state is None else state.ngram_history()
        wanted_BTLN = self.global_rows(tokens_BT, document_BT, history)
        rows_U, inverse = torch.unique(wanted_BTLN, return_inverse=True)
        vectors_UE = self.store.read(rows_U)
        return Rows(vectors_UE.requires_grad_(torch.is_grad_enabled()), inverse.view(wanted_BTLN.shape), rows_U)
