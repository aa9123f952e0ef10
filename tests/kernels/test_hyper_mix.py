"""mHC around a site: the reference against its equations, the native kernel against the reference, identity against plain."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from byrote.kernels import hyper_mix
from byrote.kernels.hyper_mix import cpu, hyper_enter, hyper_leave, hyper_read, hyper_step, reference
from byrote.kernels.sinkhorn import sinkhorn
from tests.kernels.twins import DTYPES, SIZES, assert_twins, need, pull_back, random
from tests.tolerances import assert_bitwise, assert_close_bf16, assert_close_fp32

OPTIONS = {"iters": 20, "eps": 1e-6, "norm_eps": 1e-6}
READ = {"eps": 1e-6, "norm_eps": 1e-6}
FORMS = [(4, 32), (4, 33), (4, 5), (2, 48), (3, 17), (8, 16)]  # streams, dim: whole vectors, ragged ends, other numbers of streams
CALLS = ("enter", "leave", "step", "read")
# a bf16 step rounds the streams half-way, which fp64 does not; that it equals leaving and entering has its own test
TWINS = [(name, dtype) for name in CALLS for dtype in DTYPES if (name, dtype) != ("step", torch.bfloat16)]
every_call = pytest.mark.parametrize("name", CALLS)


def entry(streams, dim):
    """fn, base, scale with effects of order one."""
    rows = streams * (streams + 2)
    return [random(rows, streams * dim, seed=1) / (streams * dim) ** 0.5, 0.5 * random(rows, seed=2), torch.tensor([0.7, 1.1, 0.9])]


def read_out(streams, dim):
    fn, base, scale = entry(streams, dim)
    return [fn[:streams].clone(), base[:streams].clone(), scale[:1].clone()]


def left(tokens, streams, dim, dtype=torch.float32):
    """streams, y, post, comb: a site about to be left."""
    post = 2 * random(tokens, streams, seed=4).sigmoid()
    comb = torch.softmax(random(tokens, streams, streams, seed=5), -1)
    return [random(tokens, streams, dim, dtype=dtype), random(tokens, dim, seed=3, dtype=dtype), post, comb]


def calls(backend):
    """The four functions of a module on positional inputs only."""
    return {
        "enter": lambda *inputs: backend.hyper_enter(*inputs, **OPTIONS),
        "leave": backend.hyper_leave,
        "step": lambda *inputs: backend.hyper_step(*inputs, **OPTIONS),
        "read": lambda *inputs: backend.hyper_read(*inputs, **READ),
    }


def inputs_of(name, tokens, streams, dim, dtype=torch.float32):
    leaving = left(tokens, streams, dim, dtype)
    return {
        "enter": [leaving[0], *entry(streams, dim)],
        "leave": leaving,
        "step": [*leaving, *entry(streams, dim)],
        "read": [leaving[0], *read_out(streams, dim)],
    }[name]


def pulled(function, inputs):
    """Outputs, then gradients of the inputs."""
    outputs, grads = pull_back(function, inputs)
    return [*outputs, *grads]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_reference_follows_the_equations_token_by_token():
    streams, fn, base, scale = inputs_of("enter", 3, 4, 5)
    x, post, comb = reference.hyper_enter(streams, fn, base, scale, **OPTIONS)
    y = random(3, 5, seed=9)
    mixed = reference.hyper_leave(streams, y, post, comb)
    for n in range(3):
        f = streams[n].flatten()
        z = (fn @ f) / torch.sqrt((f * f).mean() + 1e-6)
        pre = torch.sigmoid(z[:4] * scale[0] + base[:4]) + 1e-6
        assert_close_fp32(x[n], sum(pre[i] * streams[n, i] for i in range(4)))
        assert_close_fp32(post[n], 2 * torch.sigmoid(z[4:8] * scale[1] + base[4:8]))
        logits = (z[8:] * scale[2] + base[8:]).view(1, 4, 4)
        assert_close_fp32(comb[n], sinkhorn(logits, iters=20, eps=1e-6)[0])
        for k in range(4):
            assert_close_fp32(mixed[n, k], post[n, k] * y[n] + sum(comb[n, j, k] * streams[n, j] for j in range(4)))


@every_call
def test_the_reference_has_the_gradient_of_its_values(name):
    inputs = [part.double().requires_grad_() for part in inputs_of(name, 3, 4, 3)]
    assert torch.autograd.gradcheck(calls(reference)[name], inputs)


@pytest.mark.parametrize(("name", "dtype"), TWINS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", SIZES)
def test_native_is_reference(name, tokens, form, dtype):
    need(cpu.library)
    assert_twins(calls(cpu)[name], calls(reference)[name], inputs_of(name, tokens, *form, dtype))


@pytest.mark.parametrize("dim", [256, 512])
def test_native_is_reference_where_a_row_is_longer_than_one_chunk_of_the_product(dim):
    need(cpu.library)
    assert_twins(calls(cpu)["step"], calls(reference)["step"], inputs_of("step", 70, 4, dim))


@every_call
def test_two_threads_agree_with_one_and_with_themselves(name, two_threads):
    need(cpu.library)
    inputs = inputs_of(name, 257, 4, 48)
    first, second = (pulled(calls(cpu)[name], inputs) for _ in range(2))
    torch.set_num_threads(1)
    alone = pulled(calls(cpu)[name], inputs)
    for one, again, single in zip(first, second, alone):
        assert_bitwise(one, again)
        assert_close_fp32(one, single)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_is_leaving_and_entering(dtype):
    inputs = inputs_of("step", 37, 4, 32, dtype)

    def apart(streams, y, post, comb, fn, base, scale):
        streams = hyper_leave(streams, y, post, comb)
        return streams, *hyper_enter(streams, fn, base, scale, **OPTIONS)

    together = pulled(lambda *parts: hyper_step(*parts, **OPTIONS), inputs)
    close = assert_close_fp32 if dtype == torch.float32 else assert_close_bf16
    for got, want in zip(together, pulled(apart, inputs), strict=True):
        close(got, want)


def test_identity_mixes_are_the_plain_residual():
    streams, y = random(257, 4, 32), random(257, 32, seed=1)
    post, comb = torch.ones(257, 4), torch.eye(4).expand(257, 4, 4)
    assert_bitwise(hyper_leave(streams, y, post, comb), streams + y[:, None])


def test_sixty_sites_keep_the_sum_of_the_streams():
    """comb's rows sum to one, so mixing moves streams about and neither makes nor loses any: only y adds to the sum."""
    streams = random(33, 4, 32).double()
    total = streams.sum(1)
    for site in range(60):
        y, comb = random(33, 32, seed=site).double(), sinkhorn(random(33, 4, 4, seed=site).double(), iters=200, eps=0.0)
        streams = hyper_leave(streams, y, torch.ones(33, 4).double(), comb)
        total = total + 4 * y
    assert (streams.sum(1) - total).abs().max() < 1e-9 * total.abs().max()


