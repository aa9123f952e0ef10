"""Weights as int8, a scale per output (row): W[f, d] ≈ scale[f] · values[f, d], values in −127 … 127.

    scale[f] = max_d |W[f, d]| / 127,    values = round(W / scale),    |W − scale · values| ≤ scale / 2

Symmetric, so that nothing is added to a product: y[f] = scale[f] · Σ_d values[f, d] x[d]. x and all sums stay floating point; only what
is read from memory shrinks. A scale per row and not per 64 or 32 columns: measured, these gain nothing (LOG.md).

Shapes: M rows of x, F outputs, D inputs; dims in front of F and D (experts) may be any.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

LARGEST = 127  # −128 is left out, so that a weight and its negative are as exact as one another; the largest of a row lands on 127


class Int8(NamedTuple):
    values_FD: Tensor  # int8
    scale_F: Tensor  # fp32


def quantize(weight_FD: Tensor) -> Int8:
    """The nearest int8 weights; a row of zeros has scale 0. ValueError where a number is not finite."""
    weight_FD = weight_FD.detach().float()
    scale_F = weight_FD.abs().amax(-1) / LARGEST
    if not scale_F.isfinite().all():
        raise ValueError("a number is not finite")
    steps_FD = weight_FD / scale_F.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return Int8(steps_FD.round_().to(torch.int8), scale_F)


def dequantize(weight: Int8) -> Tensor:
    """[..., F, D] fp32."""
    return weight.values_FD.float() * weight.scale_F[..., None]


def product(x: Tensor, weight: Int8) -> Tensor:
    """y [..., F] = x Wᵀ in the dtype of x."""
    return functional.linear(x, dequantize(weight).to(x.dtype))
