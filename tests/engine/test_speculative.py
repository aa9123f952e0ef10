"""Drafts change how fast an answer comes, and nothing in it."""

from collections.abc import Sequence

import pytest
import torch

from byrote.engine.engine import Engine
from byrote.engine.request import SamplingParams
from byrote.engine.speculative import _LOSSES, _PROBE_EVERY, _REST, _TRIES, Drafter
from byrote.model.config import MTPConfig
from byrote.model.transformer import Model
from tests.engine.small import Bytes, answers, drain, engine_of, prompts, said, tiny, twin
from tests.model.tiny_models import VOCAB, build, whole

VOCAB_SMALL = 5


def with_oracle(engine: Engine, model: Model, known: dict[int, Sequence[int]], wrong_every: int) -> Engine:
    """Drafts become what the slow twin says, but every so many are wrong. `known`: first token of a prompt → prompt and answer."""
    asked = 0

    def draft(state, tokens, count):
        nonlocal asked
        guesses = []
        for row, choice in enumerate(engine._loop.batch.choices):
            text = known[choice.prompt[0]]
            right = [text[min(choice.cached + 1 + place, len(text) - 1)] for place in range(count)]
            assert tokens[row] == text[choice.cached] == choice.ahead[0]
            asked += 1
            guesses.append([(token + (asked % wrong_every == 0 and place == row % count)) % VOCAB for place, token in enumerate(right)])
        return guesses

    engine.runner.draft = draft  # type: ignore[method-assign]
    return engine


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("mtp", [MTPConfig(), MTPConfig(depth=2), MTPConfig(depth=2, form="streams")], ids=repr)
def test_greedy_answers_with_the_models_own_drafts_are_the_slow_twins(mtp, captured):
    model, asked = build(whole(mtp=mtp)), prompts(5, longest=40)
    engine = engine_of(model, speculate="always", max_batch=3, captured=captured)
    params = SamplingParams(max_tokens=20, temperature=0.0)
    assert answers(engine, asked, params) == [twin(model, one, 20) for one in asked]
    assert sum(engine.stats().drafted) > 0


@pytest.mark.parametrize("wrong_every", [2, 3, 99])
@pytest.mark.parametrize("batch", [1, 3])
def test_texts_that_accept_differently_stay_right(batch, wrong_every):
    model = tiny()
    asked = [[number, *one] for number, one in enumerate(prompts(batch, longest=20, seed=2))]
    want = [twin(model, one, 25) for one in asked]
    known = {one[0]: [*one, *answer] for one, answer in zip(asked, want, strict=True)}
    engine = with_oracle(engine_of(model, speculate="always"), model, known, wrong_every)
    assert answers(engine, asked, SamplingParams(max_tokens=25, temperature=0.0)) == want
    stats = engine.stats()
    assert all(right <= tried for right, tried in zip(stats.accepted, stats.drafted, strict=True))
    if wrong_every == 99:
        assert stats.steps <= 25 // 4 + 3
        assert stats.accepted[0] == stats.drafted[0] > 0
    else:
        assert 0 < stats.accepted[0] < stats.drafted[0]


def test_sampled_answers_are_the_same_draws_as_without_drafts():
    model, asked = build(whole(mtp=MTPConfig())), prompts(6, longest=20)
    params = [SamplingParams(max_tokens=15, temperature=0.7, seed=seed, top_k=4, frequency_penalty=0.3) for seed in range(6)]
    assert answers(engine_of(model, speculate="always"), asked, params) == answers(engine_of(model), asked, params)


