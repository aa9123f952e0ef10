"""The grouped product: every back end against the loop over experts, whatever the experts' loads."""

import pytest
import torch

from byrote.kernels.grouped_matmul import cpu, grouped_matmul, reference, windows
from tests.kernels.twins import DTYPES, assert_twins, need, pull_back, random
from tests.tolerances import assert_bitwise, assert_close_bf16, assert_close_fp32

LOADS = {  # rows of each expert
    "one row": (1,),
    "one expert": (257,),
    "none, one, seven": (0, 1, 0, 7, 0),
    "uneven": (3, 0, 130, 64, 257, 1),
    "all to the last": (0, 0, 0, 300),
}
WIDTHS = [(1, 1), (7, 5), (33, 80), (64, 64), (128, 257)]  # inputs, outputs


def ends(load: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(load).cumsum(0).to(torch.int32)


def inputs(load: tuple[int, ...], D: int, F: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [random(sum(load), D, dtype=dtype), random(len(load), F, D, seed=1, dtype=dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "F"), WIDTHS)
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_native_is_reference(load, D, F, dtype):
    need(cpu.library)
    assert_twins(lambda x, w: cpu.grouped_matmul(x, w, ends(load)), lambda x, w: reference(x, w, ends(load)), inputs(load, D, F, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "F"), WIDTHS)
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_what_serves_without_native_code_is_reference(load, D, F, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "can_run", lambda *_: False)
    assert_twins(lambda x, w: grouped_matmul(x, w, ends(load)), lambda x, w: reference(x, w, ends(load)), inputs(load, D, F, dtype))


@pytest.mark.parametrize("backend", ["native", "plain"])
def test_a_weight_wider_than_the_rows_is_rounded_and_its_gradient_is_not(backend, monkeypatch):
    if backend == "plain":
        monkeypatch.setattr(cpu, "can_run", lambda *_: False)
    load = LOADS["uneven"]
    x, weight = random(sum(load), 64, dtype=torch.bfloat16), random(len(load), 48, 64, seed=1)
    outputs, grads = pull_back(lambda x, w: grouped_matmul(x, w, ends(load)), [x, weight])
    wanted_outputs, wanted_grads = pull_back(lambda x, w: reference(x, w, ends(load)), [x.double(), weight.bfloat16().double()])
    for got, want in zip((*outputs, *grads), (*wanted_outputs, *wanted_grads), strict=True):
        assert_close_bf16(got, want)
    assert grads[1].dtype == torch.float32
    if cpu.can_run(x, weight, ends(load)):
        assert_close_fp32(grads[1], wanted_grads[1])


def test_rows_and_cotangents_may_be_slices_of_wider_tensors():
    need(cpu.library)
    load = LOADS["uneven"]
    wide_x, weight = random(sum(load), 100), random(len(load), 30, 64, seed=1)

    def sliced(function):
        return lambda x, w: torch.cat((function(x[:, 20:84], w, ends(load)), x[:, :3]), dim=1)

    assert_twins(sliced(cpu.grouped_matmul), sliced(reference), [wide_x, weight])


def test_an_expert_without_rows_has_no_gradient():
    load = LOADS["none, one, seven"]
    weight = random(len(load), 5, 8, seed=1).requires_grad_()
    grouped_matmul(random(8, 8), weight, ends(load)).sum().backward()
    assert [bool(part.any()) for part in weight.grad] == [rows > 0 for rows in load]


def test_zero_rows_keep_the_graph():
    x, weight = torch.zeros(0, 8, requires_grad=True), torch.ones(3, 5, 8, requires_grad=True)
    out = grouped_matmul(x, weight, ends((0, 0, 0)))
    out.sum().backward()
    assert out.shape == (0, 5) and x.grad.shape == (0, 8) and not weight.grad.any()


def test_any_number_of_threads_gives_the_same_bits():
    need(cpu.library)
    load, before, results = (700, 3, 0, 297), torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            results.append(pull_back(lambda x, w: cpu.grouped_matmul(x, w, ends(load)), inputs(load, 128, 96, torch.bfloat16)))
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip((*other[0], *other[1]), (*results[0][0], *results[0][1]), strict=True):
            assert_bitwise(got, want)


def test_a_bad_number_spoils_its_own_row_only():
    need(cpu.library)
    x, weight = inputs(LOADS["uneven"], 64, 32)
    x[200, 5] = float("nan")
    out = cpu.grouped_matmul(x, weight, ends(LOADS["uneven"]))
    assert out[200].isnan().all()
    assert out[torch.arange(len(x)) != 200].isfinite().all()


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_windows_hold_each_experts_rows_and_stay_inside(load):
    rows = sum(load)
    for window in windows.windows(ends(load).tolist(), rows):
        assert 0 <= window.first <= window.start < window.stop <= window.last <= rows


@pytest.mark.parametrize(
    ("x", "weight", "ends_E"),
    [((4, 8), (2, 5, 7), [1, 4]), ((4, 8), (2, 5, 8), [4]), ((4, 8), (2, 5, 8), [1, 3]), ((8,), (2, 5, 8), [1, 4])],
)
def test_what_does_not_fit_is_refused(x, weight, ends_E):
    with pytest.raises(ValueError, match=r"needed|prefix sum"):
        grouped_matmul(torch.zeros(x), torch.zeros(weight), torch.tensor(ends_E, dtype=torch.int32))
