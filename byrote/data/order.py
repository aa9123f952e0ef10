"""Random order from a counter: the n-th choice is a hash of (seed, n), so there is no generator state to save.

The hash is SplitMix64 (Steele, Lea, Flood 2014), which passes the usual test batteries for randomness. It is spelled out here,
on unsigned 64-bit integers that wrap around, because a resumed run must make the same choices on any version of any library.
"""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def counter_hash(key: tuple[int, ...], counters_N: NDArray[np.integer]) -> NDArray[np.uint64]:
    """64 random bits for each counter; other keys give independent ones."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _mix(state ^ np.uint64(part % 2**64))
    return _mix(state + counters_N.astype(np.uint64) * _GOLDEN)


def permutation(key: tuple[int, ...], count: int) -> NDArray[np.int64]:
    """The numbers below `count` in an order that `key` decides."""
    return np.argsort(counter_hash(key, np.arange(count)), kind="stable")


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))
