"""Cross-entropy of a linear head without the logits.

    loss = mean over scored tokens of  logsumexp(W h) − (W h)[target]

The head runs over chunks of tokens; with gradients on, the gradient of each chunk (softmax − one-hot) is turned at once into the
gradients of `hidden` and `weight`, so that no [tokens, vocabulary] tensor outlives its chunk and nothing is computed twice.
Softmax and sums are fp32. Targets of −100 are not scored.

Shapes: N tokens, D model width, V vocabulary.
"""

import torch
from torch import Tensor

IGNORE = -100
CHUNK_TOKENS = 512


def reference(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """The readable twin: (mean loss, loss of each token with 0 where not scored), with all logits at once."""
    logits_NV = (hidden_ND @ weight_VD.t()).float()
    losses_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="none")
    return losses_N.sum() / (targets_N != IGNORE).sum().clamp_min(1), losses_N


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int, wants_grad: bool):  # type: ignore[no-untyped-def, override]
        scored = (targets_N != IGNORE).sum().clamp_min(1)
        losses_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND) if wants_grad else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_grad else None
        for start in range(0, hidden_ND.shape[0], chunk):
            part = slice(start, start + chunk)
            probabilities_NV = _chunk_losses(hidden_ND[part], weight_VD, targets_N[part], losses_N[part])
            if grad_hidden is not None and grad_weight is not None:
                slope_NV = _logit_gradient(probabilities_NV, targets_N[part], scored).to(hidden_ND.dtype)
                torch.mm(slope_NV, weight_VD, out=grad_hidden[part])
                grad_weight += slope_NV.t() @ hidden_ND[part]
        ctx.save_for_backward(*(() if grad_hidden is None else (grad_hidden, grad_weight)))
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(losses_N)
        return losses_N.sum() / scored, losses_N

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _: Tensor):  # type: ignore[no-untyped-def, override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (grad_hidden * grad_loss).to(grad_hidden.dtype), (grad_weight * grad_loss).to(ctx.weight_dtype), None, None, None


def _chunk_losses(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, losses_N: Tensor) -> Tensor:
    """Write the chunk's losses; return its probabilities in fp32."""
    logits_NV = (hidden_ND @ weight_VD.t()).float()
    picked_N = logits_NV.gather(1, targets_N.clamp_min(0)[:, None])[:, 0]
    top_N1 = logits_NV.amax(dim=-1, keepdim=True)
    exp_NV = logits_NV.sub_(top_N1).exp_()
    sum_N1 = exp_NV.sum(dim=-1, keepdim=True)
    losses_N.copy_(torch.where(targets_N == IGNORE, 0.0, sum_N1.log()[:, 0] + top_N1[:, 0] - picked_N))
    return exp_NV.div_(sum_N1)


def _logit_gradient(probabilities_NV: Tensor, targets_N: Tensor, scored: Tensor) -> Tensor:
    rows = torch.arange(targets_N.shape[0], device=targets_N.device)
    probabilities_NV[rows, targets_N.clamp_min(0)] -= 1.0
    return probabilities_NV.mul_(((targets_N != IGNORE) / scored)[:, None])


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk: int = CHUNK_TOKENS) -> tuple[Tensor, Tensor]:
    """(mean loss over scored tokens, float32 losses [N] with 0 where not scored). Only the mean carries a gradient."""
    wants_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)  # inside `forward` gradients look off
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, chunk, wants_grad)