def test_sixty_native_mixes_neither_grow_nor_fade():
    streams = torch.ones(33, 4, 32)
    for site in range(60):
        comb = sinkhorn(random(33, 4, 4, seed=site), iters=20, eps=1e-6)
        streams = hyper_leave(streams, torch.zeros(33, 32), torch.ones(33, 4), comb)
    assert (streams - 1).abs().max() < 1e-3


def test_without_dynamic_part_every_token_gets_the_static_mixes():
    streams = random(7, 4, 32)
    x, post, comb = hyper_enter(streams, torch.zeros(24, 128), torch.zeros(24), torch.zeros(3), **OPTIONS)
    assert_close_fp32(x, 0.5 * streams.sum(1))
    assert_close_fp32(post, torch.ones(7, 4))
    assert_close_fp32(comb, torch.full((7, 4, 4), 0.25))


def test_equal_streams_are_read_as_what_they_hold():
    streams = random(7, 1, 32).expand(7, 4, 32)
    fn, _, scale = read_out(4, 32)
    a_quarter_each = torch.full((4,), 1 / 3).log()
    assert_close_fp32(hyper_read(streams, 0 * fn, a_quarter_each, scale, **READ), streams[:, 0])


@every_call
def test_values_are_the_same_without_gradients(name):
    need(cpu.library)
    inputs = inputs_of(name, 37, 4, 33)
    with torch.no_grad():
        outputs = calls(cpu)[name](*inputs)
    for got, want in zip([outputs] if name in ("leave", "read") else outputs, pull_back(calls(cpu)[name], inputs)[0], strict=True):
        assert_bitwise(got, want)