def test_sampled_answers_have_the_models_distribution():
    """χ² of the pairs of tokens that 1,536 answers begin with, against the model's own probabilities; 0.999 quantile."""
    model, ids, count = build(whole(vocab_size=VOCAB_SMALL, init_std=0.1, num_layers=1, engram=None, mtp=MTPConfig())), [1, 2, 3], 1536
    engine = engine_of(model, speculate="always", max_drafts=1, max_waiting=count)
    for seed in range(count // 16):
        engine.add_request(ids, SamplingParams(max_tokens=3, temperature=1.0, seed=seed, n=16))
    pairs = torch.tensor([first * VOCAB_SMALL + second for first, second, _ in said(drain(engine)).values()])
    assert len(pairs) == count
    with torch.no_grad():
        first_V = torch.softmax(model(torch.tensor([ids])).logits[0, -1], 0)
        then_VV = torch.softmax(model(torch.tensor([[*ids, token] for token in range(VOCAB_SMALL)])).logits[:, -1], -1)
    want = (first_V[:, None] * then_VV).flatten().double() * count
    counts = torch.bincount(pairs, minlength=VOCAB_SMALL**2).double()
    assert want.min() > 5, "too rare for this test"
    assert ((counts - want) ** 2 / want).sum() < 51.2  # 24 degrees of freedom
    stats = engine.stats()
    assert 0 < stats.accepted[0] < stats.drafted[0], "some drafts must be right and some wrong for this to mean anything"


def test_an_answer_ends_where_it_should_among_drafts():
    model = tiny()
    want = twin(model, [3, 1, 2], 12)
    stop = want[5]
    cut = want[: want.index(stop) + 1]
    engine = with_oracle(engine_of(model, speculate="always"), model, {3: [3, 1, 2, *want]}, 99)
    assert answers(engine, [[3, 1, 2]], SamplingParams(max_tokens=12, temperature=0.0, stop_ids=(stop,))) == [cut]


def test_a_model_without_mtp_never_drafts():
    engine = engine_of(build(whole(mtp=None)), Bytes(), speculate="auto")
    answers(engine, [[1, 2]], SamplingParams(max_tokens=4, temperature=0.0))
    assert (engine.stats().drafted, engine.stats().speculating) == ((), False)


# --- whether drafts pay -----------------------------------------------------------------------------------------------


def run(drafter: Drafter, steps: int, cost: dict[int, float], gain: dict[int, float]) -> list[int]:
    """Counts of drafts that were chosen in steps of such seconds and tokens."""
    chosen = []
    for _ in range(steps):
        count = drafter.count(1, room=9)
        drafter.record(1, count, cost[count], gain[count])
        chosen.append(count)
    return chosen


def test_the_count_that_brings_most_tokens_a_second_wins():
    drafter = Drafter(2)
    chosen = run(drafter, 200, cost={0: 1.0, 1: 1.2, 2: 1.6}, gain={0: 1.0, 1: 1.7, 2: 1.9})
    assert all(chosen[: 3 * _TRIES].count(count) == _TRIES for count in (0, 1, 2))
    assert chosen[3 * _TRIES :].count(1) >= 200 - 3 * _TRIES - 200 // _PROBE_EVERY
    assert drafter.is_active


def test_what_changes_is_noticed():
    drafter = Drafter(1)
    assert run(drafter, 20, cost={0: 1.0, 1: 1.2}, gain={0: 1.0, 1: 1.8})[-1] == 1
    assert run(drafter, 20, cost={0: 1.0, 1: 1.2}, gain={0: 1.0, 1: 1.0})[-1] == 0
    assert run(drafter, _LOSSES // 2, cost={0: 1.0, 1: 1.2}, gain={0: 1.0, 1: 1.9})[-10:].count(1) >= 9


def test_drafting_that_loses_ends_and_is_tried_again_much_later():
    drafter, cost, gain = Drafter(2), {0: 1.0, 1: 1.5, 2: 2.0}, {0: 1.0, 1: 1.1, 2: 1.1}
    while drafter.is_active:
        run(drafter, 1, cost, gain)
        assert sum(map(len, drafter._steps.values())) < 99 and drafter._seen < 2 * _LOSSES
    assert set(run(drafter, _REST, cost, gain)) == {0}
    assert drafter.is_active


def test_a_fixed_drafter_always_drafts_as_many_as_there_is_room_for():
    drafter = Drafter(3, fixed=True)
    assert [drafter.count(4, room) for room in (9, 3, 2, 0, -1)] == [3, 3, 2, 0, 0]
    run(drafter, 500, cost={3: 9.0}, gain={3: 1.0})
    assert drafter.is_active


def test_acceptance_is_counted_by_position():
    drafter = Drafter(3)
    for drafts, accepted in ((3, 3), (3, 1), (3, 0), (1, 1), (0, 0)):
        drafter.mark(drafts, accepted)
    assert (drafter.drafted, drafter.accepted) == ([4, 2, 1], [3, 1, 1])


def test_when_drafting_ends_mtp_stops_reading_along_and_answers_stay():
    model, asked = tiny(), prompts(4, longest=30)
    engine = engine_of(model, speculate="auto", max_batch=4)
    names = [engine.add_request(one, SamplingParams(max_tokens=30, temperature=0.0)) for one in asked]
    events = engine.step() + engine.step()
    assert engine._loop.batch.state.drafts
    engine.drafter._resting = 3
    events += engine.step()
    assert not engine._loop.batch.state.drafts
    assert not engine.stats().speculating
    events += drain(engine)
    got = said(events)
    assert [got[name, 0] for name in names] == [twin(model, one, 30) for one in asked]
    answers(engine, [[1]], SamplingParams(max_tokens=4, temperature=0.0))
    assert engine.stats().speculating


def test_drafting_may_end_while_texts_have_accepted_differently():
    model = tiny()
    asked = [[number, *one] for number, one in enumerate(prompts(3, longest=20, seed=2))]
    want = [twin(model, one, 25) for one in asked]
    known = {one[0]: [*one, *answer] for one, answer in zip(asked, want, strict=True)}
    engine = with_oracle(engine_of(model, speculate="always"), model, known, 2)

    def lose(*_):
        if len({len(choice.ahead) for choice in engine._loop.batch.choices}) > 1:
            engine.drafter._resting = _REST

    engine.drafter.record = lose
    names = [engine.add_request(one, SamplingParams(max_tokens=25, temperature=0.0)) for one in asked]
    events = drain(engine)
    assert not engine.runner.with_drafts
    got = said(events)
    assert [got[name, 0] for name in names] == want
