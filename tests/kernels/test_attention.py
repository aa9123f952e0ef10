"""Attention: both back ends against the reference, the reference against its equation, and what padding and documents need."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from byrote.kernels.attention import attend, cpu, fused, reference
from tests.kernels.twins import DTYPES, assert_twins, need, pull_back, random
from tests.tolerances import assert_bitwise, assert_close_bf16, assert_close_fp32

SIZES = {  # B, H, T, S, K, V: lone numbers, odd widths, T ≠ S either way, more than a block of queries and a tile of keys
    "one": (3, 2, 1, 1, 1, 1),
    "seven": (8, 5, 7, 7, 7, 5),
    "odd": (1, 2, 257, 257, 48, 64),
    "few queries": (2, 1, 65, 600, 33, 7),
    "few keys": (1, 2, 257, 65, 17, 257),
    "square": (2, 2, 256, 256, 64, 64),
}
MASKS = ("none", "causal", "documents", "holes")
every_size = pytest.mark.parametrize("size", SIZES)
every_mask = pytest.mark.parametrize("kind", MASKS)


def heads(B: int, H: int, T: int, width: int, *, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[B, H, T, width] as a projection leaves it: heads behind tokens, and part of a wider row."""
    return random(B, T, H, width + 3, seed=seed, dtype=dtype)[..., :width].transpose(1, 2)


def inputs(size: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    B, H, T, S, K, V = SIZES[size]
    return [heads(B, H, T, K, seed=1, dtype=dtype), heads(B, H, S, K, seed=2, dtype=dtype), heads(B, H, S, V, seed=3, dtype=dtype)]


def documents(B: int, T: int, S: int) -> torch.Tensor:
    """Causal within documents of some 30 tokens that go on from the keys before; every seventh query is padding."""
    number_BS = (torch.rand(B, S, generator=torch.Generator().manual_seed(5)) < 0.03).cumsum(1)
    place_T = torch.arange(T) * S // T
    order_TS = torch.arange(S) <= place_T[:, None]
    return ((number_BS[:, place_T, None] == number_BS[:, None]) & order_TS & (torch.arange(T) % 7 != 3)[:, None])[:, None]


def rule(kind: str, size: str) -> dict[str, object]:
    B, _, T, S, _, _ = SIZES[size]
    if kind == "documents":
        return {"mask_B1TS": documents(B, T, S)}
    if kind == "holes":
        return {"mask_B1TS": torch.rand(1, 1, T, S, generator=torch.Generator().manual_seed(6)) < 0.7}
    return {"causal": kind == "causal"}


@pytest.mark.parametrize("dtype", DTYPES)
@every_mask
@every_size
def test_native_is_reference(size, kind, dtype):
    need(cpu.library)
    options = {"scale": 0.3, **rule(kind, size)}
    assert_twins(lambda *qkv: cpu.attend(*qkv, **options), lambda *qkv: reference.attend(*qkv, **options), inputs(size, dtype))


@every_mask
@every_size
def test_fused_is_reference(size, kind):
    options = {"scale": 0.3, **rule(kind, size)}
    assert_twins(lambda *qkv: fused.attend(*qkv, **options), lambda *qkv: reference.attend(*qkv, **options), inputs(size))


@every_mask
def test_the_reference_has_the_gradient_of_its_values(kind):
    inputs = [random(1, 2, 8, width, seed=width).double().requires_grad_() for width in (3, 3, 4)]
    options = {"mask_B1TS": documents(1, 8, 8)} if kind == "documents" else {"causal": kind == "causal"}
    assert torch.autograd.gradcheck(lambda *qkv: reference.attend(*qkv, scale=0.5, **options), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_sees_nothing_gives_zeros_and_takes_no_gradient(dtype):
    q, k, v = (part.detach().requires_grad_() for part in inputs("odd", dtype))
    mask = torch.ones(1, 1, 257, 257, dtype=torch.bool).tril()
    mask[:, :, [0, 100, 256]] = False
    mask[..., 9] = False
    out = attend(q, k, v, scale=0.1, mask_B1TS=mask)
    out.float().square().sum().backward()
    assert not out[:, :, [0, 100, 256]].any() and not q.grad[:, :, [0, 100, 256]].any()
    assert not k.grad[:, :, 9].any() and not v.grad[:, :, 9].any()
    assert out[:, :, 1:9].any() and out.isfinite().all() and q.grad.isfinite().all()


def test_packed_documents_are_each_document_alone():
    q, k, v = inputs("square")
    edges = (0, 1, 60, 130, 256)
    number_T = torch.bucketize(torch.arange(256), torch.tensor(edges[1:]), right=True)
    mask = ((number_T[:, None] == number_T) & torch.ones(256, 256, dtype=torch.bool).tril())[None, None]
    packed = attend(q, k, v, scale=0.2, mask_B1TS=mask)
    for first, end in pairwise(edges):
        alone = attend(*(part[:, :, first:end] for part in (q, k, v)), scale=0.2, causal=True)
        assert_close_fp32(packed[:, :, first:end], alone)


def test_equal_scores_give_the_mean_of_the_values_so_far():
    v = random(1, 1, 40, 16)
    out = attend(torch.zeros(1, 1, 40, 8), random(1, 1, 40, 8, seed=1), v, scale=1.0, causal=True)
    assert_close_fp32(out, v.cumsum(2) / torch.arange(1, 41)[:, None])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_ten_thousand_choose_one_key_or_shut_it_out(dtype):
    q = 100 * torch.eye(96, dtype=dtype)[None, None]
    v = random(1, 1, 96, 16, dtype=dtype)
    assert_close_fp32(attend(q, q, v, scale=1.0), v)
    others = (v.double().sum(2, keepdim=True) - v.double()) / 95
    assert_close_bf16(attend(q, q, v, scale=-1.0), others)


def test_a_bad_number_spoils_only_the_queries_that_see_it():
    need(cpu.library)
    q, k, v = inputs("odd")
    k = k.clone()
    k[:, :, 200, 0] = float("nan")
    out = cpu.attend(q, k, v, scale=0.1, causal=True)
    assert out[:, :, :200].isfinite().all()
    assert out[:, :, 200:].isnan().all()


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)])
def test_empty_batches_queries_and_keys(shape):
    need(cpu.library)
    B, H, T, S = shape
    q, k, v = (torch.ones(B, H, length, 8, requires_grad=True) for length in (T, S, S))
    out = cpu.attend(q, k, v, scale=1.0)
    out.sum().backward()
    assert out.shape == (B, H, T, 8) and not out.any()
    assert not q.grad.any() and not k.grad.any() and not v.grad.any()


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_shared_by_threads_give_the_reference_and_the_same_bits_each_time(dtype, threads):
    need(cpu.library)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    parts = [heads(1, 2, 600, 64, seed=seed, dtype=dtype) for seed in (1, 2, 3)]
    try:
        native = lambda *qkv: cpu.attend(*qkv, scale=0.125, causal=True)  # noqa: E731
        assert_twins(native, lambda *qkv: reference.attend(*qkv, scale=0.125, causal=True), parts)
        first, second = pull_back(native, parts), pull_back(native, parts)
    finally:
        torch.set_num_threads(before)
    for got, again in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert_bitwise(got, again)


