"""Logits → (nearly) doubly stochastic matrices, the constraint of mHC (arXiv 2512.24880, Eq 8)."""

from byrote.kernels.sinkhorn.reference import sinkhorn

__all__ = ["sinkhorn"]
