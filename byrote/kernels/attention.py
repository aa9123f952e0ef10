"""Scaled dot-product attention over the keys a query may see.

`mask_B1TS` is boolean, True where a query may look; None with `causal=True` means key s ≤ query t, both counted from 0 (T = S);
None with `causal=False` means every key. A query that may see nothing (padding) yields zeros, never NaN.

Shapes: B batch, H heads, T queries, S keys, K query/key width, V value width.
"""

import torch
from torch import Tensor
from torch.nn import functional


def reference(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, *, scale: float, mask_B1TS: Tensor | None = None, causal: bool = False
) -> Tensor:
    """The readable twin, in fp32."""
    scores_BHTS = torch.einsum("bhtk,bhsk->bhts", q_BHTK.float(), k_BHSK.float()) * scale
    if causal:
        mask_B1TS = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=scores_BHTS.device).tril()[None, None]
    if mask_B1TS is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask_B1TS, float("-inf"))
    weights_BHTS = torch.softmax(scores_BHTS, dim=-1).nan_to_num(0.0)
    return torch.einsum("bhts,bhsv->bhtv", weights_BHTS, v_BHSV.float()).to(v_BHSV.dtype)


def attend(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, *, scale: float, mask_B1TS: Tensor | None = None, causal: bool = False
) -> Tensor:
    """[B, H, T, V], by PyTorch's fused attention; values narrower than keys are padded for it and cut again."""
    narrow = v_BHSV.shape[-1]
    if narrow < q_BHTK.shape[-1]:
        v_BHSV = functional.pad(v_BHSV, (0, q_BHTK.shape[-1] - narrow))
    elif narrow > q_BHTK.shape[-1]:
        grow = (0, narrow - q_BHTK.shape[-1])
        q_BHTK, k_BHSK = functional.pad(q_BHTK, grow), functional.pad(k_BHSK, grow)
    out = functional.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSV, attn_mask=mask_B1TS, is_causal=causal, scale=scale)
    if mask_B1TS is not None:
        out = out.masked_fill(~mask_B1TS.any(-1, keepdim=True), 0.0)
    return out[..., :narrow]
