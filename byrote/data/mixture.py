"""Which source gives the next row: chosen by weight, from a hash of the row's number.

Row n of a training takes its source from 64 random bits that depend on (seed, n) only. So the n-th row comes from the same
source however the training was interrupted, and over many rows each source has its share to within about 1/√n.
"""

from collections.abc import Sequence

import numpy as np

from byrote.data.order import counter_hash
from byrote.errors import ConfigError

_STREAM = 1  # keeps these choices independent of the shuffles


class Mixture:
    """Sources with weights; only their ratios matter."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        if not weights or not all(weight > 0 for weight in weights):
            raise ConfigError(f"a mixture needs at least one source and positive weights; got {list(weights)}")
        self._upper = np.cumsum(np.array(weights, dtype=np.float64)) / sum(weights)
        self._upper[-1] = 1.0  # a rounding error below one would leave room for no source
        self._seed = seed

    def choose(self, first_row: int, count: int) -> list[int]:
        """The sources of `count` rows from number `first_row` on."""
        bits = counter_hash((self._seed, _STREAM), np.arange(first_row, first_row + count))
        return np.searchsorted(self._upper, (bits >> np.uint64(11)) * 2.0**-53, side="right").tolist()
