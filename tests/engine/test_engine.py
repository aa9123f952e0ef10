"""The engine against its slow twin, and what must hold whatever comes and goes."""

import pytest
import torch

from byrote.engine.engine import EngineConfig
from byrote.engine.request import SamplingParams
from byrote.errors import CapacityError, ConfigError, RequestError
from byrote.model.config import DSAConfig, MTPConfig, V4AttentionConfig
from tests.engine.small import BEGIN, Bytes, Speaker, answers, closest_calls, drain, engine_of, prompts, said, text_of, tiny, twin
from tests.model.tiny_models import ATTENTION, RESIDUALS, VOCAB, bare, build, whole
from tests.tolerances import FP32, assert_bitwise

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
MODELS = {
    "whole": whole(),
    "bare": bare(),
    "hc, no memory": whole(residual=RESIDUALS["hc"], engram=None),
    "DSA": whole(attention=DSAConfig(mla=ATTENTION, index_num_heads=16, index_head_dim=8, index_top_k=5)),
    "V4": whole(
        attention=V4AttentionConfig(
            num_heads=6,
            head_dim=10,
            rope_head_dim=6,
            q_lora_rank=7,
            o_groups=3,
            o_lora_rank=5,
            sliding_window=9,
            compress_ratios=(0, 4, 128),
            index_num_heads=16,
            index_head_dim=8,
            index_top_k=11,
        ),
        mtp=MTPConfig(form="streams"),
    ),
}


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_the_slow_twin(name, captured):
    model, asked = build(MODELS[name]), prompts(6, longest=40)
    got = answers(engine_of(model, captured=captured, max_batch=4, chunk_tokens=16), asked, GREEDY)
    assert got == [twin(model, one, 12) for one in asked]


@pytest.mark.parametrize("name", ["DSA", "V4"])
def test_prefixes_drafts_and_preemption_suit_every_kind_of_attention(name):
    model, asked = build(MODELS[name]), [[*[5, 9, 14] * 78, *one] for one in prompts(3, longest=10, seed=7)]
    params = SamplingParams(max_tokens=40, temperature=0.0)
    engine = engine_of(model, speculate="always", cache_tokens=640)
    want = [twin(model, one, 40) for one in asked]
    for _ in range(2):
        assert answers(engine, asked, params) == want
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hit_tokens > 0
    assert sum(stats.drafted) > 0


def test_an_answer_does_not_depend_on_its_neighbours():
    """Alone and in a batch of 32, greedy, fp32; exceptions of floating-point honesty are counted, and at most 1 % of the prompts."""
    model, asked, exceptions = tiny(), prompts(100, longest=60, seed=3), 0
    params = SamplingParams(max_tokens=16, temperature=0.0)
    alone = [answers(engine_of(model, max_batch=1), [one], params)[0] for one in asked]
    together = answers(engine_of(model, max_batch=32), asked, params)
    for ids, one, other in zip(asked, alone, together, strict=True):
        if one != other:
            first = next(place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
            assert closest_calls(model, ids, one)[first], "answers differ where nothing was close"
            exceptions += 1
    print(f"{exceptions} of {len(asked)} prompts differ after a close call")
    assert exceptions <= len(asked) // 100


def test_sampled_answers_do_not_depend_on_neighbours_either():
    model, asked = tiny(), prompts(10, longest=30)
    params = [SamplingParams(max_tokens=10, temperature=1.0, seed=seed, top_p=0.9) for seed in range(10)]
    together = answers(engine_of(model, max_batch=10), asked, params)
    assert together == [answers(engine_of(model), [one], some)[0] for one, some in zip(asked, params, strict=True)]
    assert together != answers(engine_of(model), asked, [SamplingParams(max_tokens=10, temperature=1.0, seed=99, top_p=0.9)] * 10)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 128, 1024])
def test_a_prompt_in_chunks_equals_the_prompt_whole(chunk_tokens):
    model, asked = tiny(), prompts(3, longest=60)
    assert answers(engine_of(model, chunk_tokens=chunk_tokens), asked, GREEDY) == [twin(model, one, 12) for one in asked]


def test_a_long_prompt_does_not_stop_the_others():
    engine = engine_of(tiny(), chunk_tokens=16)
    engine.add_request([1, 2], SamplingParams(max_tokens=50, temperature=0.0), request="first")
    engine.step()
    engine.add_request([3] * 160, GREEDY, request="long")
    for _ in range(9):
        assert [event.request for event in engine.step()] == ["first"]
    assert {event.request for event in engine.step()} == {"first", "long"}


def test_preempted_requests_go_on_exactly():
    model, asked = tiny(), prompts(8, longest=100, seed=1)
    params = [SamplingParams(max_tokens=150, temperature=0.5 * (seed % 2), seed=seed) for seed in range(8)]
    roomy, tight = engine_of(model, max_batch=8), engine_of(model, max_batch=8, cache_tokens=768)
    assert answers(tight, asked, params) == answers(roomy, asked, params)
    assert tight.stats().preemptions > 0
    assert roomy.stats().preemptions == 0


