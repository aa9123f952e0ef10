"""Canonical token ids → rows of the memory table (Engram, arXiv 2601.07372 §2.2; constants of the released hash).

The suffix n-gram that ends at position t is (x[t−n+1] … x[t]), for n = 2 .. max_order. Each layer hashes it with its own odd
multipliers, and each of `num_heads` heads folds the same mix into a table of its own prime size:

    mix_n(t)   = XOR over i < n of ( x[t−i] · m_i )          int64; no product overflows, because m < 2⁶³ / vocabulary
    row_n,k(t) = mix_n(t) mod p_n,k  +  offset_n,k           offsets: exclusive prefix sums of the primes in (order, head) order

Worked example (layer 0, vocabulary 1000, primes 1009 1013 | 1019 1021, pad 2): the text 5 17 999 reads rows 37 1459 2818 3986
at position 0, where the older slots hold the pad class, and 657 1329 2971 3515 at position 2.

Older slots that lie before the start of a document hold the pad class, and so do all slots older than those.

Shapes: B batch, T tokens, L memory layers, N rows per token and layer = (max_order − 1) · num_heads.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from byrote.errors import ConfigError
from byrote.kernels.ngram_hash import hash_rows

_LAYER_SEED_STEP = 10_007  # the released hash seeds layer ℓ with seed + 10007·ℓ


def is_prime(number: int) -> bool:
    """Deterministic Miller–Rabin test, exact below 3.3e24."""
    if number < 2:
        return False
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if any(number % base == 0 for base in bases):
        return number in bases
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(_passes(number, base, odd, twos) for base in bases)


def _passes(number: int, base: int, odd: int, twos: int) -> bool:
    power = pow(base, odd, number)
    if power in (1, number - 1):
        return True
    for _ in range(twos - 1):
        power = power * power % number
        if power == number - 1:
            return True
    return False


def _free_primes(start: int, taken: set[int]) -> Iterator[int]:
    number = start
    while True:
        number += 1
        if number not in taken and is_prime(number):
            taken.add(number)
            yield number


def table_primes(rows_per_order: int | Sequence[int], max_order: int, num_heads: int, layers: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Sub-table sizes, one tuple a layer in (order, head) order.

    Walks layers, orders, heads; each (layer, order) starts its search at the size aimed at, minus one, and takes primes that no
    earlier head of any layer holds.
    """
    sizes = (rows_per_order,) * (max_order - 1) if isinstance(rows_per_order, int) else tuple(rows_per_order)
    if len(sizes) != max_order - 1:
        raise ConfigError(f"rows_per_order needs one size, or one per order 2..{max_order} ({max_order - 1}); got {len(sizes)}")
    taken: set[int] = set()
    found = []
    for _ in layers:
        layer_primes: list[int] = []
        for size in sizes:
            search = _free_primes(size - 1, taken)
            layer_primes += [next(search) for _ in range(num_heads)]
        found.append(tuple(layer_primes))
    return tuple(found)


