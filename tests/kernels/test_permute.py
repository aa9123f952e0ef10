"""Tokens to experts and back: exact properties of the reference, and the native kernels as its twins."""

from functools import partial

import pytest
import torch

from byrote.kernels.permute import combine, cpu, dispatch, reference, sort_by_expert
from tests.kernels.twins import DTYPES, SIZES, assert_twins, need, random
from tests.tolerances import assert_bitwise


def permutation(tokens, top_k, experts=5):
    chosen = torch.randint(0, experts, (tokens * top_k,), generator=torch.Generator().manual_seed(0))
    return chosen, *reference.sort_by_expert(chosen, experts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("dim", [1, 48, 257])
@pytest.mark.parametrize("tokens", SIZES)
def test_native_dispatch_and_combine_are_reference(tokens, dim, top_k, dtype):
    need(cpu.library)
    _, order, place = permutation(tokens, top_k)

    def there(module, x):
        return module.dispatch(x, order, place, top_k)

    def back(module, x):
        return module.combine(x, order, place, tokens)

    assert_twins(partial(there, cpu), partial(there, reference), [random(tokens, dim, dtype=dtype)])
    assert_twins(partial(back, cpu), partial(back, reference), [random(tokens * top_k, dim, dtype=dtype)])


@pytest.mark.parametrize("experts", [1, 2, 61])
@pytest.mark.parametrize("pairs", SIZES)
def test_native_sort_is_reference_to_the_bit(pairs, experts):
    need(cpu.library)
    chosen = torch.randint(0, experts, (pairs,))
    for got, want in zip(cpu.sort_by_expert(chosen, experts), reference.sort_by_expert(chosen, experts), strict=True):
        assert_bitwise(got, want)


def test_order_is_sorted_and_stable_and_place_undoes_it():
    chosen, _, _ = permutation(257, 3)
    order, place = sort_by_expert(chosen, 5)
    assert (chosen[order].diff() >= 0).all()
    assert all((order[chosen[order] == expert].diff() > 0).all() for expert in range(5))
    assert_bitwise(order[place], torch.arange(771))


def test_the_worked_example_of_the_reference():
    order, place = sort_by_expert(torch.tensor([1, 0, 0, 2]), 3)
    assert (order.tolist(), place.tolist()) == ([1, 2, 0, 3], [2, 0, 1, 3])


def test_going_there_and_back_multiplies_by_the_number_of_slots():
    _, order, place = permutation(7, 4)
    x = random(7, 16)
    assert_bitwise(combine(dispatch(x, order, place, 4), order, place, 7), 4 * x)


def test_the_reference_has_the_gradient_of_its_values():
    _, order, place = permutation(5, 2)
    x, y = random(5, 3).double().requires_grad_(), random(10, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference.dispatch(x, order, place, 2), (x,))
    assert torch.autograd.gradcheck(lambda y: reference.combine(y, order, place, 5), (y,))


def test_sums_over_slots_are_rounded_once():
    _, order, place = permutation(1, 3, experts=1)
    parts = torch.tensor([[1.0], [2.0**-9], [2.0**-9]], dtype=torch.bfloat16)  # 1 + 2⁻⁹ alone would round back to 1
    want = torch.tensor([[1.0 + 2.0**-8]]).bfloat16()
    for module in (reference, cpu) if cpu.library() else (reference,):
        assert_bitwise(module.combine(parts, order, place, 1), want)


def test_an_expert_that_does_not_exist_is_named():
    need(cpu.library)
    with pytest.raises(ValueError, match=r"span -1\.\.7; with 4 experts"):
        sort_by_expert(torch.tensor([0, 7, -1, 2]), 4)


def test_rows_that_do_not_exist_are_never_read():
    need(cpu.library)
    _, order, place = permutation(4, 2)
    with pytest.raises(IndexError, match="does not exist"):
        dispatch(random(4, 3), order + 1, place, 2)
    with pytest.raises(IndexError, match="does not exist"):
        combine(random(8, 3), order, place - 1, 4)


def test_shapes_that_do_not_fit_are_refused():
    _, order, place = permutation(4, 2)
    with pytest.raises(ValueError, match="5 tokens in 2 slots need 10 pairs"):
        dispatch(random(5, 3), order, place, 2)
    with pytest.raises(ValueError, match="9 results need 9 pairs"):
        combine(random(9, 3), order, place, 4)