@every_call
def test_recomputing_a_checkpoint_changes_nothing(name):
    inputs, call = inputs_of(name, 37, 4, 32), calls(hyper_mix)[name]
    again = pulled(lambda *parts: checkpoint(call, *parts, use_reentrant=False), inputs)
    for got, want in zip(again, pulled(call, inputs), strict=True):
        assert_bitwise(got, want)


@every_call
def test_inputs_may_lie_in_any_order_of_memory(name):
    inputs, call = inputs_of(name, 37, 4, 32), calls(hyper_mix)[name]
    strewn = [part.transpose(0, -1).contiguous().transpose(0, -1) for part in inputs]
    for got, want in zip(pulled(call, strewn), pulled(call, inputs), strict=True):
        assert_bitwise(got, want)


@every_call
def test_the_reference_takes_over_where_native_code_is_switched_off(name, monkeypatch):
    inputs, call = inputs_of(name, 37, 4, 32), calls(hyper_mix)[name]
    native = pulled(call, inputs)
    monkeypatch.setenv("BYROTE_NATIVE", "0")
    assert not cpu.can_run(inputs[0])
    for got, want in zip(native, pulled(call, inputs), strict=True):
        assert_close_fp32(got, want)


@every_call
@pytest.mark.parametrize("backend", [cpu, reference])
def test_autocast_changes_nothing(name, backend):
    need(cpu.library)
    inputs, call = inputs_of(name, 37, 4, 32, torch.bfloat16), calls(backend)[name]

    def under_autocast(*parts):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call(*parts)

    for got, want in zip(pulled(under_autocast, inputs), pulled(call, inputs), strict=True):
        assert_bitwise(got, want)


def test_a_sub_layer_may_answer_in_bf16_to_streams_in_fp32():
    streams, y, post, comb = left(7, 4, 32)
    mixed = hyper_leave(streams, y.bfloat16(), post, comb)
    assert mixed.dtype == torch.float32
    assert_close_fp32(mixed, hyper_leave(streams, y.bfloat16().float(), post, comb))


@pytest.mark.parametrize("used", [0, 1, 2, 3])
def test_an_output_nobody_uses_costs_no_gradient(used):
    inputs = inputs_of("step", 37, 4, 33)
    for backend in (cpu, reference) if cpu.library() else (reference,):
        leaves = [part.clone().requires_grad_() for part in inputs]
        output = calls(backend)["step"](*leaves)[used]
        grads = torch.autograd.grad(output, leaves, random(*output.shape, seed=9), allow_unused=True, materialize_grads=True)
        if backend is cpu:
            native = grads
    if cpu.library():
        for got, want in zip(native, grads, strict=True):
            assert_close_fp32(got, want)


def test_a_bad_number_spoils_its_own_token_only():
    streams, y, post, comb = left(40, 4, 32)
    streams[17, 2, 5] = float("nan")
    x, new_post, new_comb = hyper_enter(streams, *entry(4, 32), **OPTIONS)
    mixed = hyper_leave(streams, y, post, comb)
    others = torch.arange(40) != 17
    for result in (x, new_post, new_comb, mixed):
        assert result[17].isnan().any()
        assert result[others].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_and_nan_come_through_the_rounding_of_the_streams(dtype):
    streams, y, post, comb = left(1, 4, 16, dtype)
    y[0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    mixed = hyper_leave(streams, y, post, comb)
    assert (mixed[0, :, 0] == float("inf")).all()
    assert (mixed[0, :, 1] == float("-inf")).all()
    assert mixed[0, :, 2].isnan().all()


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (0, (7, 128), r"\[tokens, streams, dim\] is needed"),
        (1, (7, 31), r"y has shape \(7, 31\); .* need \(7, 32\)"),
        (2, (7, 3), r"post has shape .* need \(7, 4\)"),
        (3, (7, 4), r"comb has shape .* need \(7, 4, 4\)"),
        (4, (24, 127), r"fn has shape .* need \(24, 128\)"),
        (5, (23,), r"base has shape .* need \(24,\)"),
        (6, (1,), r"scale has shape .* need \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_shape_that_does(place, shape, message):
    inputs = inputs_of("step", 7, 4, 32)
    inputs[place] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        hyper_step(*inputs, **OPTIONS)
