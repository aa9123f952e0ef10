"""Sinkhorn-Knopp in plain PyTorch, with a backward that runs the iterations again instead of keeping them.

    P_0     = softmax over k of the logits, + eps
    P_{2t+1} = P_{2t}   / (Σ_j P_{2t}   + eps)      columns: the sum over j becomes 1
    P_{2t+2} = P_{2t+1} / (Σ_k P_{2t+1} + eps)      rows: the sum over k becomes 1

stopping after the `iters`-th column step. One division P' = P/S pulls a cotangent G back to (G − Σ G·P')/S, so the
backward needs every P again; forty small matrices a token are cheaper to recompute than to store.

Shapes: N tokens, R streams; the matrix is indexed [j, k].
"""

from typing import Any

import torch
from torch import Tensor


def sinkhorn(logits_NRR: Tensor, *, iters: int, eps: float) -> Tensor:
    """Matrices [N, R, R] whose columns sum to 1, and rows too once `iters` is large. At least fp32; fp64 stays fp64."""
    work = torch.promote_types(logits_NRR.dtype, torch.float32)
    mixes_NRR: Tensor = _Sinkhorn.apply(logits_NRR.to(work), iters, eps)
    return mixes_NRR


def _divide(mixes_NRR: Tensor, iters: int, eps: float) -> tuple[Tensor, list[tuple[Tensor, int]]]:
    """The result, and on the way to it every matrix with the axis along which its sums then divided it."""
    steps = []
    for axis in [-2] + [-1, -2] * (iters - 1):
        steps.append((mixes_NRR, axis))
        mixes_NRR = mixes_NRR / (mixes_NRR.sum(axis, keepdim=True) + eps)
    return mixes_NRR, steps


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NRR: Tensor, iters: int, eps: float) -> Tensor:
        ctx.save_for_backward(logits_NRR)
        ctx.iters, ctx.eps = iters, eps
        return _divide(torch.softmax(logits_NRR, dim=-1) + eps, iters, eps)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NRR: Tensor) -> tuple[Tensor, None, None]:
        (logits_NRR,) = ctx.saved_tensors
        share_NRR = torch.softmax(logits_NRR, dim=-1)
        after_NRR, steps = _divide(share_NRR + ctx.eps, ctx.iters, ctx.eps)
        for before_NRR, axis in reversed(steps):
            total = before_NRR.sum(axis, keepdim=True) + ctx.eps
            grad_NRR = (grad_NRR - (grad_NRR * after_NRR).sum(axis, keepdim=True)) / total
            after_NRR = before_NRR
        return share_NRR * (grad_NRR - (grad_NRR * share_NRR).sum(-1, keepdim=True)), None, None
