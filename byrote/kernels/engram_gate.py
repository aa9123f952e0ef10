"""How far memory speaks into each residual stream (Engram §2.3 Eq 4; signed root as in the released code, papers.md §1.6).

    s = ⟨rms(h)·q, rms(k)·w⟩ / √D          per token and stream; q, w: learnt gains, which act through their product alone
    α = σ( sign(s) · √max(|s|, 1e-6) )      "soft"
    α = 1 where s > 0 else 0                "hard"; the gradient is that of the soft gate (straight-through)
    out = h + α·v                            v: one value for all streams

sign(0) counts as 0, so an exact zero gives α = ½ in the soft gate and 0 in the hard one.

Shapes: N tokens, R streams, D model width.
"""

import torch
from torch import Tensor

_FLOOR = 1e-6


def gate(streams_NRD: Tensor, keys_NRD: Tensor, gain_RD: Tensor, *, eps: float, hard: bool = False) -> Tensor:
    """α, float32 [N, R]. `gain_RD` is the product of the two norm gains."""
    streams, keys = streams_NRD.float(), keys_NRD.float()
    width = streams.shape[-1]
    dots_NR = (streams * gain_RD * keys).sum(-1)
    norms_NR = torch.rsqrt(streams.square().mean(-1) + eps) * torch.rsqrt(keys.square().mean(-1) + eps)
    score_NR = dots_NR * norms_NR * width**-0.5
    soft_NR = torch.sigmoid(torch.sign(score_NR) * score_NR.abs().clamp_min(_FLOOR).sqrt())
    if not hard:
        return soft_NR
    return (score_NR > 0).to(soft_NR.dtype) + soft_NR - soft_NR.detach()
