"""Numbers from counters: the C back end against the definition bit by bit, and what the definition promises of its numbers."""

import pytest
import torch

from byrote.kernels.counter_random import cpu, normal_rows, reference, round_to_bf16
from tests.tolerances import assert_bitwise

native = pytest.mark.skipif(cpu.library() is None, reason="no C compiler here")
ROWS = torch.tensor([0, 1, 2, 7, 65_536, 2**31, 2**40 + 3, 2**62])
GOLDEN = [-27350, -5525, -61762]
SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.5, 3.4e38, 1e-44, torch.inf, -torch.inf, torch.nan])


def in_plain_integers(seed: int, row: int, column: int) -> int:
    """The equations of reference.py in Python's own numbers."""

    def mix(x: int) -> int:
        for shift, factor in ((30, reference.FIRST), (27, reference.SECOND), (31, 1)):
            x = ((x ^ x >> shift) * factor) % 2**64
        return x

    step = reference.GAMMA
    hash_ = mix((mix((seed * step + reference.INITIAL) % 2**64) + row * step) % 2**64)
    bits = mix((hash_ + (column + 1) * step) % 2**64)
    return sum(bits >> shift & 0xFFFF for shift in (0, 16, 32, 48)) - 2 * 65535


@native
@pytest.mark.parametrize("dim", [1, 7, 64, 257])
@pytest.mark.parametrize("seed", [0, 1, -3, 2**62])
def test_both_back_ends_make_the_same_rows(dim, seed):
    assert_bitwise(cpu.normal_rows(ROWS, dim, std=0.02, seed=seed), reference.normal_rows(ROWS, dim, std=0.02, seed=seed))


@native
@pytest.mark.parametrize("dim", [1, 7, 257])
def test_both_back_ends_round_alike(dim):
    x = torch.randn(len(ROWS), dim) * 10.0 ** torch.randint(-9, 9, (len(ROWS), dim))
    x.view(-1)[: len(SPECIAL)] = SPECIAL[: x.numel()]
    counts = torch.arange(len(ROWS), dtype=torch.int32)
    assert_bitwise(cpu.round_to_bf16(x, ROWS, counts, seed=5), reference.round_to_bf16(x, ROWS, counts, seed=5))


@pytest.mark.parametrize("back_end", [reference, pytest.param(cpu, marks=native)])
def test_no_rows_are_no_rows(back_end):
    none = torch.zeros(0, dtype=torch.int64)
    assert back_end.normal_rows(none, 5, std=1.0).shape == (0, 5)
    assert back_end.round_to_bf16(torch.zeros(0, 5), none, none.int()).shape == (0, 5)


def test_a_row_is_the_same_in_any_company_and_any_order():
    together = normal_rows(ROWS, 5, std=1.0, seed=2)
    assert_bitwise(torch.cat([normal_rows(row[None], 5, std=1.0, seed=2) for row in ROWS]), together)
    assert_bitwise(normal_rows(ROWS.flip(0), 5, std=1.0, seed=2), together.flip(0))


def test_the_rows_are_those_of_the_first_release():
    """Tables that were saved rely on it: rows that were never put are not in the file."""
    got = normal_rows(torch.tensor([0, 12345]), 3, std=reference.SPREAD, seed=7).long()
    assert got.tolist() == [[in_plain_integers(7, row, column) for column in range(3)] for row in (0, 12345)]
    assert got[0].tolist() == GOLDEN


def test_rows_look_normal_and_unrelated():
    x = normal_rows(torch.arange(20_000), 16, std=0.5, seed=1).double()
    n = x.numel()
    assert abs(x.mean().item()) < 4 * 0.5 / n**0.5
    assert abs(x.std().item() / 0.5 - 1) < 0.01
    assert abs((x / 0.5).pow(4).mean().item() - 2.7) < 0.03
    assert x.abs().max() <= 0.5 * 3.47
    for other in (x.roll(1, 0), x.roll(1, 1), normal_rows(torch.arange(20_000), 16, std=0.5, seed=2).double()):
        assert abs((x * other).mean().item() / 0.25) < 4 / n**0.5, "neighbours in rows, columns and seeds know nothing of each other"


def test_rounding_goes_to_a_neighbour_and_is_right_on_average():
    low, high = 1.0, 1.0 + 2.0**-7
    for share in (0.0, 0.3, 0.5, 0.9):
        x = torch.full((4000, 8), low + share * (high - low))
        got = round_to_bf16(x, torch.arange(4000), torch.zeros(4000, dtype=torch.int32)).float()
        assert set(got.unique().tolist()) <= {low, high}
        assert abs((got == high).double().mean().item() - share) < 4 * (0.25 / got.numel()) ** 0.5 + 2.0**-16


def test_a_draw_depends_on_seed_row_count_and_column_and_on_nothing_else():
    x = torch.full((6, 64), 1.0 + 2.0**-8)
    rows, counts = torch.arange(6), torch.arange(6, dtype=torch.int32)
    base = round_to_bf16(x, rows, counts, seed=1)
    assert_bitwise(round_to_bf16(x[2:4], rows[2:4], counts[2:4], seed=1), base[2:4])
    for other in (
        round_to_bf16(x, rows, counts, seed=2),
        round_to_bf16(x, rows + 6, counts, seed=1),
        round_to_bf16(x, rows, counts + 6, seed=1),
    ):
        assert (other != base).any(dim=1).all()
    assert len({tuple(row) for row in base.tolist()}) == 6


def test_what_bf16_holds_is_not_changed():
    x = torch.randn(50, 7).bfloat16()
    assert_bitwise(round_to_bf16(x.float(), torch.arange(50), torch.zeros(50, dtype=torch.int32)), x)
    special = round_to_bf16(SPECIAL[None], torch.tensor([0]), torch.tensor([0], dtype=torch.int32))[0]
    assert special[6:8].tolist() == [torch.inf, -torch.inf]
    assert special[8].isnan()
