"""The two linear maps of the model. Each takes an injected product, so that FP8 or int8 is another function and not another class."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from byrote.kernels.grouped_matmul import grouped_matmul

Matmul = Callable[[Tensor, Tensor], Tensor]
GroupedMatmul = Callable[[Tensor, Tensor, Tensor], Tensor]


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype products run in: autocast's where it is on, the input's otherwise."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _grouped(x_ND: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    dtype = _autocast_dtype(x_ND)
    return grouped_matmul(x_ND.to(dtype), weight_EFD, ends_E)  # casts the weight itself where its back end must


class Linear(nn.Module):
    """y = x Wᵀ, W [out, in], no bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.matmul: Matmul = functional.linear

    @property
    def is_plain(self) -> bool:
        """Whether no other product was injected, so that `weight` may be used directly."""
        return self.matmul is functional.linear

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(x, self.weight)


class GroupedLinear(nn.Module):
    """One W [out, in] per expert, applied to tokens sorted by expert; `ends_E` as in `kernels.grouped_matmul`."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.matmul: GroupedMatmul = _grouped

    @property
    def is_plain(self) -> bool:
        """As of `Linear`."""
        return self.matmul is _grouped

    def forward(self, x_ND: Tensor, ends_E: Tensor) -> Tensor:
        return self.matmul(x_ND, self.weight, ends_E)
