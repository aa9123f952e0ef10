import pytest
import torch

from tests.tolerances import assert_bitwise, assert_close_bf16, assert_close_fp32


def test_bitwise_tells_apart_what_equality_does_not() -> None:
    zero, nan = torch.zeros(3), torch.full((3,), torch.nan)
    assert_bitwise(nan, nan.clone())
    for got, want in (
        (zero, -zero),
        (zero, zero.int()),
        (zero, torch.zeros(4)),
        (torch.tensor(1.0), torch.tensor(1.0).nextafter(torch.tensor(2.0))),
    ):
        with pytest.raises(AssertionError):
            assert_bitwise(got, want)


def test_fp32_measures_from_the_largest_value() -> None:
    want = torch.tensor([1000.0, 1e-3])
    assert_close_fp32(want + torch.tensor([0.0, 0.009]), want)
    with pytest.raises(AssertionError, match="off by"):
        assert_close_fp32(want + torch.tensor([0.0, 0.011]), want)


def test_rounding_to_bf16_passes_and_twice_the_error_fails() -> None:
    want = torch.randn(257, 65)
    assert_close_bf16(want.bfloat16(), want)
    with pytest.raises(AssertionError, match="squared"):
        assert_close_bf16(want + 3 * (want.bfloat16().float() - want), want)
    with pytest.raises(AssertionError, match="off by"):
        assert_close_bf16(want + torch.zeros_like(want).index_fill_(0, torch.tensor([3]), 0.1), want)


@pytest.mark.parametrize("check", [assert_close_fp32, assert_close_bf16])
def test_nan_zero_and_empty_have_clear_answers(check) -> None:
    zero = torch.zeros(3)
    check(zero, zero)
    check(torch.zeros(0), torch.zeros(0))
    for got in (torch.full((3,), torch.nan), torch.full((3,), 1e-30), torch.zeros(4)):
        with pytest.raises(AssertionError):
            check(got, zero)
