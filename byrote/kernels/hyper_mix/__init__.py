"""The residual streams of mHC around one site: enter, leave, both at once, and the read-out. The definition: reference.py.

    x, post, comb = hyper_enter(streams, *parameters, ...)
    streams = hyper_leave(streams, F(x), post, comb)

`hyper_step` is hyper_leave and the hyper_enter of the next site in one pass over the streams, for a backend that gains by it.
Shapes: N tokens, R streams, D model, K = R·D, M = R·(R+2).
"""

from types import ModuleType

from torch import Tensor

from byrote.kernels.hyper_mix import cpu, reference


def hyper_enter(
    streams_NRD: Tensor, fn_MK: Tensor, base_M: Tensor, scale_3: Tensor, *, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Input x_ND of a site in the streams' dtype, with post_NR and comb_NRR (fp32) for `hyper_leave`. ValueError: shapes."""
    _check_entry(streams_NRD, fn_MK, base_M, scale_3, gates=3)
    return _backend(streams_NRD).hyper_enter(streams_NRD, fn_MK, base_M, scale_3, iters=iters, eps=eps, norm_eps=norm_eps)


def hyper_leave(streams_NRD: Tensor, y_ND: Tensor, post_NR: Tensor, comb_NRR: Tensor) -> Tensor:
    """Streams after the site: each receives its share of y and a mixture of the old streams. ValueError: shapes."""
    _check_leaving(streams_NRD, y_ND, post_NR, comb_NRR)
    return _backend(streams_NRD).hyper_leave(streams_NRD, y_ND, post_NR, comb_NRR)


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
    """Leave one site and enter the next, whose parameters are given: (streams, x, post, comb). ValueError: shapes."""
    _check_leaving(streams_NRD, y_ND, post_NR, comb_NRR)
    _check_entry(streams_NRD, fn_MK, base_M, scale_3, gates=3)
    leaving, entry = (streams_NRD, y_ND, post_NR, comb_NRR), (fn_MK, base_M, scale_3)
    return _backend(streams_NRD).hyper_step(*leaving, *entry, iters=iters, eps=eps, norm_eps=norm_eps)


def hyper_read(streams_NRD: Tensor, fn_RK: Tensor, base_R: Tensor, scale_1: Tensor, *, eps: float, norm_eps: float) -> Tensor:
    """The one vector x_ND that stands for all streams, before the final norm. ValueError: shapes."""
    _check_entry(streams_NRD, fn_RK, base_R, scale_1, gates=1)
    return _backend(streams_NRD).hyper_read(streams_NRD, fn_RK, base_R, scale_1, eps=eps, norm_eps=norm_eps)


def _backend(streams_NRD: Tensor) -> ModuleType:
    return cpu if cpu.can_run(streams_NRD) else reference


def _check_entry(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, gates: int) -> None:
    _check_streams(streams)
    _, R, D = streams.shape
    M = R * (R + 2) if gates == 3 else R
    _check_shapes(streams, {"fn": (fn, (M, R * D)), "base": (base, (M,)), "scale": (scale, (gates,))})


def _check_leaving(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> None:
    _check_streams(streams)
    N, R, D = streams.shape
    _check_shapes(streams, {"y": (y, (N, D)), "post": (post, (N, R)), "comb": (comb, (N, R, R))})


def _check_streams(streams: Tensor) -> None:
    if streams.dim() != 3:
        raise ValueError(f"streams have shape {tuple(streams.shape)}; [tokens, streams, dim] is needed: flatten batch and time first")


def _check_shapes(streams: Tensor, wanted: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; streams of shape {tuple(streams.shape)} need {shape}")
