"""RMSNorm: x / √(mean x² + ε) · gain, computed in fp32 whatever the input's dtype, cast once at the end (`kernels.rms_norm`)."""

import torch
from torch import Tensor, nn

from byrote.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
