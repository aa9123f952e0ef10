"""Reading in C: threads that wait for the disk outside Python. The contract is reference.py's."""

import ctypes
import os
from ctypes import c_int, c_long, c_void_p
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from byrote.kernels import native
from byrote.kernels.file_rows.reference import LONGEST, NEAR, THREADS

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "file_rows.c",)
# threads, file, U, bytes a record, near, longest, offsets, to
FUNCTIONS = {"file_rows_read": (c_int, c_int, *[c_long] * 4, *[c_void_p] * 2)}
_RECORDS_A_THREAD = 32


def library() -> ctypes.CDLL | None:
    """The compiled reader, or None."""
    return native.load("file_rows", SOURCES, FUNCTIONS)


def can_run(records_UB: Tensor) -> bool:
    """Whether this back end fills such a tensor here."""
    return native.can_take(records_UB) and library() is not None


def read_records(handle: int, offsets_U: NDArray[np.int64], records_UB: Tensor) -> None:
    """As the reference."""
    opened = library()
    assert opened is not None, "can_run comes first"
    offsets_U = np.ascontiguousarray(offsets_U, np.int64)
    U, size = records_UB.shape
    threads = max(1, min(THREADS, U // _RECORDS_A_THREAD))
    assert records_UB.is_contiguous() and len(offsets_U) == U, f"{len(offsets_U)} offsets for {U} records"
    code = opened.file_rows_read(threads, handle, U, size, NEAR, LONGEST, offsets_U.ctypes.data, records_UB.data_ptr())
    if code:
        raise OSError(code, os.strerror(code)) if code > 0 else OSError("the file ends in the middle of a record")