def test_recomputed_and_unrecorded_attention_are_the_same():
    def run(*qkv):
        return attend(*qkv, scale=0.2, causal=True)

    plain = pull_back(run, inputs("odd"))
    recomputed = pull_back(lambda *qkv: checkpoint(run, *qkv, use_reentrant=False), inputs("odd"))
    with torch.no_grad():
        assert_bitwise(run(*inputs("odd")), plain[0][0])
    for got, want in zip((*recomputed[0], *recomputed[1]), (*plain[0], *plain[1]), strict=True):
        assert_bitwise(got, want)


def test_under_autocast_products_are_bf16_and_gradients_keep_their_dtype():
    q, k, v = (part.detach().requires_grad_() for part in inputs("odd"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(q, k, v, scale=0.2, causal=True)
    out.float().sum().backward()
    want = attend(*(part.bfloat16() for part in (q, k, v)), scale=0.2, causal=True)
    assert_bitwise(out, want)
    assert q.grad.dtype == k.grad.dtype == v.grad.dtype == torch.float32


def test_the_output_of_all_heads_is_one_row_a_token():
    need(cpu.library)
    out = cpu.attend(*inputs("odd"), scale=0.2, causal=True)
    assert out.transpose(1, 2).is_contiguous()


def test_pytorch_serves_where_native_code_is_switched_off(monkeypatch):
    native = attend(*inputs("odd"), scale=0.2, causal=True)
    monkeypatch.setenv("BYROTE_NATIVE", "0")
    plain = attend(*inputs("odd"), scale=0.2, causal=True)
    assert_close_fp32(plain, native)
    assert_close_fp32(plain, functional.scaled_dot_product_attention(*inputs("odd"), is_causal=True, scale=0.2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"causal": True, "mask_B1TS": torch.ones(2, 1, 4, 4, dtype=torch.bool)}, "one of them"),
        ({"mask_B1TS": torch.ones(2, 1, 4, 5, dtype=torch.bool)}, r"\(2, 1, 4, 5\)"),
        ({"mask_B1TS": torch.zeros(2, 1, 4, 4)}, "boolean"),
    ],
)
def test_rules_that_do_not_fit_are_refused(change, message):
    q = torch.zeros(2, 3, 4, 8)
    with pytest.raises(ValueError, match=message):
        attend(q, q, q, scale=1.0, **change)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="needed"):
        attend(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 7), torch.zeros(2, 3, 4, 8), scale=1.0)
