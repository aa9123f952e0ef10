"""Rotary positions where they are applied: to one tensor, and to all of latent attention's projections at once.

    q, k, v = assemble_qkv(q projection, kv projection, k_rope, cos, sin, heads=H, layout=...)

splits the projections of MLA (V3 §2.1.1, Eq 1–9) per head, rotates what carries position and lays heads before tokens, as attention
wants them. The definition: reference.py.

Shapes: B batch, T tokens, H heads, K rotary width, P = K/2 pairs, N no-position width, V value width.
"""

from torch import Tensor

from byrote.kernels.rotary import cpu, reference

__all__ = ["LAYOUTS", "assemble_qkv", "rotate"]

LAYOUTS = ("interleaved", "half")


def rotate(x: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, layout: str) -> Tensor:
    """Rotate the last dim of x [B, T, ..., K]. Dims between T and K share the rotation. ValueError: shapes, unknown layout."""
    _check_layout(layout)
    _check_angles(cos_BTP, sin_BTP, (*x.shape[:2], x.shape[-1]))
    backend = cpu if cpu.can_run(x, cos_BTP, sin_BTP) else reference
    return backend.rotate(x, cos_BTP, sin_BTP, layout)


def assemble_qkv(
    q_BTX: Tensor, kv_BTY: Tensor, k_rope_BTK: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, *, heads: int, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, T, N+K], k [B, H, T, N+K] and v [B, H, T, V] from X = H·(N+K) and Y = H·(N+V) columns and one rotary key for all heads.

    ValueError: shapes, unknown layout.
    """
    _check_layout(layout)
    _check_angles(cos_BTP, sin_BTP, tuple(k_rope_BTK.shape))
    _check_projections(q_BTX, kv_BTY, k_rope_BTK, heads)
    tensors = (q_BTX, kv_BTY, k_rope_BTK, cos_BTP, sin_BTP)
    backend = cpu if cpu.can_run(*tensors) else reference
    return backend.assemble_qkv(*tensors, heads=heads, layout=layout)


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"rotary layout is {layout!r}; allowed: {', '.join(LAYOUTS)}")


def _check_angles(cos: Tensor, sin: Tensor, shape_BTK: tuple[int, ...]) -> None:
    wanted = (*shape_BTK[:2], shape_BTK[2] // 2)
    if shape_BTK[2] % 2 or cos.shape != wanted or sin.shape != wanted:
        raise ValueError(
            f"cos has shape {tuple(cos.shape)}, sin {tuple(sin.shape)}; what is [B, T, K] = {shape_BTK} needs an even K and {wanted}"
        )


def _check_projections(q: Tensor, kv: Tensor, k_rope: Tensor, heads: int) -> None:
    per_query, per_key = q.shape[-1] // heads, kv.shape[-1] // heads
    nope = per_query - k_rope.shape[-1]
    same_tokens = q.shape[:-1] == kv.shape[:-1] == k_rope.shape[:-1]
    if not same_tokens or q.shape[-1] % heads or kv.shape[-1] % heads or nope < 0 or per_key <= nope:
        shapes = f"q {tuple(q.shape)}, kv {tuple(kv.shape)}, k_rope {tuple(k_rope.shape)}"
        raise ValueError(f"{shapes} do not fit {heads} heads: q needs H·(N+K) columns, kv H·(N+V), k_rope K, all for the same tokens")
