"""mHC around one site, in plain PyTorch: what to read from the streams, how to mix them, what to write back.

A site (attention or feed-forward F) sits in R parallel residual streams h_0 … h_{R−1} (arXiv 2512.24880, Eq 3 and 7; form and
order of the released V4):

    f    = the streams of one token as one vector of K = R·D numbers
    z    = (fn f) / sqrt(mean f² + norm_eps)                       R + R + R² numbers
    pre  = σ(z[:R]·scale_0 + base[:R]) + eps                       how much of each stream the site reads
    post = 2 σ(z[R:2R]·scale_1 + base[R:2R])                       how much of its output each stream receives
    comb = sinkhorn(z[2R:]·scale_2 + base[2R:])                    [j, k]: how much of stream j goes to stream k

    enter:  x    = Σ_i pre_i h_i
    leave:  h'_k = post_k F(x) + Σ_j comb[j, k] h_j                comb is applied transposed
    read:   x    = Σ_i pre_i h_i, with R rows of fn only           after the last site

The division by the root mean square stands behind the product (a scalar per token commutes with it), so f itself is never
normalised in memory. Coefficients and sums are fp32 whatever the streams are; results return to the streams' dtype.

Shapes: N tokens, R streams, D model, K = R·D, M = R·(R+2).
"""

import torch
from torch import Tensor

from byrote.kernels.sinkhorn.reference import sinkhorn


def hyper_enter(
    streams_NRD: Tensor, fn_MK: Tensor, base_M: Tensor, scale_3: Tensor, *, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Input x_ND of a site in the streams' dtype, with post_NR and comb_NRR (fp32) for `hyper_leave`."""
    R = streams_NRD.shape[1]
    z_NM = _project(streams_NRD, fn_MK, norm_eps)
    base_M, scale_3 = base_M.to(z_NM.dtype), scale_3.to(z_NM.dtype)
    pre_NR = torch.sigmoid(z_NM[:, :R] * scale_3[0] + base_M[:R]) + eps
    post_NR = 2 * torch.sigmoid(z_NM[:, R : 2 * R] * scale_3[1] + base_M[R : 2 * R])
    logits_NRR = (z_NM[:, 2 * R :] * scale_3[2] + base_M[2 * R :]).unflatten(1, (R, R))
    return _collapse(streams_NRD, pre_NR), post_NR, sinkhorn(logits_NRR, iters=iters, eps=eps)


def hyper_leave(streams_NRD: Tensor, y_ND: Tensor, post_NR: Tensor, comb_NRR: Tensor) -> Tensor:
    """Streams after the site: each receives its share of y and a mixture of the old streams."""
    work = torch.promote_types(streams_NRD.dtype, torch.float32)
    with torch.autocast(streams_NRD.device.type, enabled=False):
        mixed_NRD = comb_NRR.to(work).transpose(1, 2) @ streams_NRD.to(work)
        written_NRD = post_NR.to(work)[..., None] * y_ND.to(work)[:, None]
        return (mixed_NRD + written_NRD).to(streams_NRD.dtype)


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
    """Leave one site and enter the next, whose parameters are given: (streams, x, post, comb)."""
    streams_NRD = hyper_leave(streams_NRD, y_ND, post_NR, comb_NRR)
    return streams_NRD, *hyper_enter(streams_NRD, fn_MK, base_M, scale_3, iters=iters, eps=eps, norm_eps=norm_eps)


def hyper_read(streams_NRD: Tensor, fn_RK: Tensor, base_R: Tensor, scale_1: Tensor, *, eps: float, norm_eps: float) -> Tensor:
    """The one vector x_ND that stands for all streams, before the final norm."""
    z_NR = _project(streams_NRD, fn_RK, norm_eps)
    return _collapse(streams_NRD, torch.sigmoid(z_NR * scale_1.to(z_NR.dtype) + base_R.to(z_NR.dtype)) + eps)


def _project(streams_NRD: Tensor, fn_MK: Tensor, norm_eps: float) -> Tensor:
    work = torch.promote_types(streams_NRD.dtype, torch.float32)
    with torch.autocast(streams_NRD.device.type, enabled=False):
        flat_NK = streams_NRD.flatten(1).to(work)
        inverse_rms_N1 = torch.rsqrt(flat_NK.square().mean(-1, keepdim=True) + norm_eps)
        return (flat_NK @ fn_MK.to(work).T) * inverse_rms_N1


def _collapse(streams_NRD: Tensor, pre_NR: Tensor) -> Tensor:
    return (pre_NR[..., None] * streams_NRD.to(pre_NR.dtype)).sum(1).to(streams_NRD.dtype)
