"""Many small records of a file, read at once; the few that one token needs, found and read in one call. See reference.py."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from byrote.kernels.file_rows import cpu, reference


def read_records(handle: int, offsets_U: NDArray[np.int64], records_UB: Tensor) -> None:
    """Fill `records_UB` (uint8, on the CPU) with the records at these byte offsets of an open file, ascending and not overlapping.

    OSError if a read fails or the file ends before a record does.
    """
    backend = cpu if cpu.can_run(records_UB) else reference
    backend.read_records(handle, offsets_U, records_UB)


def pick_records(rows_U: Tensor, slot_N: NDArray[np.uint32], parts_P3: NDArray[np.int64], size: int, to_UE: Tensor) -> bool:
    """Fill each row of `to_UE` with the beginning of its record, and tell whether all rows have one (else `to_UE` means nothing).

    `slot_N` says in which slot the record of a row lies, 0: it has none. `parts_P3`: (first slot, slot behind the last, open file) of
    the files that hold the slots, ascending; `size`: bytes a record. OSError as above; IndexError for a row outside slot_N.
    """
    backend = cpu if cpu.can_run(rows_U, to_UE) else reference
    return backend.pick_records(rows_U, slot_N, parts_P3, size, to_UE)
