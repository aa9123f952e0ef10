"""Two packs compared, made into one, and rows made smaller. All of it row by row, in the memory of a few thousand rows.

Merging adds up what two packs have learnt apart. Rows can be added up only if they mean the same: the same n-gram must hash to the same
row, and the same numbers must say the same through the projections. So both must be equal; a second pack is trained for it with the
first one's projections frozen (`byrote graft --like`). Per row, with visits n:

    both trained       w = (n_A w_A + n_B w_B) / (n_A + n_B)     in double precision; a conflict where w_A ≠ w_B
    one trained        its numbers
    neither            A's
    visits             n_A + n_B, at most 2³¹ − 1

Packs that are not alike can still be attached together: both add to the stream.

Shapes: U rows at a time, E numbers in a row, B bytes in a record.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byrote.config import to_dict
from byrote.errors import MemoryPackError
from byrote.memory.heavy import TopNgram
from byrote.memory.pack import LAYERS, PackFiles
from byrote.memory.records import RowFormat
from byrote.memory.table import Slab

ROWS_AT_ONCE = 1 << 15
_MOST_VISITS = 2**31 - 1
_NOT_COMPARED = ("format", "byrote", "name", "files", "table")


@dataclass
class Merged:
    """How many rows came from where; complete when all records were drawn."""

    only_a: int = 0
    only_b: int = 0
    both: int = 0
    conflicts: int = 0  # of those in both, whose numbers differed
    neither: int = 0


@dataclass
class Loss:
    """What was lost in other numbers for the same rows; complete when all records were drawn."""

    squared_error: float = 0.0
    squared: float = 0.0
    largest_error: float = 0.0
    largest: float = 0.0

    @property
    def relative(self) -> float:
        """Root of the squared error over the squared numbers."""
        return (self.squared_error / self.squared) ** 0.5 if self.squared else 0.0


class Difference(NamedTuple):
    fields: dict[str, tuple[Any, Any]]  # of the manifest, where they differ
    weights: dict[str, float | None]  # largest difference of each that differs; None: another shape, or only in one
    rows: int | None  # rows that differ; None: the hashes differ, so rows cannot be compared
    rows_rms: float  # root mean square of the difference over these rows


def merge(a: PackFiles, b: PackFiles, merged: Merged) -> Iterator[Tensor]:
    """The records of both, in A's format, while `merged` counts. MemoryPackError, before the first row, if they are not alike."""
    check_mergeable(a, b)
    return (_merge_rows(a.manifest.table.format, a.table.gather(rows_U), b.table.gather(rows_U), merged) for rows_U in all_rows(a))


def check_mergeable(a: PackFiles, b: PackFiles) -> None:
    """Raise MemoryPackError naming the first field in which two packs are not alike."""
    ours, theirs = a.manifest, b.manifest
    for field in ("hash", "layers", "module", "vocab_size", "pad_token", "tokenizer", "base"):
        _require_equal(a, b, field, getattr(ours, field), getattr(theirs, field))
    for field in ("dim", "dtype"):
        _require_equal(a, b, f"table.{field}", getattr(ours.table, field), getattr(theirs.table, field))
    if not (ours.table.counted and theirs.table.counted):
        raise MemoryPackError(
            "table.counted is false: quantized rows carry no visits to be weighted by. Merge the originals, then quantize"
        )
    if not _equal(a.canonical_V, b.canonical_V):
        raise MemoryPackError(f"the canonical maps differ, so the same token means another row. {_stack(a, b)}")
    unlike = [name for name in sorted({*a.weights, *b.weights}) if not _equal(a.weights.get(name), b.weights.get(name))]
    if unlike:
        raise MemoryPackError(
            f"{LAYERS} differs in {unlike[0]}: rows trained behind other projections cannot be added up. Train the second with "
            f"byrote graft --like A. {_stack(a, b)}"
        )


