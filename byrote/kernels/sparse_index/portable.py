"""The index of sparse attention on any device: the reference, a block of queries at a time.

Nothing of size queries × keys outlives its block. What a block of attention gathered is gathered again in the backward; the loss of
the index takes its gradient on the way forward, as it is a number and its cotangent only scales it.

Shapes: B batch, T queries, S keys, J index heads, I index width, H heads, X key width, V value width, K chosen keys.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from byrote.kernels.sparse_index import reference
from byrote.kernels.sparse_index.sets import Chosen, Spans

BLOCK_NUMBERS = 1 << 22  # numbers of a block's largest tensor


def _blocks(queries: int, numbers_per_query: int) -> Iterator[slice]:
    size = max(1, BLOCK_NUMBERS // max(1, numbers_per_query))
    return (slice(start, min(start + size, queries)) for start in range(0, max(1, queries), size))


@torch.no_grad()
def select(q_BTJI: Tensor, k_BSI: Tensor, weight_BTJ: Tensor, spans: Spans, top_k: int) -> Chosen:
    """As the package's."""
    B, T, J, _ = q_BTJI.shape
    parts = [
        reference.select(q_BTJI[:, part], k_BSI, weight_BTJ[:, part], spans.part(part), top_k)
        for part in _blocks(T, B * J * k_BSI.shape[1])
    ]
    index, valid = zip(*parts, strict=True)
    return Chosen(torch.cat(index, dim=1), torch.cat(valid, dim=1))


def attend_chosen(
    q_BTHX: Tensor, keys_BSX: Tensor, chosen: Chosen, *, scale: float, value_dim: int | None = None, sink_H: Tensor | None = None
) -> Tensor:
    """As the package's. Keys are widened before the blocks, so that their gradient is summed in fp32."""
    keys_BSX = keys_BSX.to(torch.promote_types(keys_BSX.dtype, torch.float32))

    def attend(part: slice) -> Tensor:
        return reference.attend_chosen(q_BTHX[:, part], keys_BSX, chosen.part(part), scale=scale, value_dim=value_dim, sink_H=sink_H)

    B, T, H, X = q_BTHX.shape
    numbers = B * chosen.index_BTK.shape[2] * (X + H)
    return torch.cat([checkpoint(attend, part, use_reentrant=False) for part in _blocks(T, numbers)], dim=1)


def index_loss(
    q_BTJI: Tensor, k_BSI: Tensor, weight_BTJ: Tensor, attending_BTHX: Tensor, keys_BSX: Tensor, seen: Chosen | Spans, *, scale: float
) -> Tensor:
    """As the package's."""
    loss: Tensor = _IndexLoss.apply(q_BTJI, k_BSI, weight_BTJ, attending_BTHX, keys_BSX, seen, scale)
    return loss


class _IndexLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, weight: Tensor, attending: Tensor, keys: Tensor, seen: Chosen | Spans, scale: float
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        ctx.dtypes = [leaf.dtype for leaf in (q, k, weight)]
        q, k, weight = (leaf.to(total.dtype) for leaf in (q, k, weight))
        sums = [torch.zeros_like(leaf) for leaf in (q, k, weight)]
        width = keys.shape[1] if isinstance(seen, Spans) else seen.index_BTK.shape[2] * (keys.shape[2] + k.shape[2])
        for part in _blocks(q.shape[1], q.shape[0] * max(q.shape[2], attending.shape[2]) * width):
            own_q, own_k, own_weight = (leaf.detach().requires_grad_() for leaf in (q[:, part], k, weight[:, part]))
            with torch.enable_grad():
                loss = reference.index_loss(own_q, own_k, own_weight, attending[:, part], keys, seen.part(part), scale=scale)
            d_q, d_k, d_weight = torch.autograd.grad(loss, (own_q, own_k, own_weight))
            sums[0][:, part], sums[2][:, part] = d_q, d_weight
            sums[1] += d_k
            total += loss.detach()
        ctx.save_for_backward(*sums)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = [(total * grad).to(dtype) for total, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (*grads, None, None, None, None)
