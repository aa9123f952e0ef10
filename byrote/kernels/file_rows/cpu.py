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
FUNCTIONS = {
    "file_rows_read": (c_int, c_int, *[c_long] * 4, *[c_void_p] * 2),  # threads, file, U, bytes a record, near, longest, offsets, to
    "file_rows_pick": (*[c_long] * 5, *[c_void_p] * 4),  # U, N, P, bytes a record, bytes wanted, rows, slots, parts, to
}
_NONE, _OUTSIDE, _LOST = -2, -3, -4  # codes of file_rows_pick
_RECORDS_A_THREAD = 32


def library() -> ctypes.CDLL | None:
    """The compiled reader, or None."""
    return native.load("file_rows", SOURCES, FUNCTIONS)


def can_run(*tensors: Tensor) -> bool:
    """Whether this back end fills such tensors here."""
    return native.can_take(*tensors) and library() is not None


def read_records(handle: int, offsets_U: NDArray[np.int64], records_UB: Tensor) -> None:
    """As the reference."""
    opened = library()
    assert opened is not None, "can_run comes first"
    offsets_U = np.ascontiguousarray(offsets_U, np.int64)
    U, size = records_UB.shape
    threads = max(1, min(THREADS, U // _RECORDS_A_THREAD))
    assert records_UB.is_contiguous() and len(offsets_U) == U, f"{len(offsets_U)} offsets for {U} records"
    _raise(opened.file_rows_read(threads, handle, U, size, NEAR, LONGEST, offsets_U.ctypes.data, records_UB.data_ptr()))


def pick_records(rows_U: Tensor, slot_N: NDArray[np.uint32], parts_P3: NDArray[np.int64], size: int, to_UE: Tensor) -> bool:
    """As the reference."""
    opened = library()
    assert opened is not None, "can_run comes first"
    U, wanted = len(rows_U), to_UE.stride(0) * to_UE.itemsize
    addresses = (native.address(rows_U), slot_N.ctypes.data, parts_P3.ctypes.data, native.address(to_UE))
    code = opened.file_rows_pick(U, len(slot_N), len(parts_P3), size, wanted, *addresses)
    if code == _OUTSIDE:
        raise IndexError(f"rows {int(rows_U.min())}..{int(rows_U.max())} of a table of {len(slot_N)}")
    assert code != _LOST, "a slot lies in no file"
    _raise(0 if code == _NONE else code)
    return code != _NONE


def _raise(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code)) if code > 0 else OSError("the file ends in the middle of a record")
