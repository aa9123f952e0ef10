"""A counter-based generator out of SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA 2014), in int64 that wraps around.

    mix(x):  x ^= x ≫ 30   x *= C₁   x ^= x ≫ 27   x *= C₂   x ^= x ≫ 31            a bijection; every input bit moves every output bit
    key(seed, stream)  = mix(seed·γ + stream)
    h(row)             = mix(key + row·γ)                  of rounding also: h ← mix(h + count·γ)
    bits(row, column)  = mix(h + (column + 1)·γ)

normal: the four 16-bit quarters q of `bits` are summed: x = (Σ q − 2·65535) · std / s with s² = 4 · (65536² − 1)/12. Mean 0,
variance exactly std², kurtosis 2.7 (a normal has 3). Chosen over logarithm and cosine because the sum is an integer and the
product one rounding, so CPU, GPU and C give the same bits; a vectorised logarithm does not.

rounding: the low 16 of `bits` are added to the fp32 pattern, then the pattern's low half is cut off. A value that lies 30 % of the
way to the next bf16 goes up in 30 % of the draws. Infinity and NaN stay what they are.

Shapes: U rows, E numbers in a row.
"""

import torch
from torch import Tensor

GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
INITIAL, ROUNDING = 1, 2  # streams
SPREAD = ((65536**2 - 1) / 3) ** 0.5  # standard deviation of the sum of four quarters


def normal_rows(rows_U: Tensor, dim: int, *, std: float, seed: int = 0) -> Tensor:
    """See the package."""
    bits_UE = _bits(_of_row(rows_U, key(seed, INITIAL)), dim)
    sums_UE = torch.stack([(bits_UE >> shift) & 0xFFFF for shift in (0, 16, 32, 48)]).sum(0) - 2 * 65535
    return sums_UE.to(torch.float32) * torch.tensor(std / SPREAD, dtype=torch.float32) + 0.0  # no −0 where std is 0


def round_to_bf16(x_UE: Tensor, rows_U: Tensor, counts_U: Tensor, *, seed: int = 0) -> Tensor:
    """See the package."""
    hash_U = mix(_of_row(rows_U, key(seed, ROUNDING)) + counts_U.to(torch.int64) * signed(GAMMA))
    x_UE = x_UE.float().contiguous()
    pattern_UE = x_UE.view(torch.int32)
    up_UE = pattern_UE + (_bits(hash_U, x_UE.shape[1]) & 0xFFFF).to(torch.int32)
    kept_UE = torch.where(x_UE.isfinite(), up_UE, torch.where(x_UE.isnan(), 0x7FC00000, pattern_UE))
    return (kept_UE >> 16).to(torch.int16).view(torch.bfloat16)


def key(seed: int, stream: int) -> int:
    """Of a seed and a stream, as a signed 64-bit number."""
    return int(mix(torch.tensor([signed(seed * GAMMA + stream)], device="cpu"))[0])


def mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * signed(FIRST)
    x = (x ^ _shifted(x, 27)) * signed(SECOND)
    return x ^ _shifted(x, 31)


def signed(value: int) -> int:
    """The int64 with these 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


def _shifted(x: Tensor, by: int) -> Tensor:
    """x ≫ by, zeros from the left."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _of_row(rows_U: Tensor, key_: int) -> Tensor:
    return mix(rows_U * signed(GAMMA) + key_)


def _bits(hash_U: Tensor, dim: int) -> Tensor:
    steps_E = torch.arange(1, dim + 1, device=hash_U.device) * signed(GAMMA)
    return mix(hash_U[:, None] + steps_E)
