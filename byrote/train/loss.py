"""The training loss, composed from the model's unweighted terms.

loss = next_token + λ · mtp + balance            λ: mean over depths, V3 Eq 25; balance already carries its α
"""

from collections.abc import Mapping

from torch import Tensor


def total_loss(losses: Mapping[str, Tensor], mtp_weight: float) -> Tensor:
    """The scalar to differentiate."""
    total = losses["next_token"]
    if "mtp" in losses and mtp_weight > 0:
        total = total + mtp_weight * losses["mtp"]
    return total + losses["balance"] if "balance" in losses else total
