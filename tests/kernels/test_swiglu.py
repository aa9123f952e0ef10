"""SwiGLU: the reference against its equation, the native kernel against the reference."""

from functools import partial

import pytest
import torch

from byrote.kernels.swiglu import cpu, reference, swiglu
from tests.kernels.twins import DTYPES, SIZES, assert_twins, need, random
from tests.tolerances import assert_close_fp32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [None, 0.7])
@pytest.mark.parametrize("width", [1, 32, 257])
@pytest.mark.parametrize("rows", SIZES)
def test_native_is_reference(rows, width, limit, dtype):
    need(cpu.library)
    x = 2 * random(rows, 2 * width, dtype=dtype)
    assert_twins(partial(cpu.swiglu, limit=limit), partial(reference.swiglu, limit=limit), [x])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [None, 0.7])
def test_native_is_reference_with_a_weight_per_token(limit, dtype):
    need(cpu.library)
    inputs = 2 * random(257, 96, dtype=dtype), random(257, seed=1)

    def call(module, x, weight):
        return module.swiglu(x, limit=limit, weight_N=weight)

    assert_twins(partial(call, cpu), partial(call, reference), inputs)


def test_leading_dims_and_rows_that_lie_apart_are_read_where_they_are():
    need(cpu.library)
    x = random(3, 5, 80)[..., 16:]
    assert_twins(cpu.swiglu, reference.swiglu, [x])


def test_the_reference_has_the_gradient_of_its_values():
    inputs = (random(3, 10).double().requires_grad_(), random(3, seed=1).double().requires_grad_())
    assert torch.autograd.gradcheck(lambda x, weight: reference.swiglu(x, limit=0.9, weight_N=weight), inputs)


def test_values_beyond_the_limit_count_as_the_limit_and_get_no_gradient():
    x = torch.tensor([[5.0, -5.0, 0.5, 1.0, 9.0, -9.0]], requires_grad=True)  # gates 5, −5, 0.5 and linear parts 1, 9, −9
    out = swiglu(x, limit=2.0)
    gates, ups = torch.tensor([2.0, -5.0, 0.5]), torch.tensor([1.0, 2.0, -2.0])
    assert_close_fp32(out[0], gates * torch.sigmoid(gates) * ups)
    out.sum().backward()
    assert x.grad is not None
    assert [bool(part) for part in x.grad[0] != 0] == [False, True, True, True, False, False]


def test_large_gates_neither_overflow_nor_turn_into_nan():
    x = torch.tensor([[1e4, -1e4, 90.0, -90.0, 1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    out = swiglu(x)
    out.sum().backward()
    assert_close_fp32(out[0], torch.tensor([1e4, 0.0, 90.0, 0.0]))
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must be even"):
        swiglu(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="one per row"):
        swiglu(torch.zeros(2, 6), weight_N=torch.ones(3))
