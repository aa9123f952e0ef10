"""Rows as bytes and back; FP8 rows keep what E4M3 can keep."""

import pytest
import torch

from byrote.errors import ConfigError
from byrote.memory.records import RowFormat, decode_fp8, encode_fp8
from tests.tolerances import assert_bitwise


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [1, 5, 64])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_a_record_holds_vectors_state_and_visits(dtype, dim, rows):
    format = RowFormat(dim=dim, dtype=dtype, state_dim=3, counted=True)
    vectors = torch.randn(rows, dim).to(format.tensor_dtype)
    state, visits = torch.randn(rows, 3), torch.randint(0, 2**31 - 1, (rows,), dtype=torch.int32)
    records = format.encode(vectors, state, visits)
    assert records.shape == (rows, format.bytes) and format.bytes % 4 == 0
    for got, want in zip(format.decode(records), (vectors, state, visits), strict=True):
        assert_bitwise(got, want)
    assert_bitwise(format.decode_vectors(records), vectors)


def test_what_a_format_does_not_keep_is_zero():
    slab = RowFormat(dim=5).decode(RowFormat(dim=5).encode(torch.randn(7, 5)))
    assert slab.state_US.shape == (7, 0)
    assert slab.visits_U.tolist() == [0] * 7 and slab.visits_U.dtype == torch.int32


def test_256_numbers_in_fp8_are_264_bytes():
    format = RowFormat(dim=256, dtype="fp8")
    assert format.bytes == format.vector_bytes == 264
    assert RowFormat(dim=33, dtype="fp8").vector_bytes == 35


@pytest.mark.parametrize("dim", [1, 31, 32, 33, 257])
@pytest.mark.parametrize("size", [1e-30, 0.02, 1.0, 300.0, 1e30])
def test_fp8_rows_are_right_to_a_sixteenth_of_a_number(dim, size):
    x = torch.randn(50, dim) * size
    x[0] = 0.0
    got = decode_fp8(encode_fp8(x), dim)
    largest = torch.stack([group.abs().amax(1) for group in x.split(32, dim=1)], 1).repeat_interleave(32, 1)[:, :dim]
    assert ((got - x).abs() <= torch.maximum(x.abs() / 16, largest * 2.0**-17)).all(), "half a step, also of the subnormal numbers"
    assert not got[0].any()


def test_a_power_of_two_scale_rounds_nothing_by_itself():
    exact = torch.tensor([448.0, -416.0, 1.0, 0.0] * 8)[None] * 2.0 ** torch.arange(-60, 60)[:, None]
    assert_bitwise(decode_fp8(encode_fp8(exact), 32), exact)
    assert_bitwise(encode_fp8(decode_fp8(encode_fp8(exact), 32)), encode_fp8(exact))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    with pytest.raises(ConfigError, match="fp8"):
        encode_fp8(torch.tensor([[1.0, bad]]))


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match="'int8'; allowed: float32, bfloat16, fp8"):
        RowFormat(dim=4, dtype="int8")
