"""Rotary positions: the reference is a rotation, the native kernels are the reference."""

from functools import partial

import pytest
import torch

from byrote.kernels.rotary import LAYOUTS, assemble_qkv, cpu, reference, rotate
from tests.kernels.twins import DTYPES, assert_twins, need, random
from tests.tolerances import assert_bitwise, assert_close_fp32


def angles(batch, tokens, pairs):
    turns = random(batch, tokens, pairs, seed=9) * 3
    return turns.cos(), turns.sin()


def projections(batch, tokens, heads, nope, rope, value, dtype=torch.float32):
    q = random(batch, tokens, heads * (nope + rope), dtype=dtype)
    kv = random(batch, tokens, heads * (nope + value), seed=1, dtype=dtype)
    return q, kv, random(batch, tokens, 24 + rope, seed=2, dtype=dtype)[..., 24:]  # k_rope is a slice of what the latent comes with


def assemble(module, q, kv, k_rope, *, heads, layout):
    cos, sin = angles(*k_rope.shape[:2], k_rope.shape[2] // 2)
    return module.assemble_qkv(q, kv, k_rope, cos.to(q.dtype) if q.dtype == torch.float64 else cos, sin, heads=heads, layout=layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "sizes", [(2, 7, 3, 24, 8, 12), (1, 257, 1, 5, 2, 3), (1, 1, 2, 16, 64, 16), (2, 0, 2, 4, 4, 4), (1, 7, 2, 0, 6, 1)]
)
def test_native_assembly_is_reference(sizes, layout, dtype):
    need(cpu.library)
    options = {"heads": sizes[2], "layout": layout}
    assert_twins(partial(assemble, cpu, **options), partial(assemble, reference, **options), projections(*sizes, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 7, 3, 16), (1, 257, 10), (1, 1, 1, 2, 34), (3, 0, 4)])
def test_native_rotation_is_reference(shape, layout, dtype):
    need(cpu.library)
    cos, sin = angles(*shape[:2], shape[-1] // 2)

    def call(module, x):
        return module.rotate(x, cos, sin, layout)

    assert_twins(partial(call, cpu), partial(call, reference), [random(*shape, dtype=dtype)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cotangents_may_lie_with_tokens_before_heads(layout):
    need(cpu.library)
    inputs = [part.detach().requires_grad_() for part in projections(2, 7, 3, 24, 8, 12)]
    outputs = assemble(cpu, *inputs, heads=3, layout=layout)
    plain = [random(*out.shape, seed=place) for place, out in enumerate(outputs)]
    swapped = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in plain]
    for one, other in zip(
        torch.autograd.grad(outputs, inputs, plain, retain_graph=True), torch.autograd.grad(outputs, inputs, swapped), strict=True
    ):
        assert_bitwise(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_has_the_gradient_of_its_values(layout):
    inputs = tuple(part.double().requires_grad_() for part in projections(1, 3, 2, 3, 4, 2))
    assert torch.autograd.gradcheck(partial(assemble, reference, heads=2, layout=layout), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_turning_keeps_lengths_and_turning_back_restores(layout):
    x, (cos, sin) = random(2, 7, 3, 16), angles(2, 7, 8)
    turned = rotate(x, cos, sin, layout)
    assert_close_fp32(turned.norm(dim=-1), x.norm(dim=-1))
    assert_close_fp32(rotate(turned, cos, -sin, layout), x)


def test_layouts_differ_by_the_order_of_channels_only():
    x, (cos, sin) = random(2, 7, 16), angles(2, 7, 8)
    order = torch.arange(16).view(8, 2).t().flatten()  # even channels, then odd ones
    assert_bitwise(rotate(x, cos, sin, "interleaved")[..., order], rotate(x[..., order], cos, sin, "half"))


def test_scores_depend_on_the_distance_of_positions_only():
    frequency = torch.tensor([1.0, 0.1, 0.01, 0.001])
    q, k = random(1, 1, 8), random(1, 1, 8, seed=1)

    def score(query_position, key_position):
        turned = [
            rotate(x, (p * frequency).cos()[None, None], (p * frequency).sin()[None, None], "half")
            for x, p in ((q, query_position), (k, key_position))
        ]
        return (turned[0] * turned[1]).sum()

    assert_close_fp32(score(3, 1), score(12, 10))


def test_every_head_gets_its_own_query_and_the_shared_rotary_key():
    q, kv, k_rope = projections(2, 5, 3, 4, 6, 2)
    cos, sin = angles(2, 5, 3)
    queries, keys, values = assemble_qkv(q, kv, k_rope, cos, sin, heads=3, layout="half")
    for head in range(3):
        assert_bitwise(queries[:, head, :, :4], q[..., head * 10 : head * 10 + 4])
        assert_bitwise(values[:, head], kv[..., head * 6 + 4 : head * 6 + 6])
        assert_bitwise(keys[:, head, :, 4:], keys[:, 0, :, 4:])


def test_an_unknown_layout_and_shapes_that_do_not_fit_are_refused():
    q, kv, k_rope = projections(2, 5, 3, 4, 6, 2)
    cos, sin = angles(2, 5, 3)
    with pytest.raises(ValueError, match="interleaved, half"):
        rotate(k_rope, cos, sin, "halved")
    with pytest.raises(ValueError, match="even K"):
        rotate(k_rope, cos[:, :4], sin, "half")
    with pytest.raises(ValueError, match="do not fit 4 heads"):
        assemble_qkv(q, kv, k_rope, cos, sin, heads=4, layout="half")
