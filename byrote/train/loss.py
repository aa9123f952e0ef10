"""The training loss, composed from the model's unweighted terms.

loss = next_token + λ · mtp + balance + indexer      λ: mean over depths, V3 Eq 25; balance already carries its α; the indexer's
                                                     KL reaches nothing but the indexer
"""

from collections.abc import Mapping

from torch import Tensor


def total_loss(losses: Mapping[str, Tensor], mtp_weight: float) -> Tensor:
    """The scalar to differentiate."""
    total = losses["next_token"]
    if "mtp" in losses and mtp_weight > 0:
        total = total + mtp_weight * losses["mtp"]
    return sum((losses[name] for name in ("balance", "indexer") if name in losses), total)
