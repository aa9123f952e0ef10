"""Scaled dot-product attention over the keys a query may see. The definition: reference.py.

Back ends: C for the CPU (cpu.py), else PyTorch's fused attention (fused.py). None of them ever holds a [T, S] tensor of scores.
Shapes: B batch, H heads, T queries, S keys, K query/key width, V value width.
"""

import torch
from torch import Tensor

from byrote.kernels.attention import cpu, fused


def attend(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, *, scale: float, mask_B1TS: Tensor | None = None, causal: bool = False
) -> Tensor:
    """[B, H, T, V] in the inputs' dtype (autocast's where it is on).

    `mask_B1TS` is boolean, True where a query may look, its batch 1 or B; `causal=True` stands for key s ≤ query t, both
    counted from 0; without either every key is seen. A query that may see nothing (padding) yields zeros, never NaN.
    ValueError: shapes that do not fit, a mask that is not boolean, a mask and `causal` at once.
    """
    _check(q_BHTK, k_BHSK, v_BHSV, mask_B1TS, causal)
    backend = cpu if cpu.can_run(q_BHTK, k_BHSK, v_BHSV, mask_B1TS) else fused
    return backend.attend(q_BHTK, k_BHSK, v_BHSV, scale=scale, mask_B1TS=mask_B1TS, causal=causal)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> None:
    if not (q.dim() == k.dim() == v.dim() == 4 and q.shape[:2] == k.shape[:2] and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q, k, v))
        raise ValueError(f"attend got q, k, v of shapes {shapes}; needed: [B, H, T, K], [B, H, S, K], [B, H, S, V]")
    if mask is None:
        return
    if causal:
        raise ValueError("attend got a mask and causal=True; give one of them: a mask that keeps the order needs no second rule")
    allowed = [(batch, 1, q.shape[2], k.shape[2]) for batch in (1, q.shape[0])]
    if mask.dtype != torch.bool or mask.shape not in allowed:
        raise ValueError(f"attend got a mask of shape {tuple(mask.shape)} and {mask.dtype}; needed: {allowed[1]} or {allowed[0]}, boolean")
