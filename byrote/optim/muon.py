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
batch: the work is then bounded by matrix products and not by their number. `_batch_numbers` bounds the memory this takes.

Shapes: B matrices in a batch, M rows ≤ N columns.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byrote.errors import ConfigError
from byrote.kernels.orthogonalize import COEFFICIENTS, orthogonalize, working_dtype

Split = tuple[str, int] | None


class _Piece(NamedTuple):
    """Views [..., M, N] of a parameter, or of a part of its stack, and of what goes with it."""

    weight: Tensor
    grad: Tensor
    momentum: Tensor
    lr: float
    weight_decay: float


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

    def _batches(self) -> Iterator[list[_Piece]]:
        """Pieces whose matrices have one shape, as many at a time as `_batch_numbers` allows."""
        by_shape: dict[Any, list[_Piece]] = defaultdict(list)
        for piece in self._pieces():
            by_shape[piece.weight.shape[-2:], piece.weight.device].append(piece)
        for (_, device), pieces in by_shape.items():
            yield from _fill(pieces, _batch_numbers(device))

    def _pieces(self) -> Iterator[_Piece]:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    views = [matrices(x, group["split"]) for x in (param, param.grad, self._momentum_of(param))]
                    for weight, grad, momentum in _cut(views, _batch_numbers(param.device)):
                        yield _Piece(weight, grad, momentum, group["lr"], group["weight_decay"])

    def _step_batch(self, batch: list[_Piece]) -> None:
        update_BMN = self._advance(batch)
        dtype = self.ns_dtype or working_dtype(update_BMN.device)
        update_BMN = orthogonalize(update_BMN, coefficients=self.coefficients, dtype=dtype)
        scale = self.rms * math.sqrt(update_BMN.shape[-1])
        torch._foreach_mul_([piece.weight for piece in batch], [1 - piece.lr * piece.weight_decay for piece in batch])
        for piece, part in zip(batch, _parts(update_BMN, batch), strict=True):
            piece.weight.add_(part, alpha=-piece.lr * scale)

    def _advance(self, batch: list[_Piece]) -> Tensor:
        """Advances the momentum of the batch; returns G + μ B of all its matrices in fp32, [B, M, N]."""
        first = batch[0].weight
        count = sum(piece.weight.shape[:-2].numel() for piece in batch)
        update_BMN = torch.empty(count, *first.shape[-2:], dtype=torch.float32, device=first.device)
        for piece, part in zip(batch, _parts(update_BMN, batch), strict=True):
            torch.add(piece.grad, piece.momentum, alpha=self.momentum, out=piece.momentum)
            torch.add(piece.grad, piece.momentum, alpha=self.momentum, out=part)
        return update_BMN

    def _momentum_of(self, param: Tensor) -> Tensor:
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


def _batch_numbers(device: torch.device) -> int:
    """Numbers orthogonalised at once: on a CPU as many as stay in its cache, on a GPU as many as keep all its cores busy.

    Measured on one Zen 4 core, a step on 10M numbers (mostly experts of 128 × 256): 190 ms for any size from 2¹⁷ to 2²¹, 280 ms
    at 2²⁶, where every temporary is fresh memory whose pages must be faulted in.
    """
    return 1 << 20 if device.type == "cpu" else 1 << 26


def _cut(views: list[Tensor], numbers: int) -> Iterable[tuple[Tensor, ...]]:
    """Cuts stacks of more than `numbers` numbers along their first dimension; a single matrix stays whole."""
    if views[0].ndim == 2:
        return [tuple(views)]
    slices = max(1, numbers // views[0][0].numel())
    return zip(*(view.split(slices) for view in views), strict=True)


def _fill(pieces: list[_Piece], numbers: int) -> Iterator[list[_Piece]]:
    """Groups pieces in order into batches of at most `numbers` numbers, or of one piece."""
    batch: list[_Piece] = []
    room = numbers
    for piece in pieces:
        room -= piece.weight.numel()
        if batch and room < 0:
            yield batch
            batch, room = [], numbers - piece.weight.numel()
        batch.append(piece)
    yield batch


def _parts(stack_BMN: Tensor, batch: list[_Piece]) -> list[Tensor]:
    """Cuts a stack into views shaped like the pieces it is made of."""
    parts = stack_BMN.split([piece.weight.shape[:-2].numel() for piece in batch])
    return [part.view(piece.weight.shape) for part, piece in zip(parts, batch, strict=True)]
