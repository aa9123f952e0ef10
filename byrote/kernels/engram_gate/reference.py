"""What memory does to the residual streams, in plain PyTorch (Engram §2.3–2.4, Eq 4 and 5; signed root as in the released code,
papers.md §1.6).

    s = ⟨rms(h)·q, rms(k)·w⟩ / √D          per token and stream; q, w: learnt gains, which act through their product alone
    α = σ( sign(s) · √max(|s|, 1e-6) )      "soft"
    α = 1 where s > 0 else 0                "hard"; the gradient is that of the soft gate (straight-through)
    ṽ = α·v                                 v: one value for all streams
    y = silu( Σ_j tap_j · rms(ṽ)[t − j·d]·g )   depthwise, causal, dilated by d, inside the document; left out without `conv`
    out = h + ṽ + y

sign(0) counts as 0, so an exact zero gives α = ½ in the soft gate and 0 in the hard one.

Shapes: B batch, T tokens, N tokens of all rows, S tokens so far, R streams, D model width, W taps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_FLOOR = 1e-6

Extend = Callable[[Tensor], Tensor]


class Conv(NamedTuple):
    """The short convolution: tap j of `weight_RDW` looks back j·dilation tokens; `gain_RD` belongs to the norm before it."""

    weight_RDW: Tensor
    gain_RD: Tensor
    dilation: int

    @property
    def reach(self) -> int:
        """Tokens before the present that it can see."""
        return (self.weight_RDW.shape[-1] - 1) * self.dilation


def gate(streams_NRD: Tensor, keys_NRD: Tensor, gain_RD: Tensor, *, eps: float, hard: bool = False) -> Tensor:
    """α, at least float32 [N, R]. `gain_RD` is the product of the two norm gains."""
    work = torch.promote_types(streams_NRD.dtype, torch.float32)
    streams, keys = streams_NRD.to(work), keys_NRD.to(work)
    width = streams.shape[-1]
    dots_NR = (streams * gain_RD * keys).sum(-1)
    norms_NR = torch.rsqrt(streams.square().mean(-1) + eps) * torch.rsqrt(keys.square().mean(-1) + eps)
    score_NR = dots_NR * norms_NR * width**-0.5
    soft_NR = torch.sigmoid(torch.sign(score_NR) * score_NR.abs().clamp_min(_FLOOR).sqrt())
    if not hard:
        return soft_NR
    return soft_NR + ((score_NR > 0).to(soft_NR.dtype) - soft_NR).detach()  # in this order 0 and 1 come out exact


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
    """(streams with memory added, gates α); see the package."""
    dtype = streams_BTRD.dtype
    alpha_NR = gate(streams_BTRD.flatten(0, 1), keys_BTRD.flatten(0, 1), gain_RD, eps=eps, hard=hard)
    alpha_BTR = alpha_NR.unflatten(0, streams_BTRD.shape[:2])
    spoken_BTRD = alpha_BTR[..., None].to(dtype) * value_BTD[:, :, None].to(dtype)
    if conv is not None:
        spoken_BTRD = spoken_BTRD + short_conv(spoken_BTRD, conv, eps=eps, document_BS=document_BS, extend=extend)
    return streams_BTRD + spoken_BTRD, alpha_BTR


def short_conv(spoken_BTRD: Tensor, conv: Conv, *, eps: float, document_BS: Tensor | None, extend: Extend | None) -> Tensor:
    """SiLU of the depthwise causal convolution of the normed values."""
    length = spoken_BTRD.shape[1]
    wide = spoken_BTRD.to(torch.promote_types(spoken_BTRD.dtype, torch.float32))
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * conv.gain_RD).to(spoken_BTRD.dtype)
    padded = functional.pad(normed, (0, 0, 0, 0, conv.reach, 0)) if extend is None else extend(normed).to(normed.dtype)
    taps = conv.weight_RDW.to(normed.dtype)
    total = normed * taps[..., 0]
    for tap in range(1, taps.shape[-1]):
        back = tap * conv.dilation
        part = padded[:, conv.reach - back : conv.reach - back + length]
        total = total + _inside(part, back, document_BS) * taps[..., tap]
    return functional.silu(total)


def _inside(part_BTRD: Tensor, back: int, document_BS: Tensor | None) -> Tensor:
    """Zero where `back` tokens ago was another document."""
    if document_BS is None:
        return part_BTRD
    length = part_BTRD.shape[1]
    now_BT = document_BS[:, document_BS.shape[1] - length :]
    padded = functional.pad(document_BS, (back, 0), value=-2)
    before_BT = padded[:, document_BS.shape[1] - length :][:, :length]
    return part_BTRD * (before_BT == now_BT)[:, :, None, None].to(part_BTRD.dtype)
