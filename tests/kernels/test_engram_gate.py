"""A memory layer's arithmetic: properties of the reference, and the native kernel as its twin."""

from functools import partial

import pytest
import torch

import byrote.kernels.engram_gate as engram_gate
from byrote.kernels.engram_gate import Conv, cpu, engram_add, gate, reference
from tests.kernels.twins import DTYPES, assert_twins, need, random
from tests.tolerances import assert_bitwise, assert_close_fp32

EPS = 1e-6


def layer(batch, tokens, streams, dim, taps, dtype=torch.float32):
    """Inputs whose scores stay away from 0, where the signed root is infinitely steep."""
    h = random(batch, tokens, streams, dim)
    sign = torch.where(random(batch, tokens, streams, 1, seed=1) > 0, 1.0, -1.0)
    k = 0.7 * sign * h + 0.3 * random(batch, tokens, streams, dim, seed=2)
    value = random(batch, tokens, dim, seed=3)
    gain = 1 + 0.1 * random(streams, dim, seed=4)
    conv = (0.5 * random(streams, dim, taps, seed=5), 1 + 0.1 * random(streams, dim, seed=6)) if taps else ()
    return h.to(dtype), k.to(dtype), value.to(dtype), gain, *conv


def call(module, *inputs, dilation=1, **options):
    conv = Conv(*inputs[4:], dilation) if len(inputs) > 4 else None
    return module.engram_add(*inputs[:4], conv, eps=EPS, **options)


def documents(batch, tokens):
    return torch.randint(-1, 3, (batch, tokens), generator=torch.Generator().manual_seed(0)).sort(dim=1).values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(
    ("batch", "tokens", "streams", "dim", "taps", "dilation"),
    [
        (2, 20, 4, 32, 4, 3),
        (1, 7, 3, 257, 4, 2),
        (3, 9, 1, 65, 2, 1),
        (2, 5, 8, 17, 3, 4),
        (1, 1, 4, 16, 4, 3),
        (2, 0, 4, 16, 4, 3),
        (2, 7, 4, 48, 0, 1),
    ],
)
def test_native_is_reference(batch, tokens, streams, dim, taps, dilation, hard, dtype):
    need(cpu.library)
    for document in (None, documents(batch, tokens)):
        options = {"dilation": dilation, "hard": hard, "document_BS": document}
        inputs = layer(batch, tokens, streams, dim, taps, dtype)
        assert_twins(partial(call, cpu, **options), partial(call, reference, **options), inputs)


def test_the_reference_has_the_gradient_of_its_values():
    inputs = tuple(part.double().requires_grad_() for part in layer(2, 5, 2, 3, 3))
    options = {"dilation": 2, "document_BS": documents(2, 5)}
    assert torch.autograd.gradcheck(partial(call, reference, **options), inputs)


def test_packed_documents_are_each_document_alone():
    inputs = layer(1, 12, 4, 32, 4)
    together, alpha = call(engram_gate, *inputs, dilation=3, document_BS=torch.tensor([[0] * 5 + [1] * 7]))
    for part in (slice(0, 5), slice(5, 12)):
        alone, alone_alpha = call(engram_gate, *(x[:, part] for x in inputs[:3]), *inputs[3:], dilation=3)
        assert_close_fp32(together[:, part], alone)
        assert_close_fp32(alpha[:, part], alone_alpha)


def test_one_call_equals_two_that_hand_over_their_normed_values():
    inputs = layer(2, 12, 4, 32, 4)
    kept = [torch.zeros(2, 9, 4, 32)]

    def extend(normed):
        kept.append(torch.cat((kept[-1], normed), dim=1))
        return kept[-1][:, -9 - normed.shape[1] :]

    whole, _ = call(engram_gate, *inputs, dilation=3)
    parts = [
        call(engram_gate, *(x[:, part] for x in inputs[:3]), *inputs[3:], dilation=3, extend=extend)[0]
        for part in (slice(0, 7), slice(7, 12))
    ]
    assert_close_fp32(torch.cat(parts, dim=1), whole)


def test_a_token_hears_its_past_and_never_its_future():
    inputs = layer(1, 12, 2, 16, 3)
    changed = [part.clone() for part in inputs]
    changed[2][:, 6] += 1.0
    before, after = (call(engram_gate, *part, dilation=2)[0] for part in (inputs, changed))
    moved = (before != after).flatten(2).any(-1)[0].tolist()
    assert moved == [t in (6, 8, 10) for t in range(12)]


def test_taps_of_zero_and_no_convolution_are_the_same():
    inputs = layer(2, 7, 4, 32, 4)
    silent = (*inputs[:4], torch.zeros_like(inputs[4]), inputs[5])
    for with_taps, without in zip(call(engram_gate, *silent), call(engram_gate, *inputs[:4]), strict=True):
        assert_close_fp32(with_taps, without)


def test_zero_values_leave_the_streams_to_the_bit():
    inputs = list(layer(2, 7, 4, 32, 4, torch.bfloat16))
    inputs[2] = torch.zeros_like(inputs[2])
    assert_bitwise(call(engram_gate, *inputs)[0], inputs[0])


@pytest.mark.parametrize("hard", [False, True])
def test_the_gate_of_the_layer_is_the_gate(hard):
    h, k, value, gain = layer(2, 7, 4, 32, 0)
    alpha = call(engram_gate, h, k, value, gain, hard=hard)[1]
    assert_close_fp32(alpha.flatten(0, 1), gate(h.flatten(0, 1), k.flatten(0, 1), gain, eps=EPS, hard=hard))
    assert not hard or set(alpha.flatten().tolist()) <= {0.0, 1.0}


def test_agreement_opens_the_gate_opposition_closes_it_and_an_exact_zero_is_between():
    h = random(3, 1, 64)
    keys = torch.stack((h[0], -h[1], torch.zeros(1, 64)))
    for hard, between in ((False, 0.5), (True, 0.0)):
        agreed, opposed, silent = gate(h, keys, torch.ones(1, 64), eps=EPS, hard=hard)[:, 0].tolist()
        assert agreed > 0.9 and opposed < 0.1 and silent == pytest.approx(between, abs=1e-6)


def test_streams_too_many_for_the_kernel_are_served_by_the_reference():
    inputs = layer(1, 3, 9, 8, 2)
    assert_bitwise(call(engram_gate, *inputs)[0], call(reference, *inputs)[0])


def test_shapes_that_do_not_fit_are_refused():
    h, k, value, gain = layer(2, 7, 4, 32, 0)
    with pytest.raises(ValueError, match="keys has shape"):
        engram_add(h, k[:, :6], value, gain, None, eps=EPS)
    with pytest.raises(ValueError, match=r"conv\.gain has shape"):
        engram_add(h, k, value, gain, Conv(torch.zeros(4, 32, 3), torch.ones(32), 1), eps=EPS)
