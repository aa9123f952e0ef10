"""FP8 there and back: every value it has stays, what lies between goes to the nearest, blocks do not touch each other."""

import pytest
import torch

from byrote.kernels.fp8 import BLOCK, LARGEST, through_fp8
from tests.kernels.twins import random
from tests.tolerances import assert_bitwise


def all_values() -> torch.Tensor:
    """Every finite E4M3 number."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return codes[codes.isfinite()]


@pytest.mark.parametrize("power", [-4, 0, 7])
def test_what_fp8_can_hold_stays(power):
    values = all_values()[:, None] * 2.0**power
    block = torch.cat((values, torch.full_like(values, LARGEST * 2.0**power)), dim=1)  # the second fixes the scale
    assert_bitwise(through_fp8(block), block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_off_by_at_most_a_sixteenth_and_the_scale_is_a_power_of_two_that_fits(dtype):
    x = random(33, 300, dtype=dtype) * 10.0 ** torch.arange(-3, 30, 1)[:, None].clamp(max=4)
    y = through_fp8(x.to(dtype))
    assert y.dtype == dtype and not torch.equal(y, x.to(dtype))
    for got, want in zip(y.float().split(BLOCK, -1), x.to(dtype).float().split(BLOCK, -1), strict=True):
        top = want.abs().amax(-1, keepdim=True).clamp_min(1e-4)
        scale = 2.0 ** torch.ceil(torch.log2(top / LARGEST))
        assert (scale * LARGEST >= top).all() and (scale * LARGEST < 2 * top).all()
        assert ((got - want).abs() <= torch.maximum(want.abs() / 16, scale * 2.0**-10) * (1 + 2.0**-7)).all()


def test_a_block_whose_largest_is_a_power_of_two_times_448_uses_all_of_the_range():
    x = torch.full((1, BLOCK), 448.0 * 8)
    assert_bitwise(through_fp8(x), x)


def test_a_large_number_spoils_its_own_block_only():
    x = random(1, 2 * BLOCK)
    other = x.clone()
    other[0, 0] = 1e6
    assert_bitwise(through_fp8(other)[:, BLOCK:], through_fp8(x)[:, BLOCK:])
    assert not torch.equal(through_fp8(other)[:, 1:BLOCK], through_fp8(x)[:, 1:BLOCK])


def test_gradients_go_straight_through():
    x = random(3, 40).requires_grad_()
    cotangent = random(3, 40, seed=1)
    (grad,) = torch.autograd.grad(through_fp8(x), x, cotangent)
    assert_bitwise(grad, cotangent)
    assert_bitwise(through_fp8(x).detach(), through_fp8(x.detach()))
