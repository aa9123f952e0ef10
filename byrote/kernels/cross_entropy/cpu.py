"""The pass over a chunk of logits in C: loss and slope of a row while it is in the cache. The contract is reference.py's.

Shapes: N tokens, V vocabulary.
"""

import ctypes
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from byrote.kernels import native

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "cross_entropy.c", native.INCLUDE / "lanes.h")
FUNCTIONS = {"cross_entropy_rows": (c_int, c_int, c_long, c_long, c_float, c_int, c_void_p, c_void_p, c_void_p)}


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    return native.load("cross_entropy", SOURCES, FUNCTIONS)


def can_run(hidden_ND: Tensor, targets_N: Tensor) -> bool:
    """Whether this back end serves such tensors here."""
    fits = hidden_ND.dtype in (torch.float32, torch.bfloat16) and targets_N.dtype == torch.int64
    return fits and native.can_take(hidden_ND, targets_N) and library() is not None


def score(logits_NV: Tensor, targets_N: Tensor, losses_N: Tensor) -> None:
    """As the reference."""
    _call(logits_NV, targets_N, losses_N, 0.0, slope=False)


def score_and_slope(logits_NV: Tensor, targets_N: Tensor, losses_N: Tensor, factor: Tensor) -> Tensor:
    """As the reference; the slope takes the place of the logits."""
    _call(logits_NV, targets_N, losses_N, factor.item(), slope=True)
    return logits_NV


def _call(logits_NV: Tensor, targets_N: Tensor, losses_N: Tensor, factor: float, *, slope: bool) -> None:
    targets_N = targets_N.contiguous()
    sizes = (native.threads_for(logits_NV.numel()), logits_NV.dtype == torch.bfloat16, *logits_NV.shape, factor, slope)
    library_ = library()
    assert library_ is not None
    native.check(library_.cross_entropy_rows(*sizes, logits_NV.data_ptr(), targets_N.data_ptr(), losses_N.data_ptr()))
