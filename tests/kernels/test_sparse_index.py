"""Choosing keys, attending to them, teaching the index: each back end against the reference, the reference against its equations."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from byrote.kernels.attention import attend
from byrote.kernels.sparse_index import Chosen, Spans, attend_chosen, cpu, index_loss, portable, reference, select
from tests.kernels.twins import DTYPES, assert_twins, need, pull_back, random
from tests.tolerances import assert_bitwise, assert_close_fp32

SIZES = {  # B, T, S, heads, width, K: lone numbers, odd widths, more than a block of queries, more than a panel and a block of keys
    "one": (1, 1, 1, 1, 1, 1),
    "seven": (7, 7, 7, 3, 5, 3),
    "odd": (2, 33, 257, 5, 33, 40),
    "wide": (1, 17, 300, 17, 80, 129),
    "few keys": (2, 40, 9, 4, 16, 9),
}
every_size = pytest.mark.parametrize("size", SIZES)
BACKENDS = {"native": cpu, "portable": portable}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if request.param == "native":
        need(cpu.library)
    monkeypatch.setattr(portable, "BLOCK_NUMBERS", 3_000)  # several blocks, the last one short
    return BACKENDS[request.param]


def spans_of(size: str) -> Spans:
    """Any spans: from the first key, from anywhere, and none at all."""
    B, T, S, *_ = SIZES[size]
    generator = torch.Generator().manual_seed(7)
    first = torch.randint(0, S, (B, T), generator=generator) * (torch.rand(B, T, generator=generator) < 0.5)
    return Spans(first, first + (torch.rand(B, T, generator=generator) * (S - first + 1)).long())


def index_parts(size: str, dtype: torch.dtype = torch.float32, *, whole: bool = False) -> list[Tensor]:
    """Index queries, keys and weights; `whole` numbers are so small that sums are exact and equal scores abound."""
    B, T, S, J, width, _ = SIZES[size]
    parts = [random(B, T, J, width, seed=1), random(B, S, width + 3, seed=2), random(B, T, J, seed=3)]
    if whole:
        parts = [part.round().clamp(-2, 2) for part in parts]
    return [parts[0].to(dtype), parts[1].to(dtype)[..., :width], parts[2]]


def attention_parts(size: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys that are part of wider rows, and sinks."""
    B, T, S, H, X, _ = SIZES[size]
    return [random(B, T, H, X, seed=4, dtype=dtype), random(B, S, X + 5, seed=5, dtype=dtype)[..., :X], random(H, seed=6)]


def chosen_of(size: str) -> Chosen:
    return reference.select(*index_parts(size, whole=True), spans_of(size), SIZES[size][5])


def assert_same_choice(got: Chosen, want: Chosen) -> None:
    assert_bitwise(got.index_BTK, want.index_BTK)
    assert_bitwise(got.valid_BTK, want.valid_BTK)


# --- choosing ---------------------------------------------------------------------------------------------------------


@every_size
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_scores_give_the_references_choice_ties_included(backend, size, dtype):
    parts, spans, top_k = index_parts(size, dtype, whole=True), spans_of(size), SIZES[size][5]
    want = reference.select(*parts, spans, top_k)
    assert_same_choice(backend.select(*parts, spans, top_k), want)
    if size in ("odd", "wide"):
        scores = reference.index_scores(*parts).masked_fill(~spans.mask(SIZES[size][2]), float("-inf"))
        last = scores.masked_fill(~chosen_mask(want, SIZES[size][2]), float("inf")).amin(-1)
        assert ((scores == last[..., None]).sum(-1) > 1).float().mean() > 0.3  # the last place is contested


def chosen_mask(chosen: Chosen, keys: int) -> Tensor:
    counts = torch.zeros(*chosen.index_BTK.shape[:2], keys, dtype=torch.int64)
    return counts.scatter_add_(2, chosen.index_BTK, chosen.valid_BTK.long()) > 0


