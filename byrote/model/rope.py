"""Rotary positions with YaRN (V3 §4.3; constants of the release).

Channel pair i turns by position · f_i, f_i = θ^(−2i/K). Layout "interleaved" pairs channels (2i, 2i+1), "half" pairs (i, i + K/2).
YaRN divides the frequencies of slow pairs by `factor`, keeps those of fast pairs and blends between: with
c(β) = K·ln(original / 2πβ) / (2 ln θ), pairs below ⌊c(β_fast)⌋ stay, pairs above ⌈c(β_slow)⌉ are divided.

Shapes: K rotary width, cos/sin [..., T, K/2] in fp32.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from byrote.kernels import rotary
from byrote.model.config import RopeConfig, YarnConfig


class Rotation(NamedTuple):
    cos: Tensor
    sin: Tensor

    def back(self) -> "Rotation":
        """The turn that undoes this one."""
        return Rotation(self.cos, -self.sin)


def frequencies(dim: int, rope: RopeConfig) -> Tensor:
    """float32 [K/2], always made on the CPU, so that a model built on the meta device has them too.

    Computed in float32 in the released order: weights were trained with these roundings, and exact ones would turn a pair by
    0.002 more or less at position 160,000.
    """
    theta_K = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if rope.yarn is None:
        return 1.0 / theta_K
    keep_K = 1.0 - _yarn_ramp(dim, rope.theta, rope.yarn)
    return 1.0 / (rope.yarn.factor * theta_K) * (1.0 - keep_K) + 1.0 / theta_K * keep_K


def _yarn_ramp(dim: int, theta: float, yarn: YarnConfig) -> Tensor:
    """0 for pairs that keep their frequency, 1 for pairs divided by the factor."""

    def pair_of(turns: float) -> float:
        return dim * math.log(yarn.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), dim - 1)
    pairs_K = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    return ((pairs_K - low) / ((high - low) or 1e-3)).clamp(0, 1)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def amplitude(yarn: YarnConfig | None) -> float:
    """Factor on cos and sin."""
    return 1.0 if yarn is None else _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)


def softmax_factor(yarn: YarnConfig | None) -> float:
    """Factor on the softmax scale: mscale² (released V3)."""
    return 1.0 if yarn is None or not yarn.mscale_all_dim else _mscale(yarn.factor, yarn.mscale_all_dim) ** 2


def rotation(position_BT: Tensor, dim: int, rope: RopeConfig) -> Rotation:
    """cos and sin of every position and pair, [B, T, K/2]."""
    angles, scale = position_BT[..., None].float() * _frequencies_on(dim, rope, position_BT.device), amplitude(rope.yarn)
    return Rotation(angles.cos() * scale, angles.sin() * scale)


@functools.cache
def _frequencies_on(dim: int, rope: RopeConfig, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept beyond this call, which may be one of inference
        return frequencies(dim, rope).to(device)


def rotate(x: Tensor, turn: Rotation, layout: str) -> Tensor:
    """Rotate the last dim of x [B, T, ..., K]; fp32 inside. Any dims between T and K share the rotation."""
    return rotary.rotate(x, turn.cos, turn.sin, layout)
