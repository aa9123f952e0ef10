"""One optimizer step on the table rows of a batch.

A row of a memory table is seen rarely and at random, so the two usual assumptions of Adam fail: that every parameter has a
gradient at every step, and that there is room for two moments per number. Both rules here count *visits of the row* instead of
steps of the run, and so a row seen for the first time at step 90,000 takes the same full-size first step as one seen at step 1.

rowwise, one number of state per row (row-wise Adagrad's idea with Adam's decay):

    v ← β₂ v + (1 − β₂) mean(g²)          mean over the numbers of the row
    n ← n + 1,   v̂ = v / (1 − β₂ⁿ)
    w ← w − η g / (√v̂ + ε)

adam, two numbers of state per number, [m | v] behind one another:

    m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²,   n ← n + 1
    w ← w − η m̂ / (√v̂ + ε)               both corrected with the row's own n

Example, rowwise: a new row with g = (3, −4), η = 0.1: mean(g²) = 12.5 = v̂ whatever β₂ is, so w moves by −0.1 · (3, −4) / 3.54,
an RMS of exactly η. There is no weight decay: a row that is not visited must not move (and is not even read).

Arithmetic is fp32 whatever the dtype of the rows. bf16 rows are rounded up or down by chance (`kernels.counter_random`):
rounded to nearest, an update below 1/512 of a number would be lost every time, by chance it is right on average. The chance is drawn
for (seed, row, n, column), so it is the same in every store and after every resume. Nothing is changed in place.

Shapes: U unique rows, E numbers in a row, S numbers of state per row (1 for rowwise, 2E for adam).
"""

import math
import sys

import torch
from torch import Tensor

from byrote.kernels.counter_random import round_to_bf16


def rowwise_update(
    vectors_UE: Tensor, grad_UE: Tensor, state_US: Tensor, visits_U: Tensor, rows_U: Tensor,
    *, lr: float, betas: tuple[float, float], eps: float, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the new (vectors, state, visits). β₁ has no place in this rule; only `betas[1]` is read. `rows_U`: global row ids."""
    grad_UE = grad_UE.float()
    state_U1 = torch.lerp(state_US, grad_UE.square().mean(1, keepdim=True), 1 - betas[1])
    visits_U = visits_U + 1
    root_U1 = (state_U1 / _bias_correction(betas[1], visits_U)).sqrt_().add_(eps)
    return _stored(_descend(vectors_UE, grad_UE, root_U1, lr), vectors_UE.dtype, rows_U, visits_U, seed), state_U1, visits_U


def adam_update(
    vectors_UE: Tensor, grad_UE: Tensor, state_US: Tensor, visits_U: Tensor, rows_U: Tensor,
    *, lr: float, betas: tuple[float, float], eps: float, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the new (vectors, state, visits)."""
    grad_UE = grad_UE.float()
    first_UE, second_UE = state_US.chunk(2, dim=1)
    first_UE = torch.lerp(first_UE, grad_UE, 1 - betas[0])
    second_UE = torch.lerp(second_UE, grad_UE.square(), 1 - betas[1])
    visits_U = visits_U + 1
    root_UE = (second_UE / _bias_correction(betas[1], visits_U)).sqrt_().add_(eps)
    moved_UE = _descend(vectors_UE, first_UE / _bias_correction(betas[0], visits_U), root_UE, lr)
    return _stored(moved_UE, vectors_UE.dtype, rows_U, visits_U, seed), torch.cat((first_UE, second_UE), dim=1), visits_U


def _bias_correction(beta: float, visits_U: Tensor) -> Tensor:
    """1 − βⁿ as [U, 1]. `expm1` because β = 0.999 and n = 1 would lose four of fp32's seven digits in the subtraction."""
    return -torch.expm1(visits_U.float() * math.log(max(beta, sys.float_info.min))).unsqueeze(1)


def _descend(vectors_UE: Tensor, direction_UE: Tensor, root: Tensor, lr: float) -> Tensor:
    return torch.addcdiv(vectors_UE.float(), direction_UE, root, value=-lr)


def _stored(moved_UE: Tensor, dtype: torch.dtype, rows_U: Tensor, visits_U: Tensor, seed: int) -> Tensor:
    if dtype == torch.bfloat16:
        return round_to_bf16(moved_UE, rows_U.to(moved_UE.device), visits_U, seed=seed)
    return moved_UE.to(dtype)
