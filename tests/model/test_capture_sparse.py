"""Captured steps of V3.2's and V4's attention: windows, groups and choices are those of the ordinary step, wherever borders fall."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from byrote.model.capture import capture
from byrote.model.config import DSAConfig, EngramConfig, RopeConfig
from byrote.model.transformer import Model
from tests.model.test_capture import alone, assert_same_states, decoding, threads  # noqa: F401  fixtures
from tests.model.test_csa import MOE, V4, v4_config
from tests.model.tiny_models import ATTENTION, ENGRAM, RESIDUALS, bare, build, text, whole
from tests.tolerances import assert_bitwise, assert_close_fp32

DSA = DSAConfig(mla=ATTENTION, index_num_heads=3, index_head_dim=8, index_top_k=11)
ODD = replace(V4, num_heads=5, head_dim=37, o_groups=1, index_head_dim=19, index_num_heads=35, rope_head_dim=10, sliding_window=3)
V4_MODEL = v4_config(mtp=None)
MODELS = {
    "v4": V4_MODEL,
    "v4 with memory": v4_config(mtp=None, engram=replace(ENGRAM, layers=(1, 2))),
    "v4 on a plain residual, dense": bare(num_layers=3, attention=replace(V4, compress_ratios=(4, 128, 0))),
    "v4, odd sizes": v4_config(mtp=None, attention=ODD),
    "v4, a window of one": v4_config(mtp=None, attention=replace(V4, sliding_window=1)),
    "v4, wide": v4_config(mtp=None, attention=replace(V4, head_dim=80, rope_head_dim=16, index_head_dim=32, sliding_window=130)),
    "v4, all entries read": v4_config(mtp=None, attention=replace(V4, index_stage="dense_warmup")),
    "dsa": whole(attention=DSA, mtp=None),
    "dsa, hadamard, full-rank queries": whole(attention=replace(DSA, index_hadamard=True, mla=replace(ATTENTION, q_lora_rank=None)), mtp=None),
    "dsa, half layout, dense": bare(attention=replace(DSA, mla=replace(ATTENTION, rope=RopeConfig(layout="half")))),
    "mla, dsa and v4": bare(num_layers=3, attention=(ATTENTION, DSA, replace(V4, compress_ratios=(4,)))),
}


def steps(model: Model, tokens_BT: Tensor, prompt: int, tokens: int, *, rollback: int = 16, **more) -> None:
    """After a prompt, every further piece gives the same, captured or not."""
    step, states = alone(capture(model)), [model.new_state(len(tokens_BT), max_rollback=rollback) for _ in range(2)]
    for state in states:
        model(tokens_BT[:, :prompt], state=state, **more)
    for start in range(prompt, tokens_BT.shape[1], tokens):
        piece = tokens_BT[:, start : start + tokens]
        assert_close_fp32(step(piece, state=states[0]).logits, model(piece, state=states[1]).logits)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 16), (2, 3), (5, 3)])
def test_a_captured_step_equals_the_ordinary_one(name, batch, tokens):
    steps(build(MODELS[name]), text(batch, 120 + 5 * max(tokens, 3)), 120, tokens)


@pytest.mark.parametrize("name", ["v4", "dsa", "mla, dsa and v4"])
def test_any_number_of_threads_gives_the_same(name, threads):  # noqa: F811
    steps(build(MODELS[name]), text(2, 140), 125, 3)


@pytest.mark.parametrize("name", ["v4", "dsa, hadamard, full-rank queries"])
def test_a_long_text_said_token_by_token(name):
    """Past a border of 128 tokens, many more keys than are chosen, and every buffer outgrown."""
    steps(build(MODELS[name]), text(1, 330), 245, 1)


def test_a_state_without_roll_back_keeps_its_window():
    steps(build(V4_MODEL), text(1, 160), 100, 4, rollback=0)


@pytest.mark.parametrize("name", ["v4", "v4 with memory", "dsa"])
def test_a_text_may_begin_with_captured_steps(name):
    model, tokens_BT = build(MODELS[name]), text(2, 150)
    step, state = alone(capture(model)), model.new_state(2)
    parts = [step(piece, state=state).logits for piece in tokens_BT.split((1, 5, 8) * 10 + (8, 2), dim=1)]
    assert_close_fp32(torch.cat(parts, dim=1), model(tokens_BT).logits)


@pytest.mark.parametrize("name", ["v4", "v4 with memory", "dsa"])
def test_captured_and_ordinary_steps_alternate_and_roll_back(name):
    model, tokens_BT, wrong_BT = build(MODELS[name]), text(1, 160), text(1, 160, seed=1)
    step, state = capture(model), model.new_state()
    parts = [model(tokens_BT[:, :100], state=state).logits]
    for place in range(100, 157, 3):
        snapshot = state.snapshot()
        for call in (step, model, step) if place % 2 else (model, step, step):
            call(wrong_BT[:, place : place + 2], state=state)
        if place % 4:
            state.rollback(6)
        else:
            state.restore(snapshot)
        parts += [call(tokens_BT[:, place + i : place + i + 1], state=state).logits for i, call in enumerate((step, model, step))]
    assert_close_fp32(torch.cat(parts, dim=1), model(tokens_BT[:, : state.length]).logits)


def test_two_texts_may_go_on_from_one_snapshot():
    """What one of them writes is not read by the other."""
    model, tokens_BT, other_BT = build(V4_MODEL), text(1, 150), text(1, 150, seed=1)
    step, states = alone(capture(model)), [model.new_state() for _ in range(2)]
    for state in states:
        step.model.inner(tokens_BT[:, :126], state=state)
        step(tokens_BT[:, 126:127], state=state)
    for mine, theirs in zip(states[0].caches, states[1].caches, strict=True):
        theirs["window"].restore(mine["window"].snapshot())
    said = [[step(part[:, at : at + 1], state=state).logits for part, state in zip((tokens_BT, other_BT), states)] for at in range(127, 140)]
    for number, part_BT in enumerate((tokens_BT, other_BT)):
        whole_BT = torch.cat((tokens_BT[:, :127], part_BT[:, 127:140]), dim=1)
        assert_close_fp32(torch.cat([pair[number] for pair in said], dim=1), model(whole_BT).logits[:, 127:])


@pytest.mark.parametrize("name", ["v4", "v4 with memory", "dsa", "mla, dsa and v4"])
def test_left_padded_texts_decode_as_they_do_alone(name):
    model, lengths = build(MODELS[name]), (3, 126, 61)
    document_BT = torch.stack([(torch.arange(126) >= 126 - length).long() - 1 for length in lengths])
    tokens_BT, step, state = text(3, 138), alone(capture(model)), model.new_state(3)
    model(tokens_BT[:, :126], document_BT=document_BT, state=state)
    together = torch.cat([step(tokens_BT[:, at : at + 3], state=state).logits for at in range(126, 138, 3)], dim=1)
    for row, length in enumerate(lengths):
        assert_close_fp32(together[row : row + 1], model(tokens_BT[row : row + 1, 126 - length :]).logits[:, length:])


@pytest.mark.parametrize("name", ["v4", "dsa"])
def test_documents_change_inside_a_captured_piece_and_padding_sees_nothing(name):
    model, tokens_BT = build(MODELS[name]), text(2, 160)
    document_BT = torch.zeros(2, 160, dtype=torch.int64)
    document_BT[0, 137:], document_BT[0, 150:] = 4, 7
    document_BT[1, :133], document_BT[1, 140:143], document_BT[1, 155:] = -1, -1, -1
    step, state = alone(capture(model)), model.new_state(2)
    cuts = (130, *range(134, 160, 4), 160)
    parts = [model(tokens_BT[:, :130], document_BT=document_BT[:, :130], state=state).logits]
    for start, end in zip(cuts, cuts[1:]):
        parts.append(step(tokens_BT[:, start:end], document_BT=document_BT[:, start:end], state=state).logits)
    assert_close_fp32(torch.cat(parts, dim=1), model(tokens_BT, document_BT=document_BT).logits)


def test_positions_may_be_given():
    model, tokens_BT = build(V4_MODEL), text(1, 12)
    step, states = alone(capture(model)), [model.new_state() for _ in range(2)]
    for at in range(0, 12, 4):
        piece, position_BT = tokens_BT[:, at : at + 4], torch.arange(4)[None] * 3 + 5 * at
        got, want = (call(piece, state=state, position_BT=position_BT).logits for call, state in zip((step, model), states))
        assert_close_fp32(got, want)


def test_the_stage_may_change_between_steps():
    model, tokens_BT = build(V4_MODEL), text(1, 150)
    step, states = alone(capture(model)), [model.new_state() for _ in range(2)]
    for at in range(0, 150, 15):
        for block in model.blocks:
            block.attn.stage = "sparse" if at % 2 else "dense_warmup"
        got, want = (call(tokens_BT[:, at : at + 15], state=state).logits for call, state in zip((step, model), states))
        assert_close_fp32(got, want)


def test_experts_by_token_id_may_name_one_twice():
    model = build(V4_MODEL)
    table_VK = model.blocks[0].ffn.table_VK
    table_VK[:, 0], table_VK[:, 1] = torch.arange(len(table_VK)) % 5, torch.arange(len(table_VK)) * 3 % 5
    assert (table_VK[:, 0] == table_VK[:, 1]).any() and (table_VK[:, 0] != table_VK[:, 1]).any()
    steps(model, text(3, 30), 10, 5)


def test_equal_scores_choose_the_earlier_entries():
    """Index queries without weights score zero everywhere."""
    model = build(v4_config(mtp=None, attention=replace(V4, index_top_k=2)))
    for block in model.blocks[1::2]:
        if block.attn.indexer is not None:
            block.attn.indexer.weights.weight.zero_()
    steps(model, text(2, 90), 60, 3)
