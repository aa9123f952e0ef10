"""Drafts from a tape are the ordinary ones, and what the module keeps of a text is the same."""

from dataclasses import replace

import pytest
import torch

from byrote.errors import ConfigError, RequestError
from byrote.kernels.decode_step import cpu
from byrote.model import capture as captures
from byrote.model import draft_tape, mtp
from byrote.model.capture import capture
from byrote.model.config import MTPConfig
from byrote.model.draft_tape import DraftTape
from byrote.model.mtp import likely_ids
from byrote.model.quantize import quantize
from byrote.model.transformer import Model
from tests.kernels.twins import need
from tests.model.test_capture import ODD, ROPE, alone, threads  # noqa: F401
from tests.model.tiny_models import ATTENTION, MOE, RESIDUALS, bare, build, text, whole
from tests.tolerances import assert_bitwise, assert_close_fp32

ONE = MTPConfig(depth=1)
MODELS = {
    "whole": whole(mtp=ONE),
    "bare": bare(mtp=ONE),
    "hc": whole(mtp=ONE, residual=RESIDUALS["hc"]),
    "odd sizes": bare(mtp=ONE, attention=ODD, dim=53, ffn_hidden=41),
    "half layout, yarn, no shared expert": whole(mtp=ONE, attention=replace(ATTENTION, rope=ROPE), moe=replace(MOE, num_shared=0)),
}


@pytest.fixture(autouse=True)
def decoding():
    need(cpu.library)
    with torch.no_grad():
        yield


@pytest.fixture
def no_fallback(monkeypatch):
    """The tape drafts, and nothing is followed in the ordinary way from a captured step."""
    monkeypatch.setattr(captures, "follow", lambda *_: pytest.fail("followed by PyTorch"))
    drafts, draft = [], DraftTape.draft
    monkeypatch.setattr(DraftTape, "draft", lambda *args: drafts.append(args) or draft(*args))
    yield
    assert drafts


def assert_same_drafts(step, model: Model, states, token_B1, count: int) -> None:
    got, want = step.draft(states[0], token_B1, count), model.draft(states[1], token_B1, count)
    assert_bitwise(got, want)
    for one, other in zip(*(state.drafts for state in states), strict=True):
        assert one["attention"].length == other["attention"].length == max(states[0].length - 1, 0)
        assert_close_fp32(one["attention"].all(), other["attention"].all())
        assert_close_fp32(one["pending"].values, other["pending"].values)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("batch", "weights"), [(1, "fp32"), (3, "fp32"), (3, "int8")])
def test_a_tape_drafts_as_the_module_does_after_every_step(name, batch, weights, no_fallback):
    model, tokens_BT = build(MODELS[name]), text(batch, 24)
    if weights == "int8":
        quantize(model)
    step, states = alone(capture(model)), [model.new_state(batch, drafts=True) for _ in range(2)]
    start = 0
    for tokens in (1, 1, 4, 3, 1, 2, 5, 1):
        piece = tokens_BT[:, start : start + tokens]
        for call, state in zip((step, model), states, strict=True):
            call(piece, state=state)
        start += tokens
        assert_same_drafts(step, model, states, tokens_BT[:, start : start + 1], 3)


def test_drafts_after_roll_backs_and_between_ordinary_steps_are_the_same(no_fallback):
    model, tokens_BT, wrong_BT = build(MODELS["whole"]), text(2, 40), text(2, 40, seed=1)
    step, states = capture(model), [model.new_state(2, drafts=True) for _ in range(2)]
    for state in states:
        model(tokens_BT[:, :9], state=state)
    for place in range(9, 36, 3):
        for call, state in zip((step, model), states, strict=True):
            snapshot = state.snapshot()
            call(wrong_BT[:, place : place + 4], state=state)
            state.rollback(2 + place % 2)
            if place % 4 == 0:
                state.restore(snapshot)
                (model if place % 8 else call)(tokens_BT[:, place : place + 1], state=state)
        assert_same_drafts(step, model, states, tokens_BT[:, place + 3 : place + 4], 1 + place % 4)


def test_any_number_of_threads_drafts_the_same(threads, no_fallback):  # noqa: F811
    model, tokens_BT = build(MODELS["odd sizes"]), text(2, 9)
    step, states = alone(capture(model)), [model.new_state(2, drafts=True) for _ in range(2)]
    for start, end in ((0, 3), (3, 4), (4, 8)):
        for call, state in zip((step, model), states, strict=True):
            call(tokens_BT[:, start:end], state=state)
        assert_same_drafts(step, model, states, tokens_BT[:, end : end + 1], 4)


