"""Cross-entropy of a linear head without the logits.

    loss = mean over scored tokens of  logsumexp(W h) − (W h)[target]

The head runs over chunks of tokens; with gradients on, the gradient of each chunk (softmax − one-hot) is turned at once into the
gradients of `hidden` and `weight`, so that no [tokens, vocabulary] tensor outlives its chunk and nothing is computed twice.
Softmax and sums are fp32. Targets of −100 are not scored.

A head with a product of its own (int8, FP8) goes through `product_cross_entropy`: the same chunks, each computed twice.

Memory: one chunk of logits, CHUNK_TOKENS · V numbers of the inputs' dtype (and in the reference three times that in fp32).

Shapes: N tokens, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from byrote.kernels.cross_entropy import cpu
from byrote.kernels.cross_entropy import reference as plain
from byrote.kernels.cross_entropy.reference import IGNORE
from byrote.kernels.cross_entropy.reference import linear_cross_entropy as reference

__all__ = ["CHUNK_TOKENS", "IGNORE", "linear_cross_entropy", "product_cross_entropy", "reference"]

CHUNK_TOKENS = 1024


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int, trains: bool) -> tuple[Tensor, Tensor]:
        backend = cpu if cpu.can_run(hidden_ND, targets_N) else plain
        factor = 1.0 / (targets_N != IGNORE).sum().clamp_min(1)
        losses_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
        if trains:
            ctx.save_for_backward(*_forward_backward(backend, hidden_ND, weight_VD, targets_N, losses_N, factor, chunk))
            ctx.weight_dtype = weight_VD.dtype
        else:
            for part in _parts(len(losses_N), chunk):
                backend.score(hidden_ND[part] @ weight_VD.t(), targets_N[part], losses_N[part])
        ctx.mark_non_differentiable(losses_N)
        return losses_N.sum() * factor, losses_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (grad_hidden * grad_loss).to(grad_hidden.dtype), (grad_weight * grad_loss).to(ctx.weight_dtype), None, None, None


def _parts(tokens: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, tokens, chunk)]


def _forward_backward(
    backend: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, losses_N: Tensor, factor: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Write the losses; (gradient of hidden, gradient of weight in fp32)."""
    grad_hidden = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format)
    grad_weight = torch.zeros_like(weight_VD, dtype=torch.promote_types(weight_VD.dtype, torch.float32))
    for part in _parts(len(losses_N), chunk):
        logits_NV = hidden_ND[part] @ weight_VD.t()
        slope_NV = backend.score_and_slope(logits_NV, targets_N[part], losses_N[part], factor)
        torch.mm(slope_NV, weight_VD, out=grad_hidden[part])
        grad_weight += slope_NV.t() @ hidden_ND[part]
    return grad_hidden, grad_weight


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk: int = CHUNK_TOKENS) -> tuple[Tensor, Tensor]:
    """(mean loss over scored tokens, float32 losses [N] with 0 where not scored). Only the mean carries a gradient.

    IndexError: a target outside the vocabulary that is not IGNORE (looked for on the CPU only: elsewhere it would be a wait).
    """
    if targets_N.device.type == "cpu" and targets_N.numel():
        low, high = torch.aminmax(targets_N.masked_fill(targets_N == IGNORE, 0))
        if low < 0 or high >= weight_VD.shape[0]:
            raise IndexError(
                f"targets span {int(low)}..{int(high)}; allowed: 0..{weight_VD.shape[0] - 1}, and {IGNORE} for what is not scored"
            )
    trains = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)  # ctx.needs_input_grad ignores no_grad
    mean, losses_N = _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, chunk, trains)
    return mean, losses_N


def product_cross_entropy(
    hidden_ND: Tensor, product: Callable[[Tensor], Tensor], targets_N: Tensor, *, chunk: int = CHUNK_TOKENS
) -> tuple[Tensor, Tensor]:
    """The same for any head: `product` turns hidden states [n, D] into logits [n, V], and gradients go where it sends them."""
    parts = [hidden_ND.new_zeros(0, dtype=torch.float32)]
    for part in _parts(hidden_ND.shape[0], chunk):
        parts.append(checkpoint(_losses_of, product, hidden_ND[part], targets_N[part], use_reentrant=False))
    losses_N = torch.cat(parts)
    return losses_N.sum() / (targets_N != IGNORE).sum().clamp_min(1), losses_N.detach()


def _losses_of(product: Callable[[Tensor], Tensor], hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(product(hidden_ND).float(), targets_N, ignore_index=IGNORE, reduction="none")
