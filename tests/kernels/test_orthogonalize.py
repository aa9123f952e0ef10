"""Newton–Schulz against the scalar it stands for and against the singular value decomposition."""

import pytest
import torch

from byrote.kernels.orthogonalize import COEFFICIENTS, newton_schulz, orthogonalize, working_dtype
from tests.tolerances import assert_bitwise, assert_close_fp32

QUINTIC = COEFFICIENTS["quintic5"][0]
TABLES = {"5 steps": (QUINTIC,) * 5, "8 steps": (QUINTIC,) * 8, "hybrid": COEFFICIENTS["hybrid8+2"]}


def _randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def _with_singular_values(values: torch.Tensor, cols: int) -> torch.Tensor:
    """A [len(values), cols] matrix in fp64 with these singular values."""
    left = torch.linalg.qr(_randn(len(values), len(values), dtype=torch.float64)).Q
    right = torch.linalg.qr(_randn(cols, cols, dtype=torch.float64)).Q[: len(values)]
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize(
    ("table", "digits", "expected"),
    [
        ("5 steps", 4, (0.6964, 0.7654, 0.7121, 0.6989, 0.4705, 0.0485)),
        ("8 steps", 4, (1.0810, 1.1306, 1.1082, 1.0860, 0.9179, 1.2023)),
        ("hybrid", 6, (1.000014, 1.000163, 1.000061, 1.000019, 1.000001, 1.002015)),
    ],
)
def test_one_singular_value_follows_the_published_table(table, digits, expected):
    starts_B11 = torch.tensor((1, 0.5, 0.1, 0.01, 0.001, 0.0001), dtype=torch.float64).view(-1, 1, 1)
    got = newton_schulz(starts_B11, TABLES[table]).flatten().tolist()
    assert [round(value, digits) for value in got] == list(expected)


@pytest.mark.parametrize(("name", "smallest", "low", "high"), [("quintic5", 0.01, 0.6818, 1.1344), ("hybrid8+2", 3e-5, 1.0, 1.0021)])
def test_every_start_lands_in_the_band(name, smallest, low, high):
    starts_B11 = torch.logspace(0, torch.tensor(smallest).log10().item(), 20_001, dtype=torch.float64).view(-1, 1, 1)
    ends = newton_schulz(starts_B11, COEFFICIENTS[name])
    assert round(ends.min().item(), 4) >= low
    assert round(ends.max().item(), 4) <= high


def test_singular_vectors_stay_and_values_follow_the_scalar():
    values = torch.tensor((0.9, 0.3, 0.2, 0.1, 0.05), dtype=torch.float64)
    values /= values.norm()
    matrix = _with_singular_values(values, 7)
    moved = newton_schulz(values.view(-1, 1, 1), COEFFICIENTS["quintic5"]).flatten()
    assert_close_fp32(orthogonalize(matrix, dtype=torch.float64), _with_singular_values(moved, 7))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (7, 257), (257, 7), (33, 33)])
def test_hybrid_is_the_polar_factor(shape):
    matrix = _randn(*shape, dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    error = orthogonalize(matrix, coefficients="hybrid8+2", dtype=torch.float64) - left @ right
    assert torch.linalg.matrix_norm(error, 2) <= 0.0021


def test_a_tall_matrix_is_the_transpose_of_a_wide_one():
    matrix = _randn(5, 9)
    assert_bitwise(orthogonalize(matrix.mT), orthogonalize(matrix).mT)


@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 7, 5), (2, 3, 4, 6)])
def test_each_matrix_of_a_stack_is_orthogonalised_alone(shape):
    stack = _randn(*shape)
    got = orthogonalize(stack, dtype=torch.float32)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape[:-2])).reshape(-1, len(shape) - 2).tolist():
        alone = orthogonalize(stack[tuple(index)], dtype=torch.float32)
        assert_close_fp32(got[tuple(index)], alone)


def test_the_length_of_the_update_does_not_matter():
    matrix = _randn(6, 11)
    assert_bitwise(orthogonalize(matrix), orthogonalize(1024 * matrix))


def test_a_zero_matrix_stays_zero_and_an_empty_stack_stays_empty():
    assert not orthogonalize(torch.zeros(2, 3, 5)).any()
    assert orthogonalize(torch.zeros(0, 3, 5)).shape == (0, 3, 5)


@pytest.mark.parametrize("name", list(COEFFICIENTS))
def test_bf16_products_keep_the_singular_values_near_the_band(name):
    values = torch.logspace(0, -1.5, 48, dtype=torch.float64)
    matrix = _with_singular_values(values, 96)
    got = orthogonalize(matrix.float(), coefficients=name)
    assert got.dtype == torch.bfloat16
    ends = torch.linalg.svdvals(got.double())
    low, high = (0.6818, 1.1344) if name == "quintic5" else (1.0, 1.0021)
    assert low - 0.01 < ends.min()
    assert ends.max() < high + 0.01


def test_working_dtype_is_one_the_device_multiplies():
    dtype = working_dtype(torch.device("cpu"))
    assert dtype in (torch.bfloat16, torch.float32)
    assert orthogonalize(_randn(4, 4), dtype=dtype).dtype == dtype
