"""What every native kernel owes its callers, whatever it computes."""

from itertools import chain

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from byrote.kernels import engram_gate, permute, rms_norm, rotary, swiglu
from tests.kernels.twins import need, pull_back, random
from tests.tolerances import assert_bitwise, assert_close_bf16, assert_close_fp32

TOKENS, DIM = 300, 128  # more numbers than one thread is given
COS, SIN = random(2, 150, 8, seed=7).cos(), random(2, 150, 8, seed=7).sin()
ORDER, PLACE = permute.reference.sort_by_expert(torch.randint(0, 5, (2 * TOKENS,), generator=torch.Generator().manual_seed(0)), 5)


def memory(h, k, value, gain, weight, conv_gain):
    return engram_gate.engram_add(h, k, value, gain, engram_gate.Conv(weight, conv_gain, 3), eps=1e-6)


def memory_inputs():
    h = random(2, 75, 4, 64)
    k = 0.7 * h + 0.3 * random(2, 75, 4, 64, seed=1)
    return [h, k, random(2, 75, 64, seed=2), 1 + 0.1 * random(4, 64, seed=3), random(4, 64, 4, seed=4), 1 + 0.1 * random(4, 64, seed=5)]


CASES = {  # the package, the function as its users call it, its inputs
    "rms_norm": (rms_norm, lambda x, gain: rms_norm.rms_norm(x, gain, 1e-6), lambda: [random(TOKENS, DIM), 1 + 0.1 * random(DIM, seed=1)]),
    "swiglu": (
        swiglu,
        lambda x, weight: swiglu.swiglu(x, limit=2.0, weight_N=weight),
        lambda: [random(TOKENS, DIM), random(TOKENS, seed=1)],
    ),
    "rotate": (rotary, lambda x: rotary.rotate(x, COS, SIN, "interleaved"), lambda: [random(2, 150, 8, 16)]),
    "assemble_qkv": (
        rotary,
        lambda q, kv, k_rope: rotary.assemble_qkv(q, kv, k_rope, COS, SIN, heads=4, layout="half"),
        lambda: [random(2, 150, 128), random(2, 150, 160, seed=1), random(2, 150, 16, seed=2)],
    ),
    "dispatch": (permute, lambda x: permute.dispatch(x, ORDER, PLACE, 2), lambda: [random(TOKENS, DIM)]),
    "combine": (permute, lambda x: permute.combine(x, ORDER, PLACE, TOKENS), lambda: [random(2 * TOKENS, DIM)]),
    "engram_add": (engram_gate, memory, memory_inputs),
}
every_kernel = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def case(name):
    package, function, inputs = CASES[name]
    need(package.cpu.library)
    return function, inputs()


def assert_same(one, other):
    for parts in zip(one, other, strict=True):
        for left, right in zip(*parts, strict=True):
            assert_bitwise(left, right)


@every_kernel
def test_the_reference_takes_over_where_native_code_is_switched_off(name, monkeypatch):
    function, inputs = case(name)
    native = pull_back(function, inputs)
    monkeypatch.setenv("BYROTE_NATIVE", "0")
    for got, want in zip(chain(*native), chain(*pull_back(function, inputs)), strict=True):
        assert_close_fp32(got, want)


@every_kernel
def test_fp64_stays_fp64(name):
    function, inputs = case(name)
    outputs, grads = pull_back(function, [part.double() for part in inputs])
    assert {part.dtype for part in grads} == {torch.float64}
    assert {part.dtype for part in outputs} == {torch.float64}


@every_kernel
def test_results_depend_on_nothing_but_inputs_and_threads(name, two_threads):
    function, inputs = case(name)
    assert_same(pull_back(function, inputs), pull_back(function, inputs))


@every_kernel
def test_two_threads_agree_with_one(name, two_threads):
    function, inputs = case(name)
    shared = pull_back(function, inputs)
    torch.set_num_threads(1)
    for got, want in zip(chain(*shared), chain(*pull_back(function, inputs)), strict=True):
        assert_close_fp32(got, want)


@every_kernel
def test_values_are_the_same_without_gradients(name):
    function, inputs = case(name)
    with torch.no_grad():
        outputs = function(*inputs)
    assert_same([[outputs] if isinstance(outputs, torch.Tensor) else outputs], pull_back(function, inputs)[:1])


@every_kernel
def test_recomputing_a_checkpoint_changes_nothing(name):
    function, inputs = case(name)
    assert_same(pull_back(lambda *parts: checkpoint(function, *parts, use_reentrant=False), inputs), pull_back(function, inputs))


@every_kernel
def test_inputs_may_lie_in_any_order_of_memory(name):
    function, inputs = case(name)
    strewn = [part.transpose(0, -1).contiguous().transpose(0, -1) for part in inputs]
    assert any(not part.is_contiguous() for part in strewn)
    assert_same(pull_back(function, strewn), pull_back(function, inputs))


@every_kernel
def test_bf16_goes_through_under_autocast_and_is_near_fp32(name):
    function, inputs = case(name)
    halved = [part.bfloat16() for part in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, grads = pull_back(function, halved)
    assert outputs[0].dtype == torch.bfloat16
    wanted_outputs, wanted_grads = pull_back(function, [part.float() for part in halved])
    for got, want in zip((*outputs, *grads), (*wanted_outputs, *wanted_grads), strict=True):
        assert_close_bf16(got, want)


@every_kernel
def test_a_second_derivative_is_refused(name):
    function, inputs = case(name)
    leaves = [part.requires_grad_() for part in inputs]
    outputs = function(*leaves)
    first = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    (grad, *_) = torch.autograd.grad(first.square().sum(), leaves, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@every_kernel
def test_inputs_are_left_alone(name):
    function, inputs = case(name)
    before = [part.clone() for part in inputs]
    pull_back(function, inputs)
    assert_same([before], [inputs])


@every_kernel
def test_other_defaults_of_dtype_and_device_change_nothing(name, monkeypatch):
    function, inputs = case(name)
    want = pull_back(function, inputs)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.device("meta"):
            outputs = function(*inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same([[outputs] if isinstance(outputs, torch.Tensor) else outputs], want[:1])
