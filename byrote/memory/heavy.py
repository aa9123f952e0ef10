"""The most visited n-grams of a training run, from a sketch of bounded size (Misra and Gries 1982; merging rule: Agarwal et al. 2012).

A table knows how often a row was visited, not by what: many n-grams share a row, and none is written down. The sketch keeps at most
2 · capacity counters. When more are wanted, the (capacity + 1)-th largest count is subtracted from all, and those that fall to zero or
below are dropped. Every n-gram loses at most the sum of what was subtracted (`lost`), and each subtraction takes that much from
capacity + 1 different counters, so

    count − lost ≤ kept ≤ count,       lost ≤ n-grams seen / (capacity + 1)

An n-gram seen more often than `lost` is therefore in the sketch. It is a function of the batches alone, whenever it is saved.

Worked example, capacity 1 (so two counters are held): a b a c gives {a: 2, b: 1}, and with c a third: {a: 2, b: 1, c: 1} → subtract the
second largest, 1 → {a: 1}, lost 1.

An n-gram is one int64: its canonical ids, oldest first, as digits to the base (vocabulary + 1), each id plus one, so that 0 means
"none" and orders do not collide. Orders whose digits would not fit into 63 bits are left out.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor


class TopNgram(NamedTuple):
    text: str
    order: int
    times: int  # visits counted, at most the true number


class HeavyHitters:
    """Counts the suffix n-grams of orders 2..max_order that `ids_BT` hold, up to the bound above."""

    def __init__(self, canonical_vocab: int, max_order: int, capacity: int = 16384) -> None:
        assert capacity > 0, "a sketch without counters counts nothing"
        self.base, self.capacity = canonical_vocab + 1, capacity
        self.orders = [order for order in range(2, max_order + 1) if self.base**order < 2**63]
        self.keys_K = torch.zeros(0, dtype=torch.int64)
        self.counts_K = torch.zeros(0, dtype=torch.int64)
        self.seen, self.lost = 0, 0

    def update(self, ids_BT: Tensor, document_BT: Tensor | None = None) -> None:
        """Count a batch of canonical ids. N-grams do not cross documents (−1 is padding) or rows."""
        found = torch.cat([self._keys(ids_BT, document_BT, order) for order in self.orders])
        new_K, counts_K = np.unique(found.numpy(), return_counts=True)  # its sort is several times as fast as torch's
        self.seen += len(found)
        keys_K, place_K = self.keys_K.numpy(), np.searchsorted(self.keys_K.numpy(), new_K)
        known_K = np.append(keys_K, -1)[place_K] == new_K
        self.counts_K.numpy()[place_K[known_K]] += counts_K[known_K]
        fresh_K = ~known_K
        if fresh_K.any():
            self.keys_K = torch.from_numpy(np.insert(keys_K, place_K[fresh_K], new_K[fresh_K]))
            self.counts_K = torch.from_numpy(np.insert(self.counts_K.numpy(), place_K[fresh_K], counts_K[fresh_K]))
        if len(self.keys_K) > 2 * self.capacity:
            self._shrink()

    def _shrink(self) -> None:
        least = int(self.counts_K.topk(self.capacity + 1).values[-1])
        stay_K = self.counts_K > least
        self.keys_K, self.counts_K, self.lost = self.keys_K[stay_K], self.counts_K[stay_K] - least, self.lost + least

    def _keys(self, ids_BT: Tensor, document_BT: Tensor | None, order: int) -> Tensor:
        """int64: one key for every n-gram of this order."""
        ids_BT = ids_BT.cpu()
        length = ids_BT.shape[1] - order + 1
        if length <= 0:
            return ids_BT.new_zeros(0)
        key_BT = torch.zeros_like(ids_BT[:, :length])
        for back in range(order):
            key_BT = key_BT * self.base + ids_BT[:, back : back + length] + 1
        if document_BT is None:
            return key_BT.flatten()
        parts = [document_BT.cpu()[:, back : back + length] for back in range(order)]
        return key_BT[torch.stack([part == parts[-1] for part in parts]).all(0) & (parts[-1] >= 0)]

    def top(self, count: int) -> list[tuple[tuple[int, ...], int]]:
        """The `count` n-grams with the largest kept counts, as canonical ids; equal counts in the order of their ids."""
        order_K = torch.argsort(self.counts_K, descending=True, stable=True)[:count]
        return [(self._ids(int(self.keys_K[at])), int(self.counts_K[at])) for at in order_K]

    def named(self, count: int, canonical_V: Tensor | None, decode: Callable[[list[int]], str]) -> list[TopNgram]:
        """`top` as text: each class of tokens is written as its first token, in lower case. `decode`: token ids → text."""
        if canonical_V is None:
            return [TopNgram(decode(list(ids)), len(ids), times) for ids, times in self.top(count)]
        token_of = torch.zeros(self.base, dtype=torch.int64)
        backwards_V = torch.arange(len(canonical_V) - 1, -1, -1)
        token_of[canonical_V.cpu()[backwards_V]] = backwards_V  # the last one written stays: the lowest id
        return [TopNgram(decode(token_of[list(ids)].tolist()).lower(), len(ids), times) for ids, times in self.top(count)]

    def _ids(self, key: int) -> tuple[int, ...]:
        digits: list[int] = []
        while key:
            key, digit = divmod(key, self.base)
            digits.append(digit - 1)
        return tuple(reversed(digits))

    def state_dict(self) -> dict[str, Tensor]:
        about = torch.tensor([self.base, self.capacity, self.seen, self.lost])
        return {"ngrams.keys": self.keys_K, "ngrams.counts": self.counts_K, "ngrams.about": about}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken; everything is overwritten, the base and the capacity too."""
        self.keys_K, self.counts_K = (tensors[f"ngrams.{name}"].clone() for name in ("keys", "counts"))
        self.base, self.capacity, self.seen, self.lost = tensors["ngrams.about"].tolist()

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor]) -> Self:
        """To look at only: which orders are counted is not in `state_dict`."""
        sketch = cls(1, 2)
        sketch.load_state_dict(tensors)
        return sketch
