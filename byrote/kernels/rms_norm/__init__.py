"""RMSNorm over the last dim: x / √(mean x² + ε) · gain. The definition: reference.py."""

from torch import Tensor

from byrote.kernels.rms_norm import cpu, reference


def rms_norm(x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """Normed x in its own shape and dtype; at least fp32 inside. ValueError: a gain that does not fit the last dim."""
    if x.dim() == 0 or gain_D.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm got x of shape {tuple(x.shape)} and a gain of {tuple(gain_D.shape)}; one gain per entry of the last dim is needed"
        )
    backend = cpu if cpu.can_run(x, gain_D) else reference
    return backend.rms_norm(x, gain_D, eps)
