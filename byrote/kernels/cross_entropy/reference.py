"""Cross-entropy of a linear head in plain PyTorch, and the pass over a chunk of logits that the C back end does in one go.

Shapes: N tokens, D model width, V vocabulary.
"""

import torch
from torch import Tensor

IGNORE = -100


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """The readable twin: (mean loss, loss of each token with 0 where not scored), with all logits at once."""
    logits_NV = (hidden_ND @ weight_VD.t()).float()
    losses_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="none")
    return losses_N.sum() / (targets_N != IGNORE).sum().clamp_min(1), losses_N


def score(logits_NV: Tensor, targets_N: Tensor, losses_N: Tensor) -> None:
    """Write the loss of each token."""
    wide_NV = logits_NV.float()
    picked_N = wide_NV.gather(1, targets_N.clamp_min(0)[:, None])[:, 0]
    losses_N.copy_(torch.where(targets_N == IGNORE, 0.0, torch.logsumexp(wide_NV, dim=-1) - picked_N))


def score_and_slope(logits_NV: Tensor, targets_N: Tensor, losses_N: Tensor, factor: Tensor) -> Tensor:
    """The same; returns (softmax − one-hot) · factor in the logits' dtype, rows not scored zero. The logits may be overwritten."""
    wide_NV = logits_NV.float()
    picked_N = wide_NV.gather(1, targets_N.clamp_min(0)[:, None])[:, 0]
    top_N1 = wide_NV.amax(dim=-1, keepdim=True)
    exp_NV = (wide_NV - top_N1).exp_()
    sum_N1 = exp_NV.sum(dim=-1, keepdim=True)
    losses_N.copy_(torch.where(targets_N == IGNORE, 0.0, sum_N1.log()[:, 0] + top_N1[:, 0] - picked_N))
    slope_NV = exp_NV.div_(sum_N1)
    slope_NV[torch.arange(targets_N.shape[0], device=targets_N.device), targets_N.clamp_min(0)] -= 1.0
    return slope_NV.mul_(((targets_N != IGNORE) * factor)[:, None]).to(logits_NV.dtype)
