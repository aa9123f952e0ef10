"""Numbers as FP8 would keep them, without FP8 arithmetic: rounded there and back, in blocks that share a power-of-two scale.

    scale = 2^⌈log2(max(|x|) / 448)⌉ over a block, max at least 1e-4        x ← scale · E4M3(x / scale)

E4M3 has 4 exponent and 3 mantissa bits and ends at 448; rounding is to nearest, ties to even (DeepSeek's `act_quant`, V3 §3.3). In
the backward the rounding is not there: the cotangent goes straight through.
"""

import torch
from torch import Tensor

BLOCK = 128
LARGEST = 448.0
_LEAST_MAXIMUM = 1e-4


def through_fp8(x: Tensor) -> Tensor:
    """x in its own dtype; blocks of 128 along the last dim, the last block as long as what is left."""
    rounded = torch.cat([_round(part) for part in x.detach().float().split(BLOCK, dim=-1)], dim=-1).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def _round(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x.abs().amax(-1, keepdim=True).clamp_min(_LEAST_MAXIMUM) / LARGEST)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)  # ⌈log2⌉ of m · 2^e, ½ ≤ m < 1
    scaled = torch.ldexp(x, -exponent).clamp(-LARGEST, LARGEST)
    return torch.ldexp(scaled.to(torch.float8_e4m3fn).float(), exponent)