@every_size
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_scores_differ_from_the_references_choice_only_where_they_almost_tie(backend, size, dtype):
    parts, spans, (_, _, S, _, _, top_k) = index_parts(size, dtype), spans_of(size), SIZES[size]
    got = chosen_mask(backend.select(*parts, spans, top_k), S)
    exact = [part.double() for part in parts]
    want, scores = chosen_mask(reference.select(*exact, spans, top_k), S), reference.index_scores(*exact)
    assert torch.equal(got.sum(-1), want.sum(-1))
    gap = (scores.masked_fill(~(want & ~got), -1e9).amax(-1) - scores.masked_fill(~(got & ~want), 1e9).amin(-1)).clamp_min(0)
    assert gap.max() <= 1e-5 * scores.abs().max()


def test_the_reference_chooses_the_best_and_of_equals_the_first():
    scores = torch.tensor([[[0.0, 2.0, -0.0, -1.0, 2.0, 0.0, 7.0]]])
    spans = Spans(torch.tensor([[0]]), torch.tensor([[6]]))
    for top_k, want in ((1, [1]), (2, [1, 4]), (3, [0, 1, 4]), (4, [0, 1, 2, 4]), (6, [0, 1, 2, 3, 4, 5])):
        assert reference.best(scores, spans, top_k).index_BTK.tolist() == [[want]]


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_every_magnitude_are_ranked_by_value(backend, seed):
    """One head of width one, so that the score is the product itself: tiny, huge, equal up to the last bit, zero and negative zero."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.ldexp(torch.rand(1, 500, 1, generator=generator), torch.randint(-60, 60, (1, 500, 1), generator=generator))
    k[0, ::5] = k[0, 7]
    k[0, ::11] = 0
    for weight in (1.0, -1.0):
        parts, spans = (torch.ones(1, 1, 1, 1), k, torch.full((1, 1, 1), weight)), Spans(torch.tensor([[3]]), torch.tensor([[499]]))
        assert_same_choice(backend.select(*parts, spans, 100), reference.select(*parts, spans, 100))


def test_chosen_keys_come_in_order_valid_ones_first_and_lie_inside_the_span(backend):
    chosen, spans = backend.select(*index_parts("odd"), spans_of("odd"), 40), spans_of("odd")
    index, valid = chosen
    assert torch.equal(valid.sum(-1), (spans.end_BT - spans.first_BT).clamp(max=40))
    assert (valid[..., :-1] >= valid[..., 1:]).all() and not index[~valid].any()
    assert ((index[..., 1:] > index[..., :-1]) | ~valid[..., 1:]).all()
    assert (((index >= spans.first_BT[..., None]) & (index < spans.end_BT[..., None])) | ~valid).all()


def test_more_than_there_is_chooses_all():
    chosen = select(*index_parts("few keys"), spans_of("few keys"), 1000)
    assert_same_choice(chosen, Chosen.everything(spans_of("few keys"), 9))


def test_a_query_without_keys_and_a_call_without_queries_choose_nothing(backend):
    q, k, weight = index_parts("odd")
    nothing = Spans(torch.zeros(2, 33, dtype=torch.int64), torch.zeros(2, 33, dtype=torch.int64))
    assert not backend.select(q, k, weight, nothing, 5).valid_BTK.any()
    none = Spans(*(torch.zeros(2, 0, dtype=torch.int64) for _ in range(2)))
    assert select(q[:, :0], k, weight[:, :0], none, 5).valid_BTK.shape == (2, 0, 5)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_change_the_choice(threads):
    need(cpu.library)
    before, parts, spans = torch.get_num_threads(), index_parts("wide"), spans_of("wide")
    alone = cpu.select(*parts, spans, 129)
    torch.set_num_threads(threads)
    try:
        assert_same_choice(cpu.select(*parts, spans, 129), alone)
    finally:
        torch.set_num_threads(before)


# --- attending --------------------------------------------------------------------------------------------------------


@every_size
@pytest.mark.parametrize("sinks", [False, True], ids=["no sink", "sink"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_to_the_chosen_is_the_references(backend, size, sinks, dtype):
    chosen, inputs = chosen_of(size), attention_parts(size, dtype)[: 2 + sinks]

    def run(part):
        def attend_with(q: Tensor, keys: Tensor, sink: Tensor | None = None) -> Tensor:
            return part.attend_chosen(q, keys, chosen, scale=0.3, value_dim=max(1, SIZES[size][4] - 3), sink_H=sink)

        return attend_with

    assert_twins(run(backend), run(reference), inputs)


def test_the_reference_has_the_gradient_of_its_values():
    chosen = chosen_of("seven")
    inputs = [part[:2].double().requires_grad_() for part in attention_parts("seven")[:2]]
    sink = random(3).double().requires_grad_()
    some = Chosen(chosen.index_BTK[:2], chosen.valid_BTK[:2])
    assert torch.autograd.gradcheck(lambda q, k, s: reference.attend_chosen(q, k, some, scale=0.5, value_dim=4, sink_H=s), [*inputs, sink])


def test_every_key_chosen_is_dense_attention():
    B, T, H, X = 2, 65, 3, 24
    q, keys = random(B, T, H, X, seed=1), random(B, T, X, seed=2)
    causal = Spans(torch.zeros(B, T, dtype=torch.int64), torch.arange(1, T + 1).expand(B, T))

    def dense(q: Tensor, keys: Tensor) -> Tensor:
        k, v = (part[:, None].expand(-1, H, -1, -1) for part in (keys, keys[..., :16]))
        return attend(q.transpose(1, 2), k, v, scale=0.2, causal=True).transpose(1, 2)

    got = pull_back(lambda q, keys: attend_chosen(q, keys, Chosen.everything(causal, T), scale=0.2, value_dim=16), (q, keys))
    want = pull_back(dense, (q, keys))
    for one, other in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert_close_fp32(one, other)


def test_a_query_that_sees_nothing_gives_zeros_and_takes_no_gradient(backend):
    q, keys, sink = (part.requires_grad_() for part in attention_parts("odd"))
    chosen = chosen_of("odd")
    valid = chosen.valid_BTK.clone()
    valid[:, [0, 5, 32]] = False
    for own in (None, sink):
        out = backend.attend_chosen(q, keys, Chosen(chosen.index_BTK, valid), scale=0.3, sink_H=own)
        grads = torch.autograd.grad(out.square().sum(), (q, keys))
        assert not out[:, [0, 5, 32]].any() and not grads[0][:, [0, 5, 32]].any()
        assert out[:, 6:9].any() and all(grad.isfinite().all() for grad in grads)


def test_a_sink_takes_its_share_of_the_softmax():
    q, keys = torch.zeros(1, 1, 2, 4), torch.ones(1, 3, 4)
    chosen = Chosen(torch.tensor([[[0, 2]]]), torch.tensor([[[True, True]]]))
    out = attend_chosen(q, keys, chosen, scale=1.0, sink_H=torch.tensor([0.0, 10.0]).log())
    assert_close_fp32(out[0, 0, :, 0], torch.tensor([1.0, 2 / 12]))


def test_scores_of_ten_thousand_choose_one_key(backend):
    keys = 100 * torch.eye(96)[None]
    everything = Chosen.everything(Spans(torch.zeros(1, 96, dtype=torch.int64), torch.full((1, 96), 96)), 96)
    assert_close_fp32(backend.attend_chosen(keys[:, :, None], keys, everything, scale=1.0)[:, :, 0], keys)


def test_window_and_entries_attended_at_once_are_one_softmax():
    """V4: keys laid one behind the other, a window of the first and some of the second."""
    q, window, entries = random(2, 9, 3, 8, seed=1), random(2, 9, 8, seed=2), random(2, 5, 8, seed=3)
    own_BT = torch.arange(9).expand(2, 9)
    near = Chosen.everything(Spans((own_BT - 3).clamp_min(0), own_BT + 1), 4)
    far = Chosen.everything(Spans(torch.zeros_like(own_BT), (own_BT + 1) // 2), 5)
    out = attend_chosen(q, torch.cat((window, entries), 1), near.joined(far, 9), scale=0.5)
    mask = torch.cat([Spans((own_BT - 3).clamp_min(0), own_BT + 1).mask(9), Spans(torch.zeros_like(own_BT), (own_BT + 1) // 2).mask(5)], -1)
    both = torch.cat((window, entries), 1)[:, None].expand(-1, 3, -1, -1)
    assert_close_fp32(out, attend(q.transpose(1, 2), both, both, scale=0.5, mask_B1TS=mask[:, None]).transpose(1, 2))


@pytest.mark.parametrize("threads", [2, 3])
def test_queries_shared_by_threads_give_the_reference_and_the_same_bits_each_time(threads):
    need(cpu.library)
    B, T, S, H, X, K = 2, 300, 400, 4, 20, 70
    inputs, spans = (
        [random(B, T, H, X, seed=1), random(B, S, X, seed=2)],
        Spans(torch.zeros(B, T, dtype=torch.int64), torch.full((B, T), S)),
    )
    chosen = reference.best(random(B, T, S, seed=3), spans, K)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        native = lambda q, keys: cpu.attend_chosen(q, keys, chosen, scale=0.3)  # noqa: E731
        assert_twins(native, lambda q, keys: reference.attend_chosen(q, keys, chosen, scale=0.3), inputs)
        first, second = pull_back(native, inputs), pull_back(native, inputs)
    finally:
        torch.set_num_threads(before)
    for got, again in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert_bitwise(got, again)


def test_recomputed_and_unrecorded_attention_are_the_same():
    chosen, inputs = chosen_of("odd"), attention_parts("odd")[:2]
    run = lambda q, keys: attend_chosen(q, keys, chosen, scale=0.2)  # noqa: E731
    plain, recomputed = pull_back(run, inputs), pull_back(lambda *parts: checkpoint(run, *parts, use_reentrant=False), inputs)
    with torch.no_grad():
        assert_bitwise(run(*inputs), plain[0][0])
    for got, want in zip((*recomputed[0], *recomputed[1]), (*plain[0], *plain[1]), strict=True):
        assert_bitwise(got, want)


# --- teaching the index -----------------------------------------------------------------------------------------------


@every_size
@pytest.mark.parametrize("over", ["spans", "chosen"])
def test_the_loss_of_the_index_in_blocks_is_the_references(monkeypatch, size, over):
    monkeypatch.setattr(portable, "BLOCK_NUMBERS", 3_000)
    seen = spans_of(size) if over == "spans" else chosen_of(size)
    attention = [random(*SIZES[size][:2], 4, 6, seed=8), random(SIZES[size][0], SIZES[size][2], 6, seed=9)]
    fast = lambda *index: index_loss(*index, *attention, seen, scale=0.7)  # noqa: E731
    slow = lambda *index: reference.index_loss(*index, *(part.double() for part in attention), seen, scale=0.7)  # noqa: E731
    assert_twins(fast, slow, index_parts(size))


def test_the_loss_over_all_keys_is_the_divergence_of_two_softmaxes():
    q, k, weight = index_parts("few keys")
    attending, keys = random(2, 40, 3, 6, seed=8), random(2, 9, 6, seed=9)
    full = Spans(torch.zeros(2, 40, dtype=torch.int64), torch.full((2, 40), 9))
    p = torch.softmax(torch.einsum("bthx,bsx->bths", attending, keys) * 0.7, -1).sum(2)
    p = p / p.sum(-1, keepdim=True)
    log_q = torch.log_softmax(reference.index_scores(q, k, weight), -1)
    want = torch.nn.functional.kl_div(log_q, p, reduction="sum")
    for seen in (full, Chosen.everything(full, 9)):
        assert_close_fp32(index_loss(q, k, weight, attending, keys, seen, scale=0.7), want)


def test_the_loss_is_never_negative_and_zero_where_the_index_says_what_attention_does():
    keys = random(1, 30, 6, seed=1).abs()
    attending = random(1, 30, 1, 6, seed=2).abs()  # one head, nothing for the ReLU to cut: the same scores
    spans = Spans(torch.zeros(1, 30, dtype=torch.int64), torch.arange(1, 31)[None])
    assert index_loss(attending, keys, torch.full((1, 30, 1), 0.7), attending, keys, spans, scale=0.7).abs() < 1e-5
    assert index_loss(attending, keys.flip(1), torch.full((1, 30, 1), 0.7), attending, keys, spans, scale=0.7) > 0.1


def test_attention_gets_no_gradient_from_the_loss_of_the_index():
    index, attention = index_parts("odd"), [random(2, 33, 4, 6, seed=8), random(2, 257, 6, seed=9)]
    leaves = [part.detach().requires_grad_() for part in (*index, *attention)]
    index_loss(*leaves, chosen_of("odd"), scale=0.7).backward()
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in leaves[:3])
    assert all(leaf.grad is None for leaf in leaves[3:])


def test_queries_that_see_nothing_or_one_key_add_nothing():
    nothing = Spans(torch.full((2, 33), 3), torch.full((2, 33), 3))
    single = Spans(torch.full((2, 33), 3), torch.full((2, 33), 4))
    attention = random(2, 33, 4, 6, seed=8), random(2, 257, 6, seed=9)
    for spans in (nothing, single):
        leaves = [part.detach().requires_grad_() for part in index_parts("odd")]
        loss = index_loss(*leaves, *attention, spans, scale=0.7)
        loss.backward()
        assert loss == 0 and not any(leaf.grad.any() for leaf in leaves)


# --- the package ------------------------------------------------------------------------------------------------------


def test_pytorch_serves_where_native_code_is_switched_off(monkeypatch):
    chosen, inputs = chosen_of("odd"), attention_parts("odd")
    native = attend_chosen(*inputs[:2], chosen, scale=0.3, sink_H=inputs[2])
    monkeypatch.setenv("BYROTE_NATIVE", "0")
    assert_same_choice(select(*index_parts("odd", whole=True), spans_of("odd"), 40), chosen)
    assert_close_fp32(attend_chosen(*inputs[:2], chosen, scale=0.3, sink_H=inputs[2]), native)


def test_no_tensor_of_queries_times_keys_is_made(monkeypatch):
    """The largest allocation of a long call, counted: blocks of queries only, whatever the length."""
    monkeypatch.setattr(portable, "BLOCK_NUMBERS", 1 << 16)
    T, made = 2_000, []
    q, k, weight = random(1, T, 2, 4), random(1, T, 4), random(1, T, 2)
    spans = Spans(torch.zeros(1, T, dtype=torch.int64), torch.arange(1, T + 1)[None])

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(part.numel() for part in (out if isinstance(out, tuple | list) else [out]) if isinstance(part, Tensor))
            return out

    with Watch():
        chosen = portable.select(q, k, weight, spans, 8)
        portable.index_loss(q, k, weight, q, k, spans, scale=1.0)
        portable.attend_chosen(q, k, chosen, scale=1.0)
    assert max(made) < T * T / 8


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda q, k, w, s, c: select(q, k[..., 1:], w, s, 3), "select"),
        (lambda q, k, w, s, c: select(q, k, w, Spans(s.first_BT[:1], s.end_BT[:1]), 3), "select"),
        (lambda q, k, w, s, c: attend_chosen(q, k[:1], c, scale=1.0), "attend_chosen"),
        (lambda q, k, w, s, c: attend_chosen(q, k, c, scale=1.0, sink_H=torch.zeros(2)), "attend_chosen"),
        (lambda q, k, w, s, c: index_loss(q, k, w, q[:, 1:], k, c, scale=1.0), "index_loss"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, part):
    with pytest.raises(ValueError, match=part):
        call(*index_parts("odd"), spans_of("odd"), chosen_of("odd"))