def _require_equal(a: PackFiles, b: PackFiles, field: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        raise MemoryPackError(f"{field} is {to_dict(ours)} in A and {to_dict(theirs)} in B; to be merged they must agree. {_stack(a, b)}")


def _stack(a: PackFiles, b: PackFiles) -> str:
    return f"Stacked, both speak: byrote memory attach RUN {a.folder} {b.folder}"


def _equal(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    same_form = ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return same_form and torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


def _merge_rows(form: RowFormat, a: Slab, b: Slab, merged: Merged) -> Tensor:
    in_a, in_b = a.visits_U > 0, b.visits_U > 0
    both_U, differ_U = in_a & in_b, (a.vectors_UE != b.vectors_UE).any(1)
    merged.only_a += int((in_a & ~in_b).sum())
    merged.only_b += int((in_b & ~in_a).sum())
    merged.both += int(both_U.sum())
    merged.conflicts += int((both_U & differ_U).sum())
    merged.neither += int((~in_a & ~in_b).sum())
    weight_a, weight_b = a.visits_U.double()[:, None], b.visits_U.double()[:, None]
    mean_UE = (weight_a * a.vectors_UE.double() + weight_b * b.vectors_UE.double()) / (weight_a + weight_b)
    vectors_UE = torch.where((in_b & ~in_a)[:, None], b.vectors_UE, a.vectors_UE)
    vectors_UE = torch.where((both_U & differ_U)[:, None], mean_UE.to(vectors_UE.dtype), vectors_UE)
    visits_U = (a.visits_U.long() + b.visits_U.long()).clamp(max=_MOST_VISITS).int()
    return form.encode(vectors_UE, visits_U=visits_U)


def merge_top(a: list[TopNgram], b: list[TopNgram], most: int) -> list[TopNgram]:
    """Both lists, times added up, the most visited first."""
    times: dict[tuple[str, int], int] = {}
    for entry in (*a, *b):
        times[entry.text, entry.order] = times.get((entry.text, entry.order), 0) + entry.times
    ranked = sorted(times.items(), key=lambda item: (-item[1], item[0]))
    return [TopNgram(text, order, count) for (text, order), count in ranked[:most]]


def quantize(pack: PackFiles, loss: Loss) -> tuple[RowFormat, Iterator[Tensor]]:
    """The rows in FP8, without their visits, while `loss` adds up what that costs."""
    form = replace(pack.manifest.table.format, dtype="fp8", counted=False)

    def records() -> Iterator[Tensor]:
        for rows_U in all_rows(pack):
            vectors_UE = pack.table.read(rows_U)
            records_UB = form.encode(vectors_UE)
            _add_loss(loss, vectors_UE.double(), form.decode_vectors(records_UB).double())
            yield records_UB

    return form, records()


def _add_loss(loss: Loss, was_UE: Tensor, is_UE: Tensor) -> None:
    error_UE = is_UE - was_UE
    loss.squared_error += float(error_UE.square().sum())
    loss.squared += float(was_UE.square().sum())
    loss.largest_error = max(loss.largest_error, float(error_UE.abs().max()))
    loss.largest = max(loss.largest, float(was_UE.abs().max()))


def diff(a: PackFiles, b: PackFiles) -> Difference:
    """Where two packs differ; rows are compared if both hash alike."""
    ours, theirs = (_flat(to_dict(replace(pack.manifest, files=()))) for pack in (a, b))
    ours, theirs = ({**flat, "table.dtype": pack.manifest.table.dtype} for flat, pack in ((ours, a), (theirs, b)))
    fields = {name: (ours.get(name), theirs.get(name)) for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)}
    weights = {
        name: _distance(a.weights.get(name), b.weights.get(name))
        for name in sorted({*a.weights, *b.weights})
        if not _equal(a.weights.get(name), b.weights.get(name))
    }
    if a.manifest.hash != b.manifest.hash or a.table.dim != b.table.dim:
        return Difference(fields, weights, None, 0.0)
    rows, squared = 0, 0.0
    for rows_U in all_rows(a):
        error_UE = a.table.read(rows_U).double() - b.table.read(rows_U).double()
        rows += int((error_UE != 0).any(1).sum())
        squared += float(error_UE.square().sum())
    return Difference(fields, weights, rows, (squared / (rows * a.table.dim)) ** 0.5 if rows else 0.0)


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    """Fields of the manifest, those of its parts with a dot; without what differs in any two packs."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if name not in _NOT_COMPARED:
            flat |= {f"{name}.{inner}": part for inner, part in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _distance(ours: Tensor | None, theirs: Tensor | None) -> float | None:
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return None
    return float((ours.double() - theirs.double()).abs().max()) if ours.numel() else 0.0


def all_rows(pack: PackFiles) -> Iterator[Tensor]:
    for start in range(0, pack.table.num_rows, ROWS_AT_ONCE):
        yield torch.arange(start, min(start + ROWS_AT_ONCE, pack.table.num_rows), device="cpu")
