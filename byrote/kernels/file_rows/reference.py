"""Records of a file at ascending offsets, with many reads in flight.

A disk answers one small read after ~100 µs and thirty-two of them hardly later, so reads are never made one after another. And a disk
reads whole pages: records less than a page apart are fetched by one call, together with what lies between them.

    offsets   0 128 256 │ 40960 41088 │ 900000          a run ends where the gap exceeds NEAR or the run LONGEST
    calls     1 × 384     1 × 256       1 × 128         spread over THREADS threads

Shapes: U records, B bytes in one.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NEAR = 4096  # bytes between two records that are worth reading along
LONGEST = 1 << 16  # bytes a call
THREADS = 32  # reads in flight
_ALONE = 16  # runs that one thread reads faster than others start


def read_records(handle: int, offsets_U: NDArray[np.int64], records_UB: Tensor) -> None:
    """See the package."""
    target = records_UB.numpy()
    runs = list(_runs(offsets_U, records_UB.shape[1]))
    if len(runs) <= _ALONE:
        _read(handle, offsets_U, target, runs)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda first: _read(handle, offsets_U, target, runs[first::THREADS]), range(THREADS)))


def pick_records(rows_U: Tensor, slot_N: NDArray[np.uint32], parts_P3: NDArray[np.int64], size: int, to_UE: Tensor) -> bool:
    """See the package."""
    if len(rows_U) and not 0 <= int(rows_U.min()) <= int(rows_U.max()) < len(slot_N):
        raise IndexError(f"rows {int(rows_U.min())}..{int(rows_U.max())} of a table of {len(slot_N)}")
    target, slots = to_UE.view(torch.uint8).numpy(), slot_N[rows_U.numpy()].tolist()
    if not all(slots):
        return False
    for u, slot in enumerate(slots):
        first, handle = next((first, handle) for first, last, handle in parts_P3.tolist() if first <= slot < last)
        _read_whole(handle, target[u], (slot - first) * size)
    return True


def _runs(offsets_U: NDArray[np.int64], size: int) -> Iterable[tuple[int, int]]:
    """(first record, record after the last) of every call."""
    first = 0
    for u in range(1, len(offsets_U) + 1):
        if u == len(offsets_U) or offsets_U[u] - offsets_U[u - 1] - size > NEAR or offsets_U[u] + size - offsets_U[first] > LONGEST:
            yield first, u
            first = u


def _read(handle: int, offsets_U: NDArray[np.int64], target: NDArray[np.uint8], runs: Iterable[tuple[int, int]]) -> None:
    size = target.shape[1]
    for first, end in runs:
        start = int(offsets_U[first])
        block = np.empty(int(offsets_U[end - 1]) + size - start, np.uint8)
        _read_whole(handle, block, start)
        for u in range(first, end):
            target[u] = block[offsets_U[u] - start :][:size]


def _read_whole(handle: int, block: NDArray[np.uint8], start: int) -> None:
    done = 0
    while done < len(block):
        got = os.preadv(handle, [block[done:].data], start + done)
        if got == 0:
            raise OSError(f"the file ends at byte {start + done:,}, in the middle of a record")
        done += got
