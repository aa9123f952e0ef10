"""The table optimizer together with a store: what moves, what must not, and what micro-batches add up to."""

import pytest
import torch

from byrote.errors import ConfigError
from byrote.memory.table import DeviceTable
from byrote.optim.rowwise import RowGradient, RowwiseOptimizer, accumulate_rows, state_dim
from tests.tolerances import assert_bitwise, assert_close_fp32

DIM = 5
RULES = ("rowwise", "adam")


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _table(rule: str, num_rows: int = 23, dtype: torch.dtype = torch.float32) -> DeviceTable:
    return DeviceTable(num_rows, DIM, state_dim=state_dim(rule, DIM), dtype=dtype, std=0.02)


def _snapshot(table: DeviceTable) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in (table.vectors_NE, table.state_NS, table.visits_N)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_rows_that_are_not_visited_are_bitwise_unchanged(rule, dtype):
    table = _table(rule, dtype=dtype)
    rows_U = torch.tensor([0, 3, 22])
    before = _snapshot(table)
    RowwiseOptimizer(table, lr=0.1, rule=rule).step(rows_U, _randn(3, DIM))
    visited = torch.isin(torch.arange(23), rows_U)
    for now, then in zip(_snapshot(table), before, strict=True):
        assert_bitwise(now[~visited], then[~visited])
        assert (now[visited] != then[visited]).all()


@pytest.mark.parametrize("rule", RULES)
def test_the_same_batch_twice_running_counts_twice(rule):
    table = _table(rule)
    rows_U, grad_UE = torch.tensor([1, 7]), _randn(2, DIM)
    optimizer = RowwiseOptimizer(table, lr=0.1, rule=rule)
    start = table.vectors_NE.clone()
    optimizer.step(rows_U, grad_UE)
    middle = table.vectors_NE.clone()
    optimizer.step(rows_U, grad_UE)
    assert table.visits_N[rows_U].tolist() == [2, 2]
    # With an unchanging gradient the corrected moments do not change either: both steps are the same.
    assert_close_fp32(table.vectors_NE - middle, middle - start)


@pytest.mark.parametrize("rule", RULES)
def test_a_row_first_seen_late_moves_as_one_seen_first(rule):
    table = _table(rule)
    optimizer = RowwiseOptimizer(table, lr=0.1, rule=rule)
    grad = _randn(1, DIM)
    start = table.vectors_NE.clone()
    optimizer.step(torch.tensor([0]), grad)
    for step in range(9):
        optimizer.step(torch.tensor([5]), _randn(1, DIM, seed=step))
    optimizer.step(torch.tensor([9]), grad)
    assert_close_fp32(table.vectors_NE[9] - start[9], table.vectors_NE[0] - start[0])


@pytest.mark.parametrize("rule", RULES)
def test_no_rows_is_a_step_that_changes_nothing(rule):
    table = _table(rule)
    before = _snapshot(table)
    RowwiseOptimizer(table, lr=0.1, rule=rule).step(torch.zeros(0, dtype=torch.int64), torch.zeros(0, DIM))
    for now, then in zip(_snapshot(table), before, strict=True):
        assert_bitwise(now, then)


def test_only_the_rows_of_the_batch_are_read_and_written():
    class Spy(DeviceTable):
        seen = ()

        def gather(self, rows_U):
            self.seen += (("gather", len(rows_U)),)
            return super().gather(rows_U)

        def put(self, rows_U, slab):
            self.seen += (("put", len(slab.vectors_UE)),)
            super().put(rows_U, slab)

    table = Spy(1000, DIM)
    RowwiseOptimizer(table, lr=0.1).step(torch.tensor([2, 999]), _randn(2, DIM))
    assert table.seen == (("gather", 2), ("put", 2))


@pytest.mark.parametrize("rule", RULES)
def test_a_slab_that_was_read_before_spares_the_second_reading(rule, monkeypatch):
    table, twin = _table(rule), _table(rule)
    rows_U, grad_UE = torch.tensor([1, 7]), _randn(2, DIM)
    RowwiseOptimizer(twin, lr=0.1, rule=rule).step(rows_U, grad_UE)
    slab = table.gather(rows_U)
    monkeypatch.setattr(table, "gather", lambda rows: pytest.fail("the rows were read twice"))
    RowwiseOptimizer(table, lr=0.1, rule=rule).step(rows_U, grad_UE, slab)
    for got, want in zip(_snapshot(table), _snapshot(twin), strict=True):
        assert_bitwise(got, want)


def test_updates_too_small_for_bf16_are_kept_on_average():
    table = DeviceTable(4096, DIM, dtype=torch.bfloat16)
    table.vectors_NE.fill_(1.0)
    optimizer = RowwiseOptimizer(table, lr=2.0**-11, eps=0.0, seed=3)  # a quarter of the distance to the next bf16 below 1
    for _ in range(8):
        optimizer.step(torch.arange(4096), torch.ones(4096, DIM))
    moved = 1 - table.vectors_NE.double().mean().item()
    assert abs(moved - 8 * 2.0**-11) < 1e-4, "rounded to nearest, nothing would have moved"


def test_set_lr_scales_the_peak():
    table = _table("rowwise")
    optimizer = RowwiseOptimizer(table, lr=0.1, eps=0.0)
    for scale in (0.5, 0.25, 0.0):
        before = table.vectors_NE[:1].clone()
        optimizer.set_lr(scale)
        optimizer.step(torch.tensor([0]), torch.ones(1, DIM))
        assert_close_fp32(before - table.vectors_NE[:1], torch.full((1, DIM), 0.1 * scale))


def test_rows_of_micro_batches_are_summed():
    parts = [
        RowGradient(torch.tensor([1, 4, 6]), _randn(3, DIM, seed=1)),
        RowGradient(torch.tensor([0, 4]), _randn(2, DIM, seed=2)),
        RowGradient(torch.tensor([4]), _randn(1, DIM, seed=3)),
    ]
    rows_U, grad_UE, slab = accumulate_rows(parts)
    assert slab is None, "what one part read of a row is not all there is to know"
    dense = torch.zeros(7, DIM)
    for rows, grad, _ in parts:
        dense[rows] += grad
    assert rows_U.tolist() == [0, 1, 4, 6]
    assert_bitwise(grad_UE, dense[rows_U])


def test_bf16_gradients_are_summed_in_fp32():
    part = RowGradient(torch.tensor([3]), torch.full((1, DIM), 1.0, dtype=torch.bfloat16))
    small = RowGradient(torch.tensor([3]), torch.full((1, DIM), 2.0**-10, dtype=torch.bfloat16))
    assert accumulate_rows([part, small]).grad_UE[0, 0].item() == 1 + 2.0**-10


def test_one_micro_batch_comes_back_as_it_is():
    part = RowGradient(torch.tensor([2, 8]), _randn(2, DIM))
    assert accumulate_rows([part]) is part


def test_a_table_with_the_wrong_state_is_refused():
    with pytest.raises(ConfigError, match=r"needs a table with 10 .* has 1; build it with state_dim=10"):
        RowwiseOptimizer(_table("rowwise"), lr=0.1, rule="adam")


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="'adagrad'; allowed: rowwise, adam"):
        RowwiseOptimizer(_table("rowwise"), lr=0.1, rule="adagrad")
