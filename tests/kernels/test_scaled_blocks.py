"""Small codes with a scale a block: what every code is worth by the formats' rules, whose scale is whose, and fast is as slow."""

import math

import pytest
import torch

from byrote.kernels.scaled_blocks import FP4_BLOCK, dequantize, dequantize_reference
from tests.tolerances import assert_bitwise

WAYS = pytest.mark.parametrize("way", [dequantize, dequantize_reference])


def bytes_of(*codes: int) -> torch.Tensor:
    return torch.tensor(codes, dtype=torch.uint8)


def e4m3(code: int) -> float:
    """Sign, four exponent bits with bias 7, three of mantissa; no infinities, all ones is no number."""
    sign, exponent, mantissa = (-1.0) ** (code >> 7), code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


@WAYS
@pytest.mark.parametrize("first", [0, 0x7F, 0x80], ids=["positive", "not a number", "negative"])
def test_every_fp8_code_is_worth_what_e4m3_says(way, first):
    codes = [first, *(code for code in range(256) if code & 0x7F != 0x7F)]
    got = way(bytes_of(*codes).view(torch.float8_e4m3fn)[None], torch.ones(1, 2), (128, 128), torch.float32)
    want = torch.tensor([[e4m3(code) for code in codes]])
    assert_bitwise(got.nan_to_num(7e7), want.nan_to_num(7e7))


@WAYS
def test_every_fp4_code_is_worth_what_e2m1_says_in_either_half_of_a_byte(way):
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values += [-value for value in values]
    got = way(torch.arange(256, dtype=torch.uint8).view(torch.int8)[None], torch.ones(1, 16), FP4_BLOCK, torch.float32)
    assert_bitwise(got, torch.tensor([[value for high in values for low in values for value in (low, high)]]))


@WAYS
def test_an_e8m0_scale_is_two_to_its_byte_less_127(way):
    scale = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu)[:, None]
    one = torch.full((255, 1), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)  # 1.0
    got = way(one, scale, (1, 128), torch.float32)
    assert_bitwise(got[:, 0], torch.tensor([2.0**power for power in range(-127, 128)]))


@WAYS
@pytest.mark.parametrize("block", [(128, 128), (32, 32), (3, 5)])
@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (127, 129), (257, 300), (2, 130, 131)])
def test_each_number_has_the_scale_of_its_block_and_edges_are_shorter_blocks(way, shape, block):
    rows, columns = -(-shape[-2] // block[0]), -(-shape[-1] // block[1])
    scale = torch.randn(*shape[:-2], rows, columns)
    codes = torch.full(shape, 0x3C, dtype=torch.uint8).view(torch.float8_e4m3fn)  # 1.5
    got = way(codes, scale, block, torch.float32)
    for row in range(shape[-2]):
        by_column = scale[..., row // block[0], torch.arange(shape[-1]) // block[1]]
        assert_bitwise(got[..., row, :], 1.5 * by_column)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (200, 3000), (3, 70, 96), (0, 32), (2, 0, 32)])
def test_the_fast_way_is_the_slow_one_in_every_dtype(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    fp8 = torch.where(codes & 0x7F == 0x7F, 0, codes).view(torch.float8_e4m3fn)
    for stored, block in ((fp8, (128, 128)), (codes.view(torch.int8), FP4_BLOCK)):
        width = shape[-1] * (2 if block == FP4_BLOCK else 1)
        scale = torch.rand(*shape[:-2], -(-shape[-2] // block[0]), -(-width // block[1]), generator=generator)
        assert_bitwise(dequantize(stored, scale, block, dtype), dequantize_reference(stored, scale, block, dtype))
