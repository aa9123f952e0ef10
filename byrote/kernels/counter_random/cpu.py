"""The generator in C, one pass over what is made. The contract is reference.py's, bit by bit.

Shapes: U rows, E numbers in a row.
"""

import ctypes
from ctypes import c_float, c_int, c_long, c_uint64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from byrote.kernels import native
from byrote.kernels.counter_random.reference import INITIAL, ROUNDING, SPREAD, key

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "counter_random.c", native.INCLUDE / "lanes.h")
FUNCTIONS = {
    "counter_normal": (c_int, c_long, c_long, c_uint64, c_float, *[c_void_p] * 2),  # threads, U, E, key, scale, rows, to
    "counter_round": (c_int, c_long, c_long, c_uint64, *[c_void_p] * 4),  # threads, U, E, key, from, rows, counts, to
}


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    return native.load("counter_random", SOURCES, FUNCTIONS)


def can_run(*tensors: Tensor) -> bool:
    """Whether this back end serves such tensors here."""
    return native.can_take(*tensors) and library() is not None


def normal_rows(rows_U: Tensor, dim: int, *, std: float, seed: int = 0) -> Tensor:
    """As the reference."""
    rows_U = rows_U.to(torch.int64).contiguous()
    to_UE = native.empty((len(rows_U), dim), torch.float32)
    sizes = (native.threads_for(to_UE.numel()), len(rows_U), dim, key(seed, INITIAL), std / SPREAD)
    native.check(_library().counter_normal(*sizes, rows_U.data_ptr(), to_UE.data_ptr()))
    return to_UE


def round_to_bf16(x_UE: Tensor, rows_U: Tensor, counts_U: Tensor, *, seed: int = 0) -> Tensor:
    """As the reference."""
    x_UE, rows_U, counts_U = x_UE.float().contiguous(), rows_U.to(torch.int64).contiguous(), counts_U.to(torch.int32).contiguous()
    to_UE = native.empty(x_UE.shape, torch.bfloat16)
    sizes = (native.threads_for(x_UE.numel()), *x_UE.shape, key(seed, ROUNDING))
    native.check(_library().counter_round(*sizes, *(part.data_ptr() for part in (x_UE, rows_U, counts_U, to_UE))))
    return to_UE


def _library() -> ctypes.CDLL:
    opened = library()
    assert opened is not None, "can_run comes first"
    return opened
