"""Muon: momentum, orthogonalised, one matrix at a time (arXiv 2502.16982 §2; V4 Alg. 1).

    B ← μ B + G                              momentum
    O = NewtonSchulz(G + μ B)                Nesterov's look-ahead, singular values ≈ 1
    W ← W − η λ W − η γ √max(rows, cols) O   decoupled weight decay; the update has RMS γ

An orthogonal rows × cols matrix has RMS 1/√max(rows, cols), so the last factor makes the size of an update independent of the
shape. γ = 0.2 (Moonlight) is what AdamW's updates measure, hence η and λ can be shared with AdamW; V4 takes γ = 0.18 and the
longer iteration (`coefficients="hybrid8+2"`). `torch.optim.Muon` averages momentum, B ← μ B + (1 − μ) G: the same direction,
(1 − μ) times as long, and the iteration does not see the length.

**What is one matrix?** Orthogonalising mixes every row with every other, so it must see what the network uses as one linear map.
A parameter of three dimensions is a stack (experts [E, out, in]) and each slice is a matrix. A parameter may also hold several
side by side; its group says so with `split`:

    ("rows", H)   [H · out, in]   → H matrices [out, in]     heads of an up-projection; the two halves of a fused gate and up
    ("cols", H)   [out, H · in]   → H matrices [out, in]     heads of an output projection

**Speed.** All matrices of one shape, over all parameters (a tall one counts as its transpose), go through the iteration as one
batch: the work is then bounded by matrix products and not by their number. `_BATCH_NUMBERS` bounds the memory this takes.

Shapes: B matrices in a batch, M rows ≤ N columns.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from byrote.errors import ConfigError
from byrote.kernels.orthogonalize import COEFFICIENTS, orthogonalize, working_dtype

Split = tuple[str, int] | None
Entry = tuple[Tensor, dict[str, Any]]  # a parameter and its group

_BATCH_NUMBERS = 1 << 26  # numbers orthogonalised at once: 0.25 GB in fp32, about thrice that with the products


class Muon(torch.optim.Optimizer):
    """Groups carry `lr`, `weight_decay` and `split`; the rest is the same for all.

    `ns_dtype` None takes the dtype in which the device multiplies fastest. `momentum_dtype` bf16 halves the state. Parameters
    without a gradient are left alone.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        rms: float = 0.2,
        coefficients: str = "quintic5",
        ns_dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype = torch.float32,
    ) -> None:
        if coefficients not in COEFFICIENTS:
            raise ConfigError(f"newton_schulz is {coefficients!r}; allowed: {', '.join(COEFFICIENTS)}")
        self.momentum, self.rms, self.coefficients = momentum, rms, coefficients
        self.ns_dtype, self.momentum_dtype = ns_dtype, momentum_dtype
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "split": None})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            _check_split(param.shape, group["split"])

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the training loop runs the backward passes
        for batch in self._batches():
            self._step_batch(batch)

    def _batches(self) -> Iterator[list[Entry]]:
        """Parameters whose matrices have the same shape, at most `_BATCH_NUMBERS` numbers at a time."""
        by_shape: dict[Any, list[Entry]] = defaultdict(list)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    by_shape[matrices(param, group["split"]).shape[-2:], param.device].append((param, group))
        for entries in by_shape.values():
            yield from _chunks(entries)

    def _step_batch(self, batch: list[Entry]) -> None:
        update_BMN = self._nesterov(batch)
        dtype = self.ns_dtype or working_dtype(update_BMN.device)
        update_BMN = orthogonalize(update_BMN, coefficients=self.coefficients, dtype=dtype)
        scale = self.rms * math.sqrt(update_BMN.shape[-1])
        torch._foreach_mul_([param for param, _ in batch], [1 - group["lr"] * group["weight_decay"] for _, group in batch])
        targets = [matrices(param, group["split"]) for param, group in batch]
        for target, part, (_, group) in zip(targets, _parts(update_BMN, targets), batch, strict=True):
            target.add_(part, alpha=-group["lr"] * scale)

    def _nesterov(self, batch: list[Entry]) -> Tensor:
        """Advances the momentum of the batch; returns G + μ B of all its matrices in fp32, [B, M, N]."""
        grads = [matrices(param.grad, group["split"]) for param, group in batch]
        buffers = [matrices(self._buffer(param), group["split"]) for param, group in batch]
        count = sum(grad.shape[:-2].numel() for grad in grads)
        update_BMN = torch.empty(count, *grads[0].shape[-2:], dtype=torch.float32, device=grads[0].device)
        for grad, buffer, part in zip(grads, buffers, _parts(update_BMN, grads), strict=True):
            torch.add(grad, buffer, alpha=self.momentum, out=buffer)
            torch.add(grad, buffer, alpha=self.momentum, out=part)
        return update_BMN

    def _buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param, dtype=self.momentum_dtype)
        return state["momentum"]


def matrices(param: Tensor, split: Split) -> Tensor:
    """A view [..., M, N] of the matrices that `param` holds, each lying on its long side (M ≤ N)."""
    if split is not None:
        axis, count = split
        param = param.unflatten(-2, (count, -1)) if axis == "rows" else param.unflatten(-1, (count, -1)).transpose(-3, -2)
    return param.mT if param.shape[-2] > param.shape[-1] else param


def _check_split(shape: torch.Size, split: Split) -> None:
    if len(shape) < 2:
        raise ConfigError(f"Muon takes matrices and stacks of matrices; got a parameter of shape {tuple(shape)}: give it to AdamW")
    if split is None:
        return
    axis, count = split
    if axis not in ("rows", "cols"):
        raise ConfigError(f"split axis is {axis!r}; allowed: rows, cols")
    size = shape[-2] if axis == "rows" else shape[-1]
    if count < 1 or size % count:
        raise ConfigError(f"a parameter of shape {tuple(shape)} cannot be split into {count} equal blocks of {axis}")


def _parts(stack_BMN: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Cuts a stack into views shaped like each tensor of `like`."""
    parts = stack_BMN.split([tensor.shape[:-2].numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _chunks(entries: list[Entry]) -> Iterator[list[Entry]]:
    chunk: list[Entry] = []
    numbers = 0
    for entry in entries:
        if chunk and numbers + entry[0].numel() > _BATCH_NUMBERS:
            yield chunk
            chunk, numbers = [], 0
        chunk.append(entry)
        numbers += entry[0].numel()
    yield chunk
