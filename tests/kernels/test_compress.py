"""V4's compressor: the C kernel and the reference agree, both with a loop over slots, and gradients with finite differences."""

import pytest
import torch
from torch import Tensor

from byrote.kernels.compress import compress, cpu, reference
from tests.kernels.twins import assert_twins, need, random
from tests.tolerances import FP32, assert_close_fp32

SPAN = 4


def groups(batch: int, tokens: int, span: int = SPAN) -> tuple[Tensor, Tensor]:
    """Row 0: one document. Every other row: two, the second from token `span` + 1 on; what is left of the first makes no entry."""
    rows = []
    for row in range(batch):
        starts = (0,) if row == 0 else (0, span + 1)
        last = [
            (at, at == start + span - 1)
            for start, end in zip(starts, (*starts[1:], tokens), strict=True)
            for at in range(start + span - 1, end, span)
        ]
        rows.append(last)
    most = max(map(len, rows))
    padded = [row + [(-1, False)] * (most - len(row)) for row in rows]
    return torch.tensor([[at for at, _ in row] for row in padded]).view(batch, most), torch.tensor(
        [[opens for _, opens in row] for row in padded]
    ).view(batch, most)


def inputs(tokens: int, width: int, overlap: bool, *, span: int = SPAN, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    channels = 2 * width if overlap else width
    return [random(2, tokens, channels, dtype=dtype), random(2, tokens, channels, seed=1, dtype=dtype), random(span, channels, seed=2)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(6, 1), (9, 7), (35, 40), (257, 16)])
def test_c_is_the_references_twin(tokens: int, width: int, overlap: bool, dtype: torch.dtype) -> None:
    need(cpu.library)
    last_BE, opens_BE = groups(2, tokens)

    def with_(backend: object) -> object:
        return lambda *parts: backend.compress(*parts, last_BE, opens_BE, overlap=overlap)

    assert_twins(with_(cpu), with_(reference), inputs(tokens, width, overlap, dtype=dtype))


@pytest.mark.parametrize("overlap", [False, True])
def test_an_entry_is_the_softmax_over_its_slots(overlap: bool) -> None:
    values, gates, bias = inputs(23, 3, overlap)
    last_BE, opens_BE = groups(2, 23)
    got_BEW = compress(values, gates, bias, last_BE, opens_BE, overlap=overlap)
    for row in range(2):
        for entry, (last, opens) in enumerate(zip(last_BE[row].tolist(), opens_BE[row].tolist(), strict=True)):
            own = [(last - SPAN + 1 + place, place, 3 if overlap else 0) for place in range(SPAN)] if last >= 0 else []
            before = [(at - SPAN, place, 0) for at, place, _ in own] if overlap and not opens else []
            for channel in range(3):
                weights = [(gates[row, at, half + channel] + bias[place, half + channel]).exp() for at, place, half in before + own]
                terms = [weight * values[row, at, half + channel] for weight, (at, _, half) in zip(weights, before + own, strict=True)]
                want = sum(terms) / sum(weights) if terms else torch.tensor(0.0)
                assert abs(got_BEW[row, entry, channel] - want) <= FP32 * values.abs().max()


@pytest.mark.parametrize("overlap", [False, True])
def test_gradients_are_those_of_finite_differences(overlap: bool) -> None:
    parts = [part.double().requires_grad_() for part in inputs(13, 2, overlap)]
    last_BE, opens_BE = groups(2, 13)
    assert torch.autograd.gradcheck(lambda *leaves: compress(*leaves, last_BE, opens_BE, overlap=overlap), parts)


def test_large_gates_neither_overflow_nor_vanish() -> None:
    values, gates, _ = inputs(8, 5, True)
    last_BE, opens_BE, bias = *groups(2, 8), torch.zeros(SPAN, 10)
    for shift in (-3e4, 3e4):
        got = compress(values, gates + shift, bias, last_BE, opens_BE, overlap=True)
        want = reference.compress(values.double(), (gates + shift).double(), bias.double(), last_BE, opens_BE, overlap=True).float()
        assert_close_fp32(got, want)


def test_no_entries_and_no_tokens_are_fine() -> None:
    values, gates, bias = inputs(3, 5, False)
    none = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.bool)
    assert compress(values, gates, bias, *none, overlap=False).shape == (2, 0, 5)
    assert compress(values[:, :0], gates[:, :0], bias, *none, overlap=False).shape == (2, 0, 5)


def test_shapes_that_do_not_fit_are_refused() -> None:
    values, gates, bias = inputs(9, 3, False)
    last_BE, opens_BE = groups(2, 9)
    for wrong in (
        (values, gates[:, 1:], bias, last_BE, opens_BE),
        (values, gates, bias[:, 1:], last_BE, opens_BE),
        (values, gates, bias, last_BE, last_BE),
    ):
        with pytest.raises(ValueError, match="compress got"):
            compress(*wrong, overlap=False)
    with pytest.raises(ValueError, match="compress got"):
        compress(values, gates, bias, last_BE, opens_BE, overlap=True)
