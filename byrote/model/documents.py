"""Where documents begin. A document is a run of equal numbers in a row; −1 is padding.

    numbers      −1 −1  4  4  4  7  4        the last 4 is another document than the first: something stood between
    runs          0  0  1  1  1  2  3        how often the number has changed so far
    positions     0  1  0  1  2  0  0        tokens since the run began

Inside the model documents are known by their run, so that "same document" is an equality.

Shapes: B batch, T tokens.
"""

import torch
from torch import Tensor


def document_runs(number_BT: Tensor, last_number_B1: Tensor | None = None, last_run_B1: Tensor | None = None) -> Tensor:
    """int64 [B, T]; goes on from the token before, where there was one."""
    before_BT = torch.cat((number_BT[:, :1] if last_number_B1 is None else last_number_B1, number_BT[:, :-1]), dim=1)
    runs_BT = (number_BT != before_BT[:, : number_BT.shape[1]]).cumsum(1)
    return runs_BT if last_run_B1 is None else runs_BT + last_run_B1


def document_positions(number_BT: Tensor) -> Tensor:
    """int64 [B, T]."""
    batch, length = number_BT.shape
    index = torch.arange(length, device=number_BT.device).expand(batch, length)
    starts = torch.ones_like(number_BT, dtype=torch.bool)
    starts[:, 1:] = number_BT[:, 1:] != number_BT[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def mask_padding(run_BT: Tensor, number_BT: Tensor) -> Tensor:
    """The runs, −1 where there is padding."""
    return run_BT.masked_fill(number_BT < 0, -1)