def test_drafts_are_of_the_likely_ids_alone(no_fallback, monkeypatch):
    assert [likely_ids(size) for size in (29, 8192, 32_768, 129_280)] == [29, 8192, 8192, 32_320]
    for module in (mtp, draft_tape):
        monkeypatch.setattr(module, "likely_ids", lambda vocab_size: 11)
    model, tokens_BT = build(MODELS["whole"]), text(8, 9)
    step, states = capture(model), [model.new_state(8, drafts=True) for _ in range(2)]
    for state in states:
        model(tokens_BT, state=state)
    assert_same_drafts(step, model, states, tokens_BT[:, :1], 4)
    drafts = step.draft(states[0], tokens_BT[:, :1], 4)
    assert drafts.max() == 10 and len(drafts.unique()) > 3


def test_left_padded_texts_draft_as_they_do_alone(no_fallback):
    model, lengths, tokens_BT = build(MODELS["whole"]), (3, 9, 1), text(3, 15)
    document_BT = torch.stack([(torch.arange(9) >= 9 - length).long() - 1 for length in lengths])
    step, state = capture(model), model.new_state(3, drafts=True)
    model(tokens_BT[:, :9], document_BT=document_BT, state=state)
    step(tokens_BT[:, 9:12], state=state)
    step(tokens_BT[:, 12:14], state=state)
    together = step.draft(state, tokens_BT[:, 14:], 2)
    for row, length in enumerate(lengths):
        one = model.new_state(drafts=True)
        model(tokens_BT[row : row + 1, 9 - length : 14], state=one)
        assert_bitwise(together[row : row + 1], model.draft(one, tokens_BT[row : row + 1, 14:], 2))


def test_a_new_document_is_not_followed_by_the_token_before_it(no_fallback):
    model, tokens_BT = build(MODELS["whole"]), text(2, 12)
    document_BT = torch.tensor([[0, 0, 0, 4, 4, 4, 4, 4, 1, 1, 1], [-1, -1, 2, 2, 2, 2, 2, 3, 3, 3, 3]])
    step, states = alone(capture(model)), [model.new_state(2, drafts=True) for _ in range(2)]
    for a, b in ((0, 2), (2, 5), (5, 6), (6, 11)):
        for call, state in zip((step, model), states, strict=True):
            call(tokens_BT[:, a:b], document_BT=document_BT[:, a:b], state=state)
    assert_same_drafts(step, model, states, tokens_BT[:, 11:], 2)


def test_changed_weights_show_in_the_drafts_of_the_next_text():
    model, tokens_BT = build(MODELS["whole"]), text(1, 9)
    step = capture(model)
    for factor in (1.0, 3.0):
        model.mtp[0].project.weight.data = model.mtp[0].project.weight.data * factor  # in another place
        state = model.new_state(drafts=True)
        model(tokens_BT, state=state)
        pair = [drafter.draft(state, tokens_BT[:, :1], 4) for drafter in (step, model)]
        assert_bitwise(*pair)


@pytest.mark.parametrize("form", ["streams", "two deep", "bf16", "many rows", "a product of its own"])
def test_what_a_draft_tape_does_not_serve_is_drafted_by_the_module(form, monkeypatch):
    config = MTPConfig(depth=2 if form == "two deep" else 1, form="streams" if form == "streams" else "joined")
    model, rows = build(whole(mtp=config)), 17 if form == "many rows" else 1
    if form == "a product of its own":
        model.mtp[0].project.matmul = lambda x, weight: 2 * torch.nn.functional.linear(x, weight)
    monkeypatch.setattr(DraftTape, "draft", lambda *_: pytest.fail("the tape drafted"))
    step, state = capture(model), model.new_state(rows, drafts=True, dtype=torch.bfloat16 if form == "bf16" else None)
    step(text(rows, 4), state=state)
    assert_bitwise(step.draft(state, text(rows, 1), 2), model.draft(state, text(rows, 1), 2))


def test_drafts_that_cannot_be_are_refused_before_anything_changes():
    model = build(MODELS["whole"])
    step, state = capture(model), model.new_state(drafts=True, max_rollback=2)
    with pytest.raises(RequestError, match="holds 0 tokens"):
        step.draft(state, text(1, 1), 1)
    step(text(1, 3), state=state)
    with pytest.raises(RequestError, match="cannot draft 3 tokens"):
        step.draft(state, text(1, 1), 3)
    with pytest.raises(ConfigError, match="vocabulary"):
        step.draft(state, torch.tensor([[29]]), 1)
    with pytest.raises(ConfigError, match="drafts=True"):
        step.draft(model.new_state(), text(1, 1), 1)
    assert state.drafts[0]["attention"].length == 2
