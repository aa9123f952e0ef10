"""mHC in C: enter, leave, both in one pass, and read-out, forward and backward. The contract is reference.py's.

All four are one autograd function with optional halves. Kept for the backward, beside the inputs that live on anyway: per
token the M numbers z, one inverse root mean square, and the mixed streams, which are the next site's input. Sigmoids and
Sinkhorn run again there. Streams may be bf16 or fp32; coefficients and all sums are fp32.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byrote.kernels import native

FOLDER = Path(__file__).parent
HEADERS = ("hyper_mix/tile.h", "hyper_mix/coefficients.h", "sinkhorn/sinkhorn.h", "product.h", "lanes.h")
SOURCES = (FOLDER / "hyper_mix.c", *(native.INCLUDE / header for header in HEADERS))
SIZES = (c_int, c_int, c_long, c_long, c_int, c_int, c_int, c_float)  # threads, bf16, N, D, R, M, iters, eps
FUNCTIONS = {"hyper_forward": (*SIZES, c_float, *[c_void_p] * 13), "hyper_backward": (*SIZES, *[c_void_p] * 21)}
MAX_STREAMS = 8
TILE = 16  # tokens handled together; fewer are not worth a second thread

Options = tuple[int, float, float]  # iters, eps, norm_eps
Inputs = tuple[Tensor | None, ...]  # streams, y, post, comb, fn, base, scale


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    return native.load("hyper_mix", SOURCES, FUNCTIONS)


def can_run(streams_NRD: Tensor) -> bool:
    """Whether this back end serves such streams here."""
    fits = streams_NRD.dtype in (torch.float32, torch.bfloat16) and streams_NRD.shape[1] <= MAX_STREAMS
    return fits and native.can_take(streams_NRD) and library() is not None


def hyper_enter(
    streams_NRD: Tensor, fn_MK: Tensor, base_M: Tensor, scale_3: Tensor, *, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    entry = (fn_MK.float(), base_M.float(), scale_3.float())
    _, x_ND, post_NR, comb_NRR = _pass((streams_NRD, None, None, None, *entry), (iters, eps, norm_eps))
    return x_ND, post_NR, comb_NRR


def hyper_leave(streams_NRD: Tensor, y_ND: Tensor, post_NR: Tensor, comb_NRR: Tensor) -> Tensor:
    """As the reference."""
    leaving = (y_ND.to(streams_NRD.dtype), post_NR.float(), comb_NRR.float())
    mixed_NRD: Tensor = _pass((streams_NRD, *leaving, None, None, None), (1, 0.0, 0.0))[0]
    return mixed_NRD


def hyper_step(
    streams_NRD: Tensor,
    y_ND: Tensor,
    post_NR: Tensor,
    comb_NRR: Tensor,
    fn_MK: Tensor,
    base_M: Tensor,
    scale_3: Tensor,
    *,
    iters: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference, with the streams read once and written once."""
    leaving = (y_ND.to(streams_NRD.dtype), post_NR.float(), comb_NRR.float())
    entry = (fn_MK.float(), base_M.float(), scale_3.float())
    mixed_NRD, x_ND, post_NR, comb_NRR = _pass((streams_NRD, *leaving, *entry), (iters, eps, norm_eps))
    return mixed_NRD, x_ND, post_NR, comb_NRR


def hyper_read(streams_NRD: Tensor, fn_RK: Tensor, base_R: Tensor, scale_1: Tensor, *, eps: float, norm_eps: float) -> Tensor:
    """As the reference."""
    entry = (fn_RK.float(), base_R.float(), scale_1.float())
    x_ND: Tensor = _pass((streams_NRD, None, None, None, *entry), (1, eps, norm_eps))[1]
    return x_ND


def _pass(inputs: Inputs, options: Options) -> Any:
    """(mixed streams, x, post, comb). y, post, comb are None where no site is left, fn, base, scale where none is entered."""
    if native.wants_grad(*inputs):
        return _Site.apply(*inputs, options)
    return _forward([None if tensor is None else tensor.contiguous() for tensor in inputs], options)[:4]


def _forward(inputs: Sequence[Tensor | None], options: Options) -> tuple[Tensor | None, ...]:
    streams, y, post, comb, fn, base, scale = inputs
    assert streams is not None, "the streams are never missing"
    (N, R, D), M = streams.shape, 0 if fn is None else fn.shape[0]
    mixed = None if y is None else torch.empty_like(streams)
    x, z, inverse_rms = None, None, None
    if fn is not None:
        x, z, inverse_rms = native.empty((N, D), streams.dtype), native.empty((N, M), fn.dtype), native.empty((N,), fn.dtype)
    post_out, comb_out = None, None
    if M > R:
        post_out, comb_out = native.empty((N, R), torch.float32), native.empty((N, R, R), torch.float32)
    arguments = (streams, y, post, comb, mixed, fn, base, scale, x, post_out, comb_out, z, inverse_rms)
    _call("hyper_forward", streams, M, options, arguments)
    return mixed, x, post_out, comb_out, z, inverse_rms


class _Site(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs_and_options: Any) -> tuple[Tensor | None, ...]:
        *inputs, options = inputs_and_options
        inputs = [None if tensor is None else tensor.contiguous() for tensor in inputs]
        mixed, x, post_out, comb_out, z, inverse_rms = _forward(inputs, options)
        ctx.save_for_backward(*inputs, mixed, z, inverse_rms)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return mixed, x, post_out, comb_out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, mixed, z, inverse_rms = ctx.saved_tensors
        streams, y, post, comb, fn, base, scale = inputs
        d_streams, d_y, d_post, d_comb, d_fn, d_base, d_scale = [None if t is None else torch.empty_like(t) for t in inputs]
        above = [None if grad is None else grad.contiguous() for grad in grads]
        entered = (streams if mixed is None else mixed, fn, base, scale, z, inverse_rms, d_fn, d_base, d_scale)
        left = (streams, y, post, comb, d_streams, d_y, d_post, d_comb)
        _call("hyper_backward", streams, 0 if fn is None else fn.shape[0], ctx.options[:2], (*above, *entered, *left))
        return d_streams, d_y, d_post, d_comb, d_fn, d_base, d_scale, None


def _call(function: str, streams_NRD: Tensor, M: int, options: tuple[float, ...], tensors: tuple[Tensor | None, ...]) -> None:
    N, R, D = streams_NRD.shape
    threads = 1 if N <= TILE else torch.get_num_threads()
    pointers = [native.address(tensor) for tensor in tensors]
    native.check(getattr(library(), function)(threads, streams_NRD.dtype == torch.bfloat16, N, D, R, M, *options, *pointers))
