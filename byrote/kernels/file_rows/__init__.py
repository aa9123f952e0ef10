"""Many small records of a file, read at once. The definition: reference.py."""

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