def test_pages_never_exceed_the_cache():
    engine = engine_of(tiny(), max_batch=8, cache_tokens=1024, chunk_tokens=64)
    for one in prompts(12, longest=400, seed=2):
        engine.add_request(one, SamplingParams(max_tokens=40, temperature=0.0))
    while engine.has_work():
        engine.step()
        assert engine.stats().pages_used <= engine.stats().pages_total


def test_an_aborted_request_frees_its_place_and_leaves_the_others_as_they_are():
    model, asked = tiny(), prompts(4, longest=30)
    engine = engine_of(model, max_batch=2)
    names = [engine.add_request(one, GREEDY) for one in asked]
    events = engine.step()
    assert engine.abort(names[0])
    assert engine.abort(names[3])
    assert names[0] not in engine.running()
    assert names[3] not in engine.waiting()
    events += drain(engine)
    assert [(event.request, event.usage is not None) for event in events if event.finish == "abort"] == [(names[0], True), (names[3], True)]
    got = said(event for event in events if event.finish != "abort")
    for number in (1, 2):
        assert got[names[number], 0] == twin(model, asked[number], 12)
    assert not engine.abort(names[0])
    assert not engine.abort("nobody")


def test_a_failing_forward_ends_its_own_requests_only(monkeypatch):
    model, asked = tiny(), prompts(3, longest=20)
    engine = engine_of(model, chunk_tokens=64)
    real = type(model).forward

    def fail_on_zeros(self, tokens_BT, **others):
        if tokens_BT.shape[1] == 20 and not tokens_BT.any():
            raise RuntimeError("out of memory")
        return real(self, tokens_BT, **others)

    monkeypatch.setattr(type(model), "forward", fail_on_zeros)
    names = [engine.add_request(one, GREEDY) for one in (asked[0], [0] * 20, asked[1])]
    events = drain(engine)
    failed = [event for event in events if event.finish == "error"]
    assert [event.request for event in failed] == [names[1]]
    assert "out of memory" in str(failed[0].error)
    got = said(event for event in events if event.error is None)
    assert [got[names[0], 0], got[names[2], 0]] == [twin(model, asked[0], 12), twin(model, asked[1], 12)]
    assert engine.stats().errors == 1


def test_log_probabilities_are_the_trainers_and_the_same_bits_every_run():
    model = tiny()
    ids = prompts(1, longest=1, seed=5)[0] * 1 + prompts(2, longest=150, seed=6)[1]
    params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=3, prompt_logprobs=True)
    runs = []
    for _ in range(2):
        engine = engine_of(model, chunk_tokens=32)
        engine.add_request(ids, params)
        events = drain(engine)
        tokens = [*events[0].prompt, *(token for event in events for token in event.tokens)]
        runs.append(torch.tensor([token.logprob for token in tokens[1:]]))
        assert tokens[0].logprob is None
        assert [token.id for token in tokens[: len(ids)]] == ids
    assert_bitwise(runs[0], runs[1])
    known = torch.tensor([[token.id for token in tokens]])
    with torch.no_grad():
        losses_T = model(known[:, :-1], targets_BT=known[:, 1:], want=("token_losses",)).extras["token_losses"][0]
    assert (runs[0] + losses_T).abs().max() <= FP32 * losses_T.abs().max()
    for token in tokens[len(ids) :]:
        assert len(token.top) == 3
        assert token.top[0] == (token.id, token.logprob)
        assert [value for _, value in token.top] == sorted((value for _, value in token.top), reverse=True)


def test_several_choices_share_the_prompt_and_nothing_else():
    model, ids = tiny(), prompts(1, longest=40)[0]
    params = SamplingParams(max_tokens=10, temperature=1.5, seed=4, n=3)
    engine = engine_of(model)
    name = engine.add_request(ids, params)
    events = drain(engine)
    got = said(events)
    assert set(got) == {(name, 0), (name, 1), (name, 2)}
    assert len({tuple(one) for one in got.values()}) == 3
    assert engine.stats().prompt_tokens == len(ids)
    assert got[name, 0] == answers(engine_of(model), [ids], SamplingParams(max_tokens=10, temperature=1.5, seed=4))[0]
    assert said(drain_again(model, ids, params)) == {("again", index): got[name, index] for index in range(3)}


def drain_again(model, ids, params):
    engine = engine_of(model)
    engine.add_request(ids, params, request="again")
    return drain(engine)


def test_text_comes_in_whole_characters_and_stops_before_a_stop_string():
    model = Speaker("naïve café, STOP there".encode())
    engine = engine_of(model, Bytes(), max_batch=1, captured=False)
    model.prompt = 3
    engine.add_request([BEGIN, 1, 2], SamplingParams(max_tokens=64, temperature=0.0, stop=("STOP", "zzz")), request="a")
    events = drain(engine)
    assert text_of(events, "a") == "naïve café, "
    assert (events[-1].finish, events[-1].stopped_by) == ("stop", "STOP")
    assert events[-1].usage == (3, len("naïve café, STOP".encode()), 0)
    assert all("�" not in event.text for event in events)


