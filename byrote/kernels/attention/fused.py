"""Attention by PyTorch's own fused kernels, on any device. The contract is the package's."""

from torch import Tensor
from torch.nn import functional


def attend(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, *, scale: float, mask_B1TS: Tensor | None = None, causal: bool = False
) -> Tensor:
    """[B, H, T, V]; values and keys of different width are padded to the wider one and cut again."""
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
