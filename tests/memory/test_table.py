"""The table in device memory: what it hands out, takes back, and says of itself."""

import pytest
import torch

from byrote.errors import CapacityError
from byrote.memory.table import DeviceTable, Slab
from tests.tolerances import assert_bitwise

ROWS = torch.tensor([0, 3, 6])


def table(**options) -> DeviceTable:
    return DeviceTable(7, 5, **({"std": 0.5, "state_dim": 2} | options))


def test_what_is_put_is_gathered_and_nothing_else_changes():
    store, twin = table(), table()
    slab = Slab(torch.randn(3, 5), torch.randn(3, 2), torch.tensor([4, 5, 6], dtype=torch.int32))
    store.put(ROWS, slab)
    for got, want in zip(store.gather(ROWS), slab, strict=True):
        assert_bitwise(got, want)
    others = torch.tensor([1, 2, 4, 5])
    for got, want in zip(store.gather(others), twin.gather(others), strict=True):
        assert_bitwise(got, want)


def test_changing_what_was_gathered_changes_nothing_in_the_table():
    store, twin = table(), table()
    for part in store.gather(ROWS):
        part.zero_().sub_(1)
    store.read(ROWS).fill_(9)
    assert_bitwise(store.vectors_NE, twin.vectors_NE)


def test_a_prefetch_sees_every_put_before_it_is_waited_for():
    store = table()
    ticket = store.prefetch(ROWS)
    slab = Slab(torch.ones(3, 5), torch.ones(3, 2), torch.ones(3, dtype=torch.int32))
    store.put(ROWS, slab)
    assert_bitwise(ticket.wait().vectors_UE, slab.vectors_UE)


def test_rows_follow_from_the_seed_and_have_the_spread_asked_for():
    assert_bitwise(table().vectors_NE, table().vectors_NE)
    assert not torch.equal(table(seed=1).vectors_NE, table().vectors_NE)
    assert abs(DeviceTable(999, 32, std=0.5).vectors_NE.std().item() - 0.5) < 0.01
    assert not table(std=0.0).vectors_NE.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_digest_notices_any_changed_value_and_swapped_rows(dtype):
    store = table(dtype=dtype)
    before = store.digest()
    assert before == table(dtype=dtype).digest()
    for row, column in ((0, 0), (6, 4), (3, 2)):
        changed = table(dtype=dtype)
        changed.vectors_NE[row, column] *= 2
        assert changed.digest() != before
    swapped = table(dtype=dtype)
    swapped.vectors_NE = swapped.vectors_NE.flip(0)
    assert swapped.digest() != before


def test_optimizer_state_is_no_part_of_the_digest():
    store = table()
    before = store.digest()
    store.state_NS.fill_(3)
    store.visits_N.fill_(3)
    assert store.digest() == before


def test_a_table_larger_than_memory_says_how_large_it_is():
    with pytest.raises(CapacityError, match="rows_per_order"):
        DeviceTable(2**50, 64)