def hash_multipliers(canonical_vocab: int, max_order: int, layer: int, seed: int) -> tuple[int, ...]:
    """The odd multipliers of one layer, one per n-gram position, small enough that (vocab − 1) · m < 2⁶³."""
    bound = max(1, ((2**63 - 1) // canonical_vocab) // 2)
    draws = np.random.default_rng(seed + _LAYER_SEED_STEP * layer).integers(0, bound, size=max_order, dtype=np.int64)
    return tuple(int(draw) * 2 + 1 for draw in draws)


class NgramHistory(NamedTuple):
    """What an n-gram may need of the tokens before a chunk: their canonical ids and documents, oldest first."""

    ids_BN: Tensor  # int64 [B, max_order − 1]; the pad class where there was no token
    document_BN: Tensor | None  # documents of those tokens; None: all of the chunk's own document

    def to(self, device: torch.device) -> "NgramHistory":
        return NgramHistory(self.ids_BN.to(device), None if self.document_BN is None else self.document_BN.to(device))


class NgramHash:
    """The hash of all memory layers, as pure integer arithmetic on canonical ids.

    `layers` are hash ids (they seed the multipliers), `pad` is a canonical id. Source: papers.md §1.3–1.4.
    """

    def __init__(
        self,
        *,
        canonical_vocab: int,
        rows_per_order: int | Sequence[int],
        max_order: int,
        num_heads: int,
        layers: Sequence[int],
        pad: int,
        seed: int = 0,
    ) -> None:
        if not 0 <= pad < canonical_vocab:
            raise ConfigError(f"pad class {pad} lies outside the canonical vocabulary [0, {canonical_vocab})")
        self.canonical_vocab, self.max_order, self.num_heads, self.pad = canonical_vocab, max_order, num_heads, pad
        self.layers = tuple(layers)
        self.primes = table_primes(rows_per_order, max_order, num_heads, self.layers)
        self.multipliers = tuple(hash_multipliers(canonical_vocab, max_order, layer, seed) for layer in self.layers)
        self._multipliers_LM = torch.tensor(self.multipliers, dtype=torch.int64, device="cpu")
        self._primes_LNH = torch.tensor(self.primes, dtype=torch.int64, device="cpu").view(len(self.layers), max_order - 1, num_heads)
        exclusive = [np.cumsum((0, *primes[:-1])) for primes in self.primes]
        self.offsets_LN = torch.from_numpy(np.stack(exclusive).astype(np.int64))

    @property
    def num_rows(self) -> tuple[int, ...]:
        """Rows of each layer's table."""
        return tuple(sum(primes) for primes in self.primes)

    def to(self, device: torch.device | str) -> "NgramHash":
        """Move the constants; returns self."""
        self._multipliers_LM = self._multipliers_LM.to(device)
        self._primes_LNH = self._primes_LNH.to(device)
        self.offsets_LN = self.offsets_LN.to(device)
        return self

    def rows(
        self,
        ids_BT: Tensor,
        *,
        document_BT: Tensor | None = None,
        history_BN: Tensor | NgramHistory | None = None,
        starts_LN: Tensor | None = None,
    ) -> Tensor:
        """int64 [B, T, L, N]: the rows each token reads, with offsets inside its layer's table (or counted from `starts_LN`).

        `history_BN` holds the canonical ids just before the chunk, oldest first (a plain tensor: of the same document).
        Raises ConfigError when an id lies outside [0, canonical_vocab), or a history has other than max_order − 1 ids a row.
        """
        history = self._history(history_BN, ids_BT)
        ids_BS = torch.cat((history.ids_BN, ids_BT), dim=1)
        rows_BTLN = hash_rows(
            ids_BS,
            _documents(ids_BT, document_BT, history),
            pad=self.pad,
            vocab=self.canonical_vocab,
            multipliers_LM=self._multipliers_LM,
            primes_LNH=self._primes_LNH,
            starts_LN=self.offsets_LN if starts_LN is None else starts_LN,
        )
        if rows_BTLN is None:
            low, high = torch.aminmax(ids_BS)
            raise ConfigError(
                f"canonical ids span {int(low)}..{int(high)}, allowed are 0..{self.canonical_vocab - 1}: "
                "map tokens through the canonical table first"
            )
        return rows_BTLN

    def _history(self, history: Tensor | NgramHistory | None, ids_BT: Tensor) -> NgramHistory:
        wanted = (ids_BT.shape[0], self.max_order - 1)
        if history is None:
            return NgramHistory(ids_BT.new_full(wanted, self.pad), None)
        history = history if isinstance(history, NgramHistory) else NgramHistory(history, None)
        if history.ids_BN.shape != wanted:
            raise ConfigError(
                f"the history has shape {tuple(history.ids_BN.shape)}; {wanted} is needed: the last {wanted[1]} ids of each row"
            )
        return history


def _documents(ids_BT: Tensor, document_BT: Tensor | None, history: NgramHistory) -> Tensor | None:
    """Documents of history and chunk behind one another; where one of them names none, it belongs to the other's nearest."""
    if not ids_BT.shape[1] or (document_BT is None and history.document_BN is None):
        return None
    if document_BT is None:
        assert history.document_BN is not None
        document_BT = history.document_BN[:, -1:].expand(ids_BT.shape)
    before_BN = document_BT[:, :1].expand(-1, history.ids_BN.shape[1]) if history.document_BN is None else history.document_BN
    return torch.cat((before_BN.to(document_BT.dtype), document_BT), dim=1)
