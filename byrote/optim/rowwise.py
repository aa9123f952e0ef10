"""The optimizer of the memory table: only the rows of the batch are read, changed and written.

A table of ten million rows trains at the price of the few thousand a batch touches. Autograd sees those rows as one small leaf;
its gradient and the row ids come here, once per optimizer step, already summed over micro-batches (`accumulate_rows`) and clipped.
The arithmetic is in `byrote.kernels.rowwise_update`; this file joins it to a store, which may lie anywhere.

Shapes: U unique rows in ascending order, E numbers in a row, S numbers of optimizer state per row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from byrote.errors import ConfigError
from byrote.kernels.rowwise_update import adam_update, rowwise_update
from byrote.memory.table import Slab, TableStore

_RULES = {"rowwise": rowwise_update, "adam": adam_update}


class RowGradient(NamedTuple):
    """Unique row ids in ascending order, the gradient of each, and what was read of them, where that is still at hand."""

    rows_U: Tensor
    grad_UE: Tensor
    slab: Slab | None = None


def state_dim(rule: str, dim: int) -> int:
    """Numbers of optimizer state a store must keep for a row of `dim` numbers."""
    if rule not in _RULES:
        raise ConfigError(f"optim.table_rule is {rule!r}; allowed: {', '.join(_RULES)}")
    return 1 if rule == "rowwise" else 2 * dim


def accumulate_rows(parts: Sequence[RowGradient]) -> RowGradient:
    """Sums the gradients of micro-batches, in fp32 and in their order, so that the sum is the same at every run.

    The rows of one part are unique and ascending. Parts overlap, so of several the rows must be read once more.
    """
    if len(parts) == 1:
        return parts[0]
    rows_U = torch.unique(torch.cat([part.rows_U for part in parts]))
    grad_UE = parts[0].grad_UE.new_zeros(len(rows_U), parts[0].grad_UE.shape[1], dtype=torch.float32)
    for rows, grad, _ in parts:
        grad_UE.index_add_(0, torch.searchsorted(rows_U, rows).to(grad.device), grad.float())
    return RowGradient(rows_U, grad_UE)


class RowwiseOptimizer:
    """`rule` "rowwise" keeps one number per row, "adam" two moments per number. `set_lr` scales the peak `lr` as the schedule says."""

    def __init__(
        self, store: TableStore, *, lr: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, rule: str = "rowwise",
        seed: int = 0,
    ) -> None:  # fmt: skip
        need = state_dim(rule, store.dim)
        if store.state_dim != need:
            raise ConfigError(
                f"rule {rule!r} needs a table with {need} numbers of state per row, this one has {store.state_dim}; "
                f"build it with state_dim={need}"
            )
        self.store, self.rule = store, rule
        self.peak_lr = self.lr = lr
        self.betas, self.eps, self.seed = betas, eps, seed

    def set_lr(self, scale: float) -> None:
        self.lr = self.peak_lr * scale

    @torch.no_grad()
    def step(self, rows_U: Tensor, grad_UE: Tensor, slab: Slab | None = None) -> None:
        """Updates the rows `rows_U` (unique, ascending) and no other. All state lives in the store; `slab` is what it holds, if known."""
        slab = self.store.gather(rows_U) if slab is None else slab
        assert grad_UE.shape == slab.vectors_UE.shape, f"gradient {tuple(grad_UE.shape)} for rows {tuple(slab.vectors_UE.shape)}"
        update = _RULES[self.rule]
        updated = update(slab.vectors_UE, grad_UE, *slab[1:], rows_U, lr=self.lr, betas=self.betas, eps=self.eps, seed=self.seed)
        self.store.put(rows_U, Slab(*updated))
