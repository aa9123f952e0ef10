"""RMSNorm in plain PyTorch (arXiv 1910.07467, Eq 4), computed in fp32 whatever the input's dtype and cast once at the end.

    y = x · r · gain,   r = 1 / √(mean x² + ε)

so that a cotangent g of y pulls back to r·(g·gain − x · r² · mean(g·gain·x)) for x and to Σ g·x·r for the gain: x and r are all
that a backward needs.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """Normed x in its own shape and dtype; at least fp32 inside."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain_D.to(wide.dtype)).to(x.dtype)
