"""The product of a few fp32 rows with int8 weights in C: the decode step's own (`decode_step/rows.h`), one weight at a time."""

import ctypes
from ctypes import c_int, c_long, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from byrote.kernels import native
from byrote.kernels.decode_step.cpu import MOST_ROWS
from byrote.kernels.int8.reference import Int8

HEADERS = ("decode_step/rows.h", "decode_step/tape.h", "lanes.h")
SOURCES = (Path(__file__).parent / "int8.c", *(native.INCLUDE / header for header in HEADERS))
FUNCTIONS = {"int8_product": (c_int, c_long, c_long, c_long, *[c_void_p] * 4)}  # threads, rows, inputs, outputs


def library() -> ctypes.CDLL | None:
    """The compiled product, or None."""
    return native.load("int8", SOURCES, FUNCTIONS)


def can_run(x: Tensor, weight: Int8) -> bool:
    """Whether this back end serves such tensors here: few rows, fp32, no gradient wanted."""
    few = 0 < x.numel() <= MOST_ROWS * weight.values_FD.shape[1]
    return few and x.dtype == torch.float32 and not native.wants_grad(x) and native.can_take(x, *weight) and library() is not None


def product(x: Tensor, weight: Int8) -> Tensor:
    """As the reference."""
    opened = library()
    assert opened is not None, "can_run comes first"
    x_MD, (F, D) = native.rows(x).contiguous(), weight.values_FD.shape
    y = native.empty((*x.shape[:-1], F), torch.float32)
    opened.int8_product(native.threads_for(F * D), x_MD.shape[0], D, F, *map(native.address, (x_MD, *weight, y)))
    return y
