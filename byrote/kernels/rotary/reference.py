"""Rotary positions in plain PyTorch.

Pair p of token t turns by the angle whose cosine and sine are given:

    (a, b) → (a·cos − b·sin, a·sin + b·cos)

Layout "interleaved" pairs channels (2p, 2p+1), "half" pairs (p, p + K/2). fp32 inside, cast once at the end. The cotangent is turned
back: the same with −sin.

Shapes: B batch, T tokens, H heads, K rotary width, P = K/2 pairs, N no-position width, V value width.
"""

import torch
from torch import Tensor


def rotate(x: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, layout: str) -> Tensor:
    """Rotate the last dim of x [B, T, ..., K]. Dims between T and K share the rotation."""
    shared = (1,) * (x.dim() - 3)
    cos, sin = (part.view(*part.shape[:2], *shared, part.shape[-1]) for part in (cos_BTP, sin_BTP))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if layout == "interleaved":
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
    a, b = wide.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def assemble_qkv(
    q_BTX: Tensor, kv_BTY: Tensor, k_rope_BTK: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, *, heads: int, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with heads before tokens; see the package."""
    rope = k_rope_BTK.shape[-1]
    nope = q_BTX.shape[-1] // heads - rope
    q_nope_BTHN, q_rope_BTHK = q_BTX.unflatten(-1, (heads, -1)).split((nope, rope), dim=-1)
    k_nope_BTHN, v_BTHV = kv_BTY.unflatten(-1, (heads, -1)).tensor_split((nope,), dim=-1)
    q_BTHX = torch.cat((q_nope_BTHN, rotate(q_rope_BTHK, cos_BTP, sin_BTP, layout)), dim=-1)
    k_turned_BTHK = rotate(k_rope_BTK, cos_BTP, sin_BTP, layout)[:, :, None].expand(-1, -1, heads, -1)
    k_BTHX = torch.cat((k_nope_BTHN, k_turned_BTHK.to(k_nope_BTHN.dtype)), dim=-1)
    return q_BTHX.transpose(1, 2), k_BTHX.transpose(1, 2), v_BTHV.transpose(1, 2)
