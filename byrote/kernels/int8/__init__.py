"""Products with int8 weights. The definition: reference.py.

A few rows of x go through C where there is one, which turns int8 into fp32 in registers: a weight is one byte of traffic instead of
four. More rows, and all else: a block of the weight at a time becomes floating point and meets PyTorch's product, so that there is
never a whole copy of a weight. The whole numbers up to 127 are exact in bf16 too; the scale is applied to the outputs.
"""

import torch
from torch import Tensor
from torch.nn import functional

from byrote.kernels.int8 import cpu, reference
from byrote.kernels.int8.reference import Int8, dequantize

__all__ = ["Int8", "dequantize", "grouped_product", "product", "quantize", "reference"]

BLOCK_NUMBERS = 1 << 19  # of a weight as floating point at a time: 2 MiB, which a processor's cache holds


def quantize(weight_FD: Tensor) -> Int8:
    """As the reference, bitwise, some rows at a time."""
    rows_ND = weight_FD.detach().reshape(-1, weight_FD.shape[-1])
    values_ND, scale_N = torch.empty_like(rows_ND, dtype=torch.int8), torch.empty_like(rows_ND[:, 0], dtype=torch.float32)
    step = _rows(rows_ND.shape[1])
    for start in range(0, len(rows_ND), step):
        values_ND[start : start + step], scale_N[start : start + step] = reference.quantize(rows_ND[start : start + step])
    return Int8(values_ND.view(weight_FD.shape), scale_N.view(weight_FD.shape[:-1]))


def product(x: Tensor, weight: Int8) -> Tensor:
    """y [..., F] = x Wᵀ in the dtype of x; gradients go to x alone. Sums are formed as `x.dtype` products are."""
    if cpu.can_run(x, weight):
        return cpu.product(x, weight)
    blocks = weight.values_FD.split(_rows(x.shape[-1]))
    parts = [functional.linear(x, block.to(x.dtype)) for block in blocks]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return (y * weight.scale_F).to(y.dtype)


def grouped_product(x_ND: Tensor, weight: Int8, ends_E: Tensor) -> Tensor:
    """y [N, F]: row n of expert e (those before `ends_E[e]`, from the expert before on) times that expert's [F, D]."""
    ends = ends_E.tolist()
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    parts = [product(part, Int8(*expert)) for part, *expert in zip(x_ND.split(counts), *weight, strict=True) if len(part)]
    return torch.cat(parts) if parts else x_ND.new_empty(0, weight.values_FD.shape[1])


def _rows(width: int) -> int:
    """Rows of a block."""
    return max(1, BLOCK_NUMBERS // width)
