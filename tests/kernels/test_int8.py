"""Weights of int8: the error that the format promises, and every way to a product against the readable one."""

import pytest
import torch

from byrote.kernels import int8, native
from byrote.kernels.int8 import Int8, cpu, reference
from tests.kernels.twins import need, random
from tests.tolerances import assert_bitwise, assert_close_fp32

SHAPES = [(1, 1), (3, 5), (17, 16), (257, 64), (33, 129), (5, 1000)]  # outputs, inputs


def weight(outputs, inputs, seed=0):
    """Rows of very different sizes."""
    return random(outputs, inputs, seed=seed) * torch.logspace(-3, 3, outputs)[:, None]


@pytest.mark.parametrize("shape", [*SHAPES, (3, 4, 50)])
def test_no_weight_is_off_by_more_than_half_a_step_and_the_largest_is_exact(shape):
    weight_FD = weight(*shape) if len(shape) == 2 else random(*shape)
    found = int8.quantize(weight_FD)
    off_FD = (int8.dequantize(found).double() - weight_FD.double()).abs()
    half_F1 = weight_FD.double().abs().amax(-1, keepdim=True) / 254
    assert (off_FD <= half_F1 * (1 + 2**-20)).all()  # scale and product are rounded to fp32
    assert found.values_FD.dtype == torch.int8 and found.values_FD.abs().amax(-1).eq(127).all()
    assert off_FD.amax() > 0 or weight_FD.shape[-1] == 1


def test_zero_rows_and_denormal_rows_stay_finite_and_a_weight_and_its_negative_are_alike():
    weight_FD = torch.stack([torch.zeros(9), torch.full((9,), 1e-44), random(9)])
    found, negative = int8.quantize(weight_FD), int8.quantize(-weight_FD)
    assert_bitwise(int8.dequantize(found)[0], torch.zeros(9))
    assert int8.dequantize(found).isfinite().all()
    assert_bitwise(found.values_FD, -negative.values_FD)


def test_what_was_quantized_before_does_not_change():
    found = int8.quantize(weight(40, 30))
    assert_bitwise(int8.quantize(int8.dequantize(found)).values_FD, found.values_FD)


def test_numbers_that_are_not_finite_are_refused():
    weight_FD = random(3, 4)
    weight_FD[1, 2] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        int8.quantize(weight_FD)


@pytest.mark.parametrize("shape", SHAPES)
def test_quantizing_in_blocks_changes_nothing(shape, monkeypatch):
    monkeypatch.setattr(int8, "BLOCK_NUMBERS", 200)
    for got, want in zip(int8.quantize(weight(*shape)), reference.quantize(weight(*shape)), strict=True):
        assert_bitwise(got, want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 16])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_c_product_of_few_rows_is_the_readable_one(shape, rows, threads, monkeypatch):
    need(cpu.library)
    monkeypatch.setattr(native, "threads_for", lambda _: threads)
    found, x = int8.quantize(weight(*shape)), random(rows, shape[1], seed=1)
    assert cpu.can_run(x, found)
    got = cpu.product(x, found)
    whole_MF = torch.nn.functional.linear(x.double(), found.values_FD.double())  # without scales, which differ by six orders of size
    assert_close_fp32(got / found.scale_F, whole_MF.float())
    assert_close_fp32(got, reference.product(x, found))


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_by_blocks_are_the_readable_one_in_values_and_gradients(rows, dtype, monkeypatch):
    monkeypatch.setattr(int8, "BLOCK_NUMBERS", 100)
    found, leaves = int8.quantize(weight(33, 7)), [random(2, rows, 7, seed=1).to(dtype).requires_grad_() for _ in range(2)]
    outputs = [function(leaf, found) for function, leaf in zip((int8.product, reference.product), leaves, strict=True)]
    grads = [torch.autograd.grad(out, leaf, random(*out.shape, seed=2).to(dtype))[0] for out, leaf in zip(outputs, leaves, strict=True)]
    assert outputs[0].dtype == dtype
    assert_close_fp32(*outputs)
    assert_close_fp32(*grads)


@pytest.mark.parametrize("counts", [(3, 0, 2, 20), (0, 0, 0, 1), (0, 0, 0, 0), (17, 1, 0, 0)])
def test_experts_are_taken_one_by_one(counts):
    found, x_ND = int8.quantize(random(4, 10, 6)), random(sum(counts), 6, seed=1)
    got = int8.grouped_product(x_ND, found, torch.tensor(counts).cumsum(0).int())
    want = [reference.product(part, Int8(*expert)) for part, *expert in zip(x_ND.split(counts), *found, strict=True)]
    assert_close_fp32(got, torch.cat(want))


def test_few_rows_do_not_feel_their_neighbours():
    found, x = int8.quantize(weight(50, 70)), random(16, 70, seed=1)
    together = int8.product(x, found)
    for row in range(16):
        assert_close_fp32(int8.product(x[row : row + 1], found), together[row : row + 1])
