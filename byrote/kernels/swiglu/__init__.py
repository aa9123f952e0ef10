"""SwiGLU on a fused projection: silu(gate) · up, with V4's clamp and an optional weight per token. The definition: reference.py."""

from torch import Tensor

from byrote.kernels.swiglu import cpu, reference


def swiglu(gate_up_N2F: Tensor, *, limit: float | None = None, weight_N: Tensor | None = None) -> Tensor:
    """[N, F] in the dtype of the input. Leading dims may be more than one where no weight is given. ValueError: shapes."""
    if gate_up_N2F.dim() == 0 or gate_up_N2F.shape[-1] % 2:
        raise ValueError(f"swiglu got shape {tuple(gate_up_N2F.shape)}; the last dim holds gate and linear part, so it must be even")
    if weight_N is not None and weight_N.shape != gate_up_N2F.shape[:-1]:
        raise ValueError(f"swiglu got weights of shape {tuple(weight_N.shape)} for {tuple(gate_up_N2F.shape)}; it takes one per row")
    backend = cpu if cpu.can_run(gate_up_N2F, weight_N) else reference
    return backend.swiglu(gate_up_N2F, limit=limit, weight_N=weight_N)
