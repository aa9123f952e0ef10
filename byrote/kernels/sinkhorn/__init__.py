"""Logits → (nearly) doubly stochastic matrices, the constraint of mHC (arXiv 2512.24880, Eq 8). The definition: reference.py."""

from torch import Tensor

from byrote.kernels.sinkhorn import cpu, reference


def sinkhorn(logits_NRR: Tensor, *, iters: int, eps: float) -> Tensor:
    """Matrices [N, R, R] whose columns sum to 1, and rows too once `iters` is large. At least fp32; fp64 stays fp64.

    Raises ValueError for other shapes and for iters < 1.
    """
    if logits_NRR.dim() != 3 or logits_NRR.shape[1] != logits_NRR.shape[2]:
        raise ValueError(f"sinkhorn got logits of shape {tuple(logits_NRR.shape)}; it takes [N, R, R]: flatten batch and time first")
    if iters < 1:
        raise ValueError(f"sinkhorn got iters={iters}; at least 1 column step is needed")
    backend = cpu if cpu.can_run(logits_NRR) else reference
    return backend.sinkhorn(logits_NRR, iters=iters, eps=eps)
