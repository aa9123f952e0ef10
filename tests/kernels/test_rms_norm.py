"""RMSNorm: the reference against its equation, the native kernel against the reference."""

import pytest
import torch

from byrote.kernels.rms_norm import cpu, reference, rms_norm
from tests.kernels.twins import DTYPES, SIZES, assert_twins, need, random
from tests.tolerances import assert_close_fp32

EPS = 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [3, 16, 80, 257])
@pytest.mark.parametrize("rows", SIZES)
def test_native_is_reference(rows, dim, dtype):
    need(cpu.library)
    inputs = random(rows, dim, dtype=dtype), 1 + 0.2 * random(dim, seed=1)
    assert_twins(lambda x, gain: cpu.rms_norm(x, gain, EPS), lambda x, gain: reference.rms_norm(x, gain, EPS), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slice_of_a_wider_projection_is_normed_in_place(dtype):
    need(cpu.library)
    inputs = random(7, 3, 80, dtype=dtype)[..., 16:], random(64, seed=1)
    assert_twins(lambda x, gain: cpu.rms_norm(x, gain, EPS), lambda x, gain: reference.rms_norm(x, gain, EPS), inputs)


def test_two_threads_share_many_rows():
    need(cpu.library)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        inputs = random(1031, 48), random(48, seed=1)
        assert_twins(lambda x, gain: cpu.rms_norm(x, gain, EPS), lambda x, gain: reference.rms_norm(x, gain, EPS), inputs)
    finally:
        torch.set_num_threads(threads)


def test_the_reference_has_the_gradient_of_its_values():
    inputs = (random(3, 5).double().requires_grad_(), random(5, seed=1).double().requires_grad_())
    assert torch.autograd.gradcheck(lambda x, gain: reference.rms_norm(x, gain, EPS), inputs)


def test_rows_come_out_with_mean_square_one():
    normed = rms_norm(37.0 * random(257, 80), torch.ones(80), EPS)
    assert_close_fp32(normed.square().mean(-1), torch.ones(257))


def test_a_row_of_zeros_stays_zero_and_a_bad_number_spoils_its_own_row_only():
    x = random(3, 32)
    x[0], x[1, 5] = 0.0, float("nan")
    normed = rms_norm(x, torch.ones(32), EPS)
    assert not normed[0].any()
    assert normed[1].isnan().all()
    assert normed[2].isfinite().all()


@pytest.mark.parametrize("shape", [(), (3,), (4, 7)])
def test_a_gain_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match="one gain per entry of the last dim"):
        rms_norm(torch.zeros(shape), torch.ones(4), EPS)
