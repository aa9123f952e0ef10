"""One optimizer step, from micro-batches to updated weights and rows. Knows no files, no clock and no console.

for each micro-batch: forward (autocast) → total loss · its share of the step's scored tokens → backward
row gradients of the micro-batches are summed; the clipping norm covers them and all parameters
a loss or gradient that is not finite stops here, before anything is changed, and is named
Muon and AdamW move the parameters, the row-wise optimizer the touched rows, the router biases take one balancing step
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from byrote.errors import TrainingError
from byrote.kernels.cross_entropy import IGNORE
from byrote.memory.conditional import PendingRows, Rows
from byrote.model.transformer import Model, Output
from byrote.optim.clip import clip_gradients
from byrote.optim.groups import Optimizers, build_optimizers
from byrote.optim.rowwise import RowGradient, RowwiseOptimizer, accumulate_rows
from byrote.optim.schedule import lr_scale, mtp_weight
from byrote.train import stages
from byrote.train.loss import total_loss
from byrote.train.precision import autocast
from byrote.train.run import RunConfig


class MicroBatch(Protocol):
    @property
    def tokens_BT(self) -> Tensor: ...
    @property
    def targets_BT(self) -> Tensor: ...
    @property
    def document_BT(self) -> Tensor | None: ...


class StepResult(NamedTuple):
    losses: dict[str, Tensor]  # of the whole step, each term without its weight
    grad_norm: Tensor
    lr_scale: float
    mtp_weight: float
    rows_touched: int
    loads: dict[str, Tensor]  # tokens per expert


class Trainer:
    """Model and optimizers of a run of `total_steps` steps; `step` does one."""

    def __init__(self, model: Model, config: RunConfig, total_steps: int) -> None:
        self.model, self.config, self.total_steps = model, config, total_steps
        self.device = model.embed.weight.device
        self.optimizers: Optimizers = build_optimizers(model, config.optim)
        self.rows = self._row_optimizer()
        self._first_stage = stages.initial_stage(model, config.train.index_warmup)
        self._stage = ""

    def _row_optimizer(self) -> RowwiseOptimizer | None:
        if self.model.memory is None:
            return None
        o = self.config.optim
        store, lr, seed = self.model.memory.store, o.adam_lr * o.table_lr_scale, self.config.train.seed
        return RowwiseOptimizer(store, lr=lr, betas=o.table_betas, eps=o.eps, rule=o.table_rule, seed=seed)

    def step(self, index: int, batches: Sequence[MicroBatch], pending: Sequence[PendingRows] = ()) -> StepResult:
        """Train on `batches` as step `index`. `pending`: their memory rows, where they are being read already (`read_ahead`).

        Raises TrainingError, with nothing changed, when a number is not finite.
        """
        o, mtp = self.config.optim, self.model.config.mtp
        scale = lr_scale(index, self.total_steps, o)
        weight = 0.0 if mtp is None else mtp_weight(index, self.total_steps, mtp.loss_weight, self.config.train.mtp_final_weight, o)
        self.model.train()
        self._enter_stage(index)
        shares = scored_shares(batches)
        rows: Sequence[PendingRows | None] = pending or [None] * len(batches)
        outputs = [self._forward_backward(*each, weight) for each in zip(batches, rows, shares, strict=True)]
        losses = {name: torch.stack([out.losses[name].detach() * s for out, s in zip(outputs, shares)]).sum() for name in outputs[0].losses}
        row_grad = self._row_gradient(outputs)
        norm = self._clip([] if row_grad is None else [row_grad.grad_UE])
        if not torch.stack([norm.float(), *(loss.float() for loss in losses.values())]).isfinite().all():
            raise TrainingError(self._first_bad(index, outputs, row_grad))
        self._update(scale, row_grad)
        loads = _sum_loads(outputs)
        if self._stage != stages.WARMUP:
            self.model.update_balance(loads)
        return StepResult(losses, norm, scale, weight, 0 if row_grad is None else len(row_grad.rows_U), loads)

    def _enter_stage(self, index: int) -> None:
        stage = stages.stage_at(index, self.total_steps, self.config.train.index_warmup, self._first_stage)
        if stage != self._stage:
            stages.enter(self.model, stage)
            self._stage = stage

    def _clip(self, row_grads: list[Tensor]) -> Tensor:
        """Indexers by themselves: their loss is another one, and must not shorten the step of the rest. Returns the norm of all."""
        parts: dict[bool, list[Tensor]] = {False: [], True: []}
        for name, parameter in self.model.named_parameters():
            parts[stages.is_indexers(name)].append(parameter)
        norm = clip_gradients(parts[False], row_grads, self.config.optim.clip_norm)
        return torch.hypot(norm, clip_gradients(parts[True], [], self.config.optim.clip_norm)) if parts[True] else norm

    def read_ahead(self, batches: Iterable[MicroBatch]) -> list[PendingRows]:
        """Begin to read the memory rows of a coming step."""
        memory = self.model.memory
        return [] if memory is None else [memory.prefetch(batch.tokens_BT, batch.document_BT) for batch in batches]

    def _forward_backward(self, batch: MicroBatch, pending: PendingRows | None, share: float, weight: float) -> Output:
        tokens_BT = batch.tokens_BT.to(self.device, non_blocking=True)
        targets_BT = batch.targets_BT.to(self.device, non_blocking=True)
        document_BT = None if batch.document_BT is None else batch.document_BT.to(self.device, non_blocking=True)
        with autocast(self.device, self.config.train.precision):
            rows = self._read(tokens_BT, document_BT, pending)
            out = self.model(tokens_BT, targets_BT=targets_BT, document_BT=document_BT, rows=rows)
            loss = out.losses["indexer"] if self._stage == stages.WARMUP else total_loss(out.losses, weight)
        (loss * share).backward()
        return out

    def _read(self, tokens_BT: Tensor, document_BT: Tensor | None, pending: PendingRows | None) -> Rows | None:
        """The memory rows; they learn with the rest."""
        memory = self.model.memory
        if memory is None:
            return None
        with torch.set_grad_enabled(self._stage != stages.WARMUP):
            return memory.fetch(tokens_BT, document_BT) if pending is None else pending.wait()

    def _row_gradient(self, outputs: Sequence[Output]) -> RowGradient | None:
        parts = [
            RowGradient(out.rows.rows_U, out.rows.vectors_UE.grad, out.rows.slab)
            for out in outputs
            if out.rows is not None and out.rows.vectors_UE.grad is not None
        ]
        return accumulate_rows(parts) if parts else None

    def _update(self, scale: float, row_grad: RowGradient | None) -> None:
        self.optimizers.set_lr(scale)
        self.optimizers.step()
        self.optimizers.zero_grad()
        if self.rows is not None and row_grad is not None:
            self.rows.set_lr(scale)
            self.rows.step(*row_grad)

    def _first_bad(self, index: int, outputs: Sequence[Output], row_grad: RowGradient | None) -> str:
        self_named = next(self._bad_names(outputs, row_grad), "the gradient norm")
        self.optimizers.zero_grad()
        return (
            f"step {index}: {self_named} is not finite. Nothing was updated in this step. Lower optim.lr and optim.adam_lr, "
            "raise optim.warmup_fraction, or look at the batch of this step"
        )

    def _bad_names(self, outputs: Sequence[Output], row_grad: RowGradient | None) -> Iterator[str]:
        """In the order of cause and effect: what was there before, then losses, then gradients."""
        yield from (f"the parameter {name}" for name, param in self.model.named_parameters() if not torch.isfinite(param).all())
        for rows in (out.rows for out in outputs if out.rows is not None):
            yield from (f"the memory row {row}" for row in rows.rows_U[~rows.vectors_UE.isfinite().all(1)].tolist())
        for out in outputs:
            yield from (f"the loss term {name!r}" for name, loss in out.losses.items() if not torch.isfinite(loss))
        for name, param in self.model.named_parameters():
            if param.grad is not None and not torch.isfinite(param.grad).all():
                yield f"the gradient of {name}"
        if row_grad is not None and not torch.isfinite(row_grad.grad_UE).all():
            yield "the gradient of the memory rows"


def scored_shares(batches: Sequence[MicroBatch]) -> list[float]:
    """Each micro-batch's share of the scored tokens, so that several small ones train like one big one; they sum to 1."""
    scored = [int((batch.targets_BT != IGNORE).sum()) for batch in batches]
    total = sum(scored)
    return [count / total for count in scored] if total else [1 / len(batches)] * len(batches)


def _sum_loads(outputs: Sequence[Output]) -> dict[str, Tensor]:
    return {name: torch.stack([out.loads[name] for out in outputs]).sum(0) for name in outputs[0].loads}
