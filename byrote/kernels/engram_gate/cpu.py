"""A memory layer's gate, value and short convolution in C. The contract is reference.py's, in fp32 inside.

Kept for the backward: the inputs, the gates, and 4 R + 1 numbers a token. The norm's gain is folded into the taps out here, where
autograd takes it apart again. Shapes: B batch, T tokens, N = B·T, R streams, D model, W taps.
"""

import ctypes
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byrote.kernels import native
from byrote.kernels.engram_gate.reference import Conv, Extend

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "engram_gate.c", native.INCLUDE / "lanes.h")
CALL = (c_int, c_int, c_float, c_void_p)  # threads, bf16, eps, Job
FUNCTIONS = {"engram_forward": CALL, "engram_backward": CALL}
MAX_STREAMS, MAX_TAPS = 8, 8
MAX_RING = 4096  # rows of a block that the backward holds on the stack
BLOCK = 64  # channels of a block, as in engram_gate.c
Inputs = tuple[Tensor, ...]  # streams, keys, value, gain, taps [W, R, D]
Options = tuple[int, bool, float]  # dilation, hard, eps


class Job(ctypes.Structure):
    """`job` of engram_gate.c."""

    _fields_ = [
        *[(name, c_long) for name in ("B", "T", "R", "D", "W", "dilation", "hard")],
        *[
            (name, c_void_p)
            for name in ("streams", "keys", "value", "gain", "taps", "document", "out", "alpha", "kept", "d_out", "d_alpha")
        ],
        *[(name, c_void_p) for name in ("d_streams", "d_keys", "d_value", "d_gain", "d_taps", "conv_value", "conv_factor")],
    ]


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    return native.load("engram_gate", SOURCES, FUNCTIONS)


def can_run(
    streams_BTRD: Tensor, keys_BTRD: Tensor, value_BTD: Tensor, gain_RD: Tensor, conv: Conv | None, document_BS: Tensor | None
) -> bool:
    """Whether this back end serves such a layer here."""
    read = (streams_BTRD, keys_BTRD, value_BTD)
    tensors = [*read, gain_RD, *(conv[:2] if conv else ()), *(() if document_BS is None else (document_BS,))]
    _, tokens, streams, _ = streams_BTRD.shape
    fits = all(part.dtype in (torch.float32, torch.bfloat16) for part in read) and streams <= MAX_STREAMS
    if conv is not None:
        fits = fits and conv.weight_RDW.shape[2] <= MAX_TAPS and (conv.reach + 1) * streams <= MAX_RING
    if document_BS is not None:
        fits = fits and document_BS.dtype == torch.int64 and document_BS.shape[1] == tokens
    return fits and native.can_take(*tensors) and library() is not None


def engram_add(
    streams_BTRD: Tensor,
    keys_BTRD: Tensor,
    value_BTD: Tensor,
    gain_RD: Tensor,
    conv: Conv | None,
    *,
    eps: float,
    hard: bool = False,
    document_BS: Tensor | None = None,
    extend: Extend | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference. `extend` is not served: see `can_run`'s caller."""
    assert extend is None, "a decode state needs the reference"
    dtype, (R, D) = streams_BTRD.dtype, gain_RD.shape
    if conv is None:
        taps_WRD = native.empty((0, R, D), torch.float32)
    else:
        taps_WRD = (conv.weight_RDW.float() * conv.gain_RD[..., None]).movedim(2, 0)
    inputs = (streams_BTRD, keys_BTRD.to(dtype), value_BTD.to(dtype), gain_RD.float(), taps_WRD)
    options = (0 if conv is None else conv.dilation, hard, eps)
    if not native.wants_grad(*inputs):
        return _forward(_dense(inputs), document_BS, options)[:2]
    out_BTRD, alpha_BTR = _Engram.apply(*inputs, document_BS, options)
    return out_BTRD, alpha_BTR


def _dense(tensors: Inputs) -> Inputs:
    return tuple(tensor.contiguous() for tensor in tensors)


def _forward(inputs: Inputs, document_BT: Tensor | None, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """(streams, gates, what the backward needs); inputs without gaps."""
    B, T, R, _ = inputs[0].shape
    out = native.empty(inputs[0].shape, inputs[0].dtype)
    alpha, kept = native.empty((B, T, R), torch.float32), native.empty((B, T, 4 * R + 1), torch.float32)
    _call("engram_forward", inputs, document_BT, options, {"out": out, "alpha": alpha, "kept": kept})
    return out, alpha, kept


class _Engram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, document, options = arguments
        dense = _dense(tuple(inputs))
        out, alpha, kept = _forward(dense, document, options)
        ctx.save_for_backward(*dense, alpha, kept, document)
        ctx.options = options
        return out, alpha

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_alpha: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, alpha, kept, document = ctx.saved_tensors
        streams, keys, value, _, taps = inputs
        (W, R, D), threads = taps.shape, native.threads_for(streams.numel())
        d_streams, d_keys, d_value = (native.empty(part.shape, part.dtype) for part in (streams, keys, value))
        sums = {"d_gain": (threads, R, D), "d_taps": (threads, W, R, D)}
        sums |= {"conv_value": value.shape, "conv_factor": (-(-D // BLOCK), alpha.numel())} if W else {}
        work = {name: native.empty(shape, torch.float32) for name, shape in sums.items()}
        out = {"d_streams": d_streams, "d_keys": d_keys, "d_value": d_value, **work}
        above = {"d_out": d_out.contiguous(), "d_alpha": d_alpha.contiguous(), "alpha": alpha.contiguous(), "kept": kept}
        _call("engram_backward", tuple(inputs), document, ctx.options, above | out)
        return d_streams, d_keys, d_value, work["d_gain"][0], work["d_taps"][0], None, None


def _call(function: str, inputs: Inputs, document_BT: Tensor | None, options: Options, others: dict[str, Tensor]) -> None:
    streams, taps = inputs[0], inputs[4]
    dilation, hard, eps = options
    document_BT = None if document_BT is None else document_BT.contiguous()
    names = ("streams", "keys", "value", "gain", "taps")
    pointers = {name: tensor.data_ptr() for name, tensor in (*zip(names, inputs, strict=True), *others.items())}
    job = Job(*streams.shape, taps.shape[0], dilation, hard, document=native.address(document_BT), **pointers)
    opened = library()
    assert opened is not None, "can_run comes first"
    code = getattr(opened, function)(native.threads_for(streams.numel()), streams.dtype == torch.bfloat16, eps, ctypes.byref(job))
    native.check(code)
