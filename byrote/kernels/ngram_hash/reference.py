"""The hash of `memory/ngram.py`, with all its numbers handed to it.

Shapes: B batch, T tokens, S = M − 1 + T (history first), L memory layers, M orders with the first (max_order), H heads, N = (M − 1) · H.
"""

import torch
from torch import Tensor


def hash_rows(
    ids_BS: Tensor, document_BS: Tensor | None, *, pad: int, vocab: int, multipliers_LM: Tensor, primes_LNH: Tensor, starts_LN: Tensor
) -> Tensor | None:
    """See the package."""
    if ids_BS.numel() and bool(((ids_BS < 0) | (ids_BS >= vocab)).any()):
        return None
    products_LMBT = _suffixes(ids_BS, document_BS, multipliers_LM.shape[1], pad).unsqueeze(0) * multipliers_LM[:, :, None, None]
    mix_LBT = products_LMBT[:, 0]
    per_order = []
    for order in range(1, multipliers_LM.shape[1]):
        mix_LBT = mix_LBT ^ products_LMBT[:, order]
        per_order.append(mix_LBT[..., None] % primes_LNH[:, order - 1][:, None, None, :])
    rows_LBTN = torch.cat(per_order, dim=-1) + starts_LN[:, None, None, :]
    return rows_LBTN.permute(1, 2, 0, 3).contiguous()


def _suffixes(ids_BS: Tensor, document_BS: Tensor | None, orders: int, pad: int) -> Tensor:
    """[M, B, T]: slot i holds the id i positions back, or the pad class beyond a border."""
    reach = orders - 1
    length = ids_BS.shape[1] - reach
    slots = [ids_BS[:, reach - back : reach - back + length] for back in range(orders)]
    if document_BS is None or length == 0:
        return torch.stack(slots)
    blocked = torch.zeros_like(slots[0], dtype=torch.bool)
    for back in range(1, orders):
        blocked = blocked | (document_BS[:, reach - back : reach - back + length] != document_BS[:, reach:])
        slots[back] = slots[back].masked_fill(blocked, pad)
    return torch.stack(slots)
