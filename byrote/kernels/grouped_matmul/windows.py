"""Grouped products on a CPU in bf16, in windows of few different sizes.

PyTorch's bf16 product on a CPU compiles a kernel for each new shape (oneDNN: about 0.75 ms, six times the product of 256 tokens
by 256 × 256 itself), and routing makes a new shape of every expert's token count at every step. So each product runs over a *window*:
the expert's rows and some of its neighbours', rounded up to a multiple of a step that depends on the mean load alone.

    rows 0…1023, step 32, an expert at rows 100…290   →  window 100…292: two rows of the next expert, computed in vain

Going up through the experts, what a window wrote in vain is overwritten by the next one; a window that would pass the end is
moved back and its result copied. Weight gradients take the neighbours' rows times zero.

Shapes: N sorted tokens, D inputs, F outputs, E experts.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_FINEST = 16  # rows


class Window(NamedTuple):
    """Rows [start, stop) belong to the expert, rows [first, last) are computed."""

    expert: int
    start: int
    stop: int
    first: int
    last: int


def window_step(rows: int, experts: int) -> int:
    """About an eighth of the mean load, so that some six per cent is computed in vain."""
    return max(_FINEST, rows // experts // 8 // _FINEST * _FINEST)


def windows(ends: list[int], rows: int) -> Iterator[Window]:
    step, start = window_step(rows, len(ends)), 0
    for expert, stop in enumerate(ends):
        if stop > start:
            size = min(rows, -(-(stop - start) // step) * step)
            first = min(start, rows - size)
            yield Window(expert, start, stop, first, first + size)
        start = stop


def product(x_ND: Tensor, weight_EFD: Tensor, ends: list[int]) -> Tensor:
    """[N, F]: rows of expert e times the transpose of its weight."""
    out_NF = x_ND.new_empty(x_ND.shape[0], weight_EFD.shape[1])
    for expert, start, stop, first, last in windows(ends, x_ND.shape[0]):
        right = weight_EFD[expert].t()
        if first == start:
            torch.mm(x_ND[first:last], right, out=out_NF[first:last])
        else:
            out_NF[start:stop] = torch.mm(x_ND[first:last], right)[start - first : stop - first]
    return out_NF


def weight_gradient(grad_NF: Tensor, x_ND: Tensor, ends: list[int]) -> Tensor:
    """[E, F, D]: for each expert, its gradients times its inputs."""
    sums_EFD = grad_NF.new_zeros(len(ends), grad_NF.shape[1], x_ND.shape[1])
    for expert, start, stop, first, last in windows(ends, x_ND.shape[0]):
        own = grad_NF[first:last]
        if (first, last) != (start, stop):
            own = torch.zeros_like(own)
            own[start - first : stop - first] = grad_NF[start:stop]
        torch.mm(own.t(), x_ND[first:last], out=sums_EFD[expert])
    return sums_EFD
