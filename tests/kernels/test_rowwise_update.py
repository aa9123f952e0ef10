"""The row rules against torch.optim.Adam and against their equations."""

import pytest
import torch

from byrote.kernels.counter_random import round_to_bf16
from byrote.kernels.rowwise_update import adam_update, rowwise_update
from tests.tolerances import assert_bitwise, assert_close_fp32

BETAS, EPS = (0.9, 0.95), 1e-8
ROWS = 3 * torch.arange(257)  # global ids


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _fresh(rows: int, dim: int, state_dim: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _randn(rows, dim, seed=9).to(dtype), torch.zeros(rows, state_dim), torch.zeros(rows, dtype=torch.int32)


@pytest.mark.parametrize("beta2", [0.0, 0.95, 0.999])
def test_adam_on_rows_visited_at_every_step_is_torch_adam(beta2):
    slab = _fresh(7, 5, 10)
    twin = torch.nn.Parameter(slab[0].clone())
    adam = torch.optim.Adam([twin], lr=0.1, betas=(0.9, beta2), eps=EPS)
    for step in range(9):
        twin.grad = _randn(7, 5, seed=step)
        adam.step()
        slab = adam_update(slab[0], twin.grad, slab[1], slab[2], ROWS[:7], lr=0.1, betas=(0.9, beta2), eps=EPS)
    assert_close_fp32(slab[0], twin)
    assert slab[2].tolist() == [9] * 7


def test_rowwise_on_one_number_is_adam_without_a_first_moment():
    narrow, full = _fresh(257, 1, 1), _fresh(257, 1, 2)
    for step in range(5):
        grad = _randn(257, 1, seed=step)
        narrow = rowwise_update(narrow[0], grad, narrow[1], narrow[2], ROWS, lr=0.1, betas=BETAS, eps=EPS)
        full = adam_update(full[0], grad, full[1], full[2], ROWS, lr=0.1, betas=(0.0, BETAS[1]), eps=EPS)
    assert_close_fp32(narrow[0], full[0])


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_first_step_of_a_row_has_the_size_of_the_rate(scale):
    vectors, state, visits = _fresh(7, 64, 1)
    moved, _, visits = rowwise_update(vectors, scale * _randn(7, 64), state, visits, ROWS[:7], lr=0.1, betas=BETAS, eps=1e-12)
    assert_close_fp32((moved - vectors).square().mean(1).sqrt(), torch.full((7,), 0.1))
    assert visits.tolist() == [1] * 7


def test_the_step_of_a_row_lies_along_its_gradient():
    vectors, state, visits = _fresh(7, 64, 1)
    grad = _randn(7, 64)
    moved, _, _ = rowwise_update(vectors, grad, state + 0.3, visits + 4, ROWS[:7], lr=0.1, betas=BETAS, eps=EPS)
    cosine = torch.nn.functional.cosine_similarity(moved - vectors, -grad)
    assert_close_fp32(cosine, torch.ones(7))


@pytest.mark.parametrize(("update", "state_dim"), [(rowwise_update, 1), (adam_update, 10)])
def test_a_zero_gradient_moves_nothing_and_inputs_are_left_alone(update, state_dim):
    inputs = _fresh(7, 5, state_dim)
    before = [tensor.clone() for tensor in inputs]
    moved, state, visits = update(inputs[0], torch.zeros(7, 5), inputs[1], inputs[2], ROWS[:7], lr=0.1, betas=BETAS, eps=EPS)
    assert_bitwise(moved, inputs[0])
    assert not state.any()
    assert visits.tolist() == [1] * 7
    for now, then in zip(inputs, before, strict=True):
        assert_bitwise(now, then)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("update", "state_dim"), [(rowwise_update, 1), (adam_update, 10)])
def test_a_row_moves_the_same_in_any_company(update, state_dim, dtype):
    vectors, state, visits = _fresh(7, 5, state_dim, dtype)
    grad = _randn(7, 5)
    together = update(vectors, grad, state, visits, ROWS[:7], lr=0.1, betas=BETAS, eps=EPS)
    alone = update(vectors[3:4], grad[3:4], state[3:4], visits[3:4], ROWS[3:4], lr=0.1, betas=BETAS, eps=EPS)
    for many, one in zip(together, alone, strict=True):
        assert_bitwise(many[3:4], one)


@pytest.mark.parametrize(("update", "state_dim"), [(rowwise_update, 1), (adam_update, 10)])
def test_bf16_rows_are_the_fp32_result_rounded_once_up_or_down(update, state_dim):
    vectors, state, visits = _fresh(257, 5, state_dim, torch.bfloat16)
    grad = _randn(257, 5)
    rounded, state_bf16, counted = update(vectors, grad, state, visits, ROWS, lr=0.1, betas=BETAS, eps=EPS, seed=4)
    exact, state_fp32, _ = update(vectors.float(), grad, state, visits, ROWS, lr=0.1, betas=BETAS, eps=EPS)
    assert_bitwise(rounded, round_to_bf16(exact, ROWS, counted, seed=4))
    assert_bitwise(state_bf16, state_fp32)
    again = update(vectors, grad, state, visits + 1, ROWS, lr=0.1, betas=BETAS, eps=EPS, seed=4)[0]
    assert (again != rounded).any(), "another visit draws anew"
