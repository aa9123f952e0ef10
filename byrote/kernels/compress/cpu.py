"""V4's compressor in C. The contract is the package's, the formulas are reference.py's.

Nothing is kept for the backward but the inputs; weights are made again. Values and gates may be slices of one wider tensor only as
copies: their rows are read without gaps.

Shapes: B batch, S tokens, E entries, M tokens of a group, W width of an entry, X = W, or 2W when overlapping.
"""

import ctypes
from ctypes import POINTER, c_long, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byrote.kernels import native

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "compress.c", native.INCLUDE / "lanes.h")
_POINTERS = ("values", "gates", "bias", "last", "opens", "entries", "d_values", "d_gates", "d_bias")


class _Problem(ctypes.Structure):
    """`problem` of compress.c."""

    _fields_ = (
        *((name, c_long) for name in ("threads", "bf16", "overlap", "back", "B", "S", "E", "M", "W")),
        *((name, c_void_p) for name in _POINTERS),
    )


FUNCTIONS = {"compress": (POINTER(_Problem),)}


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    return native.load("compress", SOURCES, FUNCTIONS)


def can_run(values_BSX: Tensor, gates_BSX: Tensor, bias_MX: Tensor) -> bool:
    """Whether this back end serves such inputs here."""
    fits = values_BSX.dtype == gates_BSX.dtype and values_BSX.dtype in (torch.float32, torch.bfloat16) and values_BSX.numel() > 0
    return fits and native.can_take(values_BSX, gates_BSX, bias_MX) and library() is not None


def compress(values_BSX: Tensor, gates_BSX: Tensor, bias_MX: Tensor, last_BE: Tensor, opens_BE: Tensor, *, overlap: bool) -> Tensor:
    """As the package's."""
    entries_BEW: Tensor = _Compress.apply(values_BSX, gates_BSX, bias_MX.float(), last_BE, opens_BE, overlap)
    return entries_BEW


class _Compress(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, gates: Tensor, bias: Tensor, last: Tensor, opens: Tensor, overlap: bool) -> Tensor:
        inputs = tuple(part.contiguous() for part in (values, gates, bias, last, opens))
        ctx.save_for_backward(*inputs)
        ctx.overlap = overlap
        entries = native.empty((*last.shape, bias.shape[1] // (2 if overlap else 1)), values.dtype)
        _run(inputs, entries, overlap)
        return entries

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        d_values, d_gates = (torch.zeros_like(part) for part in inputs[:2])  # a token of an open group has no entry
        d_bias = torch.zeros(native.threads_for(inputs[0].numel()), *inputs[2].shape)
        _run(inputs, grad.contiguous(), ctx.overlap, d_values=d_values, d_gates=d_gates, d_bias=d_bias)
        return d_values, d_gates, d_bias.sum(0), None, None, None


def _run(inputs: tuple[Tensor, ...], entries: Tensor, overlap: bool, **made: Tensor) -> None:
    (B, S, _), (M, _), (_, E, W) = inputs[0].shape, inputs[2].shape, entries.shape
    threads = native.threads_for(inputs[0].numel())
    problem = _Problem(threads, inputs[0].dtype == torch.bfloat16, overlap, bool(made), B, S, E, M, W)
    for name, tensor in {**dict(zip(_POINTERS, (*inputs, entries), strict=False)), **made}.items():
        setattr(problem, name, native.address(tensor))
    opened = library()
    assert opened is not None, "can_run was asked before"
    native.check(opened.compress(problem))