@pytest.mark.parametrize(
    ("params", "text", "finish", "stopped_by"),
    [
        (SamplingParams(temperature=0.0), "hello", "stop", 257),
        (SamplingParams(temperature=0.0, max_tokens=3), "hel", "length", None),
        (SamplingParams(temperature=0.0, stop_ids=(ord("l"),)), "he", "stop", ord("l")),
        (SamplingParams(temperature=0.0, max_tokens=7, ignore_end=True), "hello", "length", None),
        (SamplingParams(temperature=0.0, stop=("hel", "elx")), "", "stop", "hel"),
    ],
    ids=["end of document", "length", "stop id", "the end ignored", "stop string from the start"],
)
def test_every_way_to_end(params, text, finish, stopped_by):
    model = Speaker(b"hello")
    model.prompt = 1
    engine = engine_of(model, Bytes(), captured=False)
    engine.add_request([BEGIN], params, request="a")
    events = drain(engine)
    assert text_of(events, "a") == text
    assert (events[-1].finish, events[-1].stopped_by) == (finish, stopped_by)


def test_gates_are_reported_where_a_token_was_predicted():
    model, ids = tiny(), prompts(1, longest=30)[0]
    engine = engine_of(model)
    engine.add_request(ids, SamplingParams(max_tokens=6, temperature=0.0, gates=True))
    tokens = [token for event in drain(engine) for token in event.tokens]
    known = torch.tensor([[*ids, *(token.id for token in tokens)]])
    with torch.no_grad():
        gates = model(known, want=("gates",)).extras["gates"]
    want = torch.stack([gate_BTR.mean(-1)[0] for gate_BTR in gates]).mean(0)[len(ids) - 1 : -1]
    assert (torch.tensor([token.gate for token in tokens]) - want).abs().max() <= FP32 * want.abs().max()


def test_new_weights_are_felt_at_once():
    model, ids = tiny(), [5] * 200
    params = SamplingParams(max_tokens=20, temperature=0.0)
    engine = engine_of(model)
    answers(engine, [ids], params)
    engine.add_request(ids, params, request="running")
    events = engine.step() + engine.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.3)
    engine.weights_changed()
    engine.check_integrity()
    events += drain(engine)
    first = said(events)["running", 0]
    head = sum(len(event.tokens) for event in events[:2])
    assert first[head:] == twin(model, [*ids, *first[:head]], 20 - head)
    assert answers(engine, [ids], params) == [twin(model, ids, 20)]


@pytest.mark.parametrize(
    ("ids", "params", "more", "message"),
    [
        ([], {}, {}, "no ids to continue"),
        ([VOCAB], {}, {}, f"token id {VOCAB} lies outside"),
        ([1], {"stop_ids": (-1,)}, {}, "token id -1"),
        ([1], {"logit_bias": ((VOCAB + 3, 1.0),)}, {}, "lies outside"),
        ([1] * 64, {}, {}, "at most 63 leave room"),
        ([1], {}, {"pack": "law"}, "no pack named 'law' is loaded; loaded: none"),
        ([1], {"n": 3}, {}, "continues at most 2 choices"),
        ([1], {"stop": ("x",)}, {}, "no tokenizer"),
        ([1], {}, {"request": "taken"}, "is in use"),
    ],
)
def test_what_cannot_be_served_is_refused_and_changes_nothing(ids, params, more, message):
    engine = engine_of(tiny(), max_batch=2, max_length=64)
    engine.add_request([1], GREEDY, request="taken")
    with pytest.raises(RequestError, match=message):
        engine.add_request(ids, SamplingParams(**params), **more)
    assert engine.waiting() == ["taken"]
    assert list(said(drain(engine))) == [("taken", 0)]


def test_a_model_without_memory_has_no_gates_to_report():
    with pytest.raises(RequestError, match="no memory"):
        engine_of(build(bare())).add_request([1], SamplingParams(gates=True))


def test_a_full_queue_asks_to_try_again():
    engine = engine_of(tiny(), max_waiting=2)
    for _ in range(2):
        engine.add_request([1], GREEDY)
    with pytest.raises(CapacityError, match="try again later"):
        engine.add_request([1], GREEDY)


def test_max_tokens_is_cut_to_what_max_length_leaves():
    assert len(answers(engine_of(tiny(), max_length=20), [[1] * 15], SamplingParams(max_tokens=99, temperature=0.0))[0]) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [({"max_batch": 0}, "max_batch is 0"), ({"speculate": "often"}, "allowed: auto"), ({"max_length": 1}, "at least 2")],
)
def test_a_configuration_that_cannot_work_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**change)


def test_a_choice_that_was_lost_is_noticed():
    engine = engine_of(tiny())
    engine.add_request([1, 2, 3], GREEDY, request="a")
    engine.step()
    engine._loop.batch.choices[0].cached -= 1
    with pytest.raises(AssertionError, match="a row holds other tokens"):
        engine.check_integrity()
    engine._loop.batch.choices.clear()
    with pytest.raises(AssertionError, match=r"requests were lost: \['a'\]"):
        engine.check_integrity()
