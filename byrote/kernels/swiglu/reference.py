"""SwiGLU in plain PyTorch.

`gate_up_N2F` holds the gate in its first half of columns and the linear part in the second. With `limit`, the gate is cut from
above and the linear part from both sides (V4 report §4, v4_spec §8). `weight_N` scales the result: a routed expert's gate, applied
before the down projection.

Shapes: N tokens, F hidden width.
"""

from torch import Tensor
from torch.nn import functional


def swiglu(gate_up_N2F: Tensor, *, limit: float | None = None, weight_N: Tensor | None = None) -> Tensor:
    """[N, F] in the dtype of the input."""
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    if limit is not None:
        gate_NF, up_NF = gate_NF.clamp(max=limit), up_NF.clamp(-limit, limit)
    hidden_NF = functional.silu(gate_NF) * up_NF
    return hidden_NF if weight_N is None else hidden_NF * weight_N[..., None].to(hidden_NF.dtype)
