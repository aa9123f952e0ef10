"""Which keys: `Spans`, what each query may see, and `Chosen`, what it will look at.

Whatever a query may see is an interval of the keys of its row, since documents are runs:

    causal        [start of its document, its own place + 1)
    window of w   [the later of that start and place + 1 − w, its own place + 1)
    compressed    entries of a document lie side by side: [its first entry, first entry + (position + 1) // m)
    padding       [0, 0)

Shapes: B batch, T queries, S keys, K slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """Query t of a row may see the keys [first, end) of that row; equal ends: none."""

    first_BT: Tensor  # int64
    end_BT: Tensor  # int64

    def mask(self, keys: int) -> Tensor:
        """bool [B, T, S]: for references and short chunks."""
        key_S = torch.arange(keys, device=self.first_BT.device)
        return (key_S >= self.first_BT[..., None]) & (key_S < self.end_BT[..., None])

    def part(self, queries: slice) -> "Spans":
        """These queries."""
        return Spans(self.first_BT[:, queries], self.end_BT[:, queries])


class Chosen(NamedTuple):
    """Up to K keys a query, each at most once. Slots that are not valid hold 0."""

    index_BTK: Tensor  # int64
    valid_BTK: Tensor  # bool

    @staticmethod
    def everything(spans: Spans, width: int) -> "Chosen":
        """All keys of spans that are at most `width` wide."""
        index_BTK = spans.first_BT[..., None] + torch.arange(width, device=spans.first_BT.device)
        valid_BTK = index_BTK < spans.end_BT[..., None]
        return Chosen(index_BTK.masked_fill(~valid_BTK, 0), valid_BTK)

    def joined(self, other: "Chosen", offset: int) -> "Chosen":
        """Both sets side by side, for keys laid one behind the other; those of `other` begin at `offset`."""
        shifted = (other.index_BTK + offset).masked_fill(~other.valid_BTK, 0)
        return Chosen(torch.cat((self.index_BTK, shifted), dim=-1), torch.cat((self.valid_BTK, other.valid_BTK), dim=-1))

    def part(self, queries: slice) -> "Chosen":
        """These queries."""
        return Chosen(self.index_BTK[:, queries], self.valid_BTK[:, queries])

    def gather(self, values_BSX: Tensor) -> Tensor:
        """[B, T, K, X]."""
        row_B11 = torch.arange(values_BSX.shape[0], device=values_BSX.device)[:, None, None]
        return values_BSX[row_B11, self.index_BTK]
