"""A text read in pieces gives what the whole text gives, whatever happened to the state in between."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from byrote.errors import CapacityError, RequestError
from byrote.model import mla
from byrote.model.config import MLAConfig
from byrote.model.state import DecodeState
from byrote.model.transformer import Model
from tests.model.tiny_models import ATTENTION, ENGRAM, RESIDUALS, VOCAB, assert_same_gradients, bare, build, text, whole
from tests.tolerances import assert_bitwise, assert_close_fp32

LENGTH = 23
MODELS = {
    "whole": whole(),
    "hc": whole(residual=RESIDUALS["hc"], moe=None),
    "bare": bare(),
    "full-rank queries, half layout": bare(attention=replace(ATTENTION, q_lora_rank=None, rope=replace(ATTENTION.rope, layout="half"))),
    "no convolution, order 4": whole(engram=replace(ENGRAM, conv_kernel=0, max_order=4)),
    "memory in bf16": whole(engram=replace(ENGRAM, table_dtype="bfloat16")),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def read(model: Model, tokens_BT: Tensor, cuts: tuple[int, ...], state: DecodeState | None = None) -> Tensor:
    """Logits of `tokens_BT`, read in pieces that end at `cuts`."""
    state = model.new_state(len(tokens_BT)) if state is None else state
    borders = (0, *cuts, tokens_BT.shape[1])
    parts = [model(tokens_BT[:, a:b], state=state).logits for a, b in pairwise(borders)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "cuts", [tuple(range(1, LENGTH)), (1, 2, 19), (20,), ()], ids=["one by one", "mixed", "long then short", "at once"]
)
def test_any_chunking_equals_the_whole(name, cuts):
    model, tokens_BT = build(MODELS[name]), text(2, LENGTH)
    assert_close_fp32(read(model, tokens_BT, cuts), model(tokens_BT).logits)


@pytest.mark.parametrize("tokens", [5, 16])
def test_rolled_back_then_read_again_equals_never(tokens):
    model, right, wrong = build(whole()), text(1, LENGTH), text(1, LENGTH, seed=1)
    state = model.new_state()
    for piece in (right[:, :4], wrong[:, :tokens]):
        model(piece, state=state)
    state.rollback(tokens)
    assert state.length == 4
    assert_bitwise(read(model, right[:, 4:], (1,), state), read(model, right, (4, 5))[:, 4:])


def test_a_roll_back_reaches_max_rollback_behind_the_longest_text_and_no_further():
    model, tokens_BT = build(whole()), text(1, 20)
    state = model.new_state(max_rollback=6)
    model(tokens_BT, state=state)
    state.rollback(4)
    model(tokens_BT[:, 16:17], state=state)
    assert state.floor == 14
    with pytest.raises(RequestError, match="at least 14 must stay"):
        state.rollback(4)
    state.rollback(3)
    assert_close_fp32(read(model, tokens_BT[:, 14:], (), state), read(model, tokens_BT, (14,))[:, 14:])


def test_roll_backs_one_after_another_add_up():
    model, tokens_BT = build(whole()), text(1, 20)
    state = model.new_state(max_rollback=6)
    model(tokens_BT, state=state)
    for _ in range(3):
        state.rollback(2)
    with pytest.raises(RequestError):
        state.rollback(1)
    assert_close_fp32(read(model, tokens_BT[:, 14:], (), state), read(model, tokens_BT, (14,))[:, 14:])


@pytest.mark.parametrize("tokens", [-1, 4])
def test_impossible_roll_backs_raise_and_change_nothing(tokens):
    model, tokens_BT = build(bare()), text(1, 3)
    state = model.new_state()
    model(tokens_BT, state=state)
    with pytest.raises(RequestError, match="cannot roll back"):
        state.rollback(tokens)
    assert state.length == 3


def test_restored_from_a_snapshot_equals_never_gone_on():
    model, right, wrong = build(whole()), text(1, 40), text(1, 40, seed=1)
    state = model.new_state(max_rollback=3)
    model(right[:, :9], state=state)
    snapshot = state.snapshot()
    model(wrong[:, :30], state=state)  # further than any roll-back
    state.restore(snapshot)
    assert_bitwise(read(model, right[:, 9:12], (), state), read(model, right[:, :12], (9,))[:, 9:])
    state.rollback(3)
    assert_bitwise(read(model, right[:, 9:], (), state), read(model, right, (9,))[:, 9:])


def test_a_snapshot_of_more_than_is_held_is_refused():
    model = build(bare())
    state, empty = model.new_state(), model.new_state()
    model(text(1, 3), state=state)
    with pytest.raises(RequestError, match="snapshot of 3 tokens, but only 0"):
        empty.restore(state.snapshot())


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 2, 0, 0), (1,)], ids=["reordered", "repeated", "selected"])
def test_selected_rows_go_on_as_if_they_had_always_stood_there(order):
    model, tokens_BT, rows = build(whole()), text(3, LENGTH), torch.tensor(order)
    state = model.new_state(3)
    model(tokens_BT[:, :7], state=state)
    state.select(rows)
    assert state.batch == len(order)
    assert_close_fp32(read(model, tokens_BT[rows, 7:], (1,), state), read(model, tokens_BT, (7, 8))[rows, 7:])


@pytest.mark.parametrize("name", ["whole", "hc", "bare", "no convolution, order 4"])
def test_left_padded_texts_decode_as_they_do_alone(name):
    model, lengths = build(MODELS[name]), (3, 9, 1)
    texts = [text(1, length, seed=length) for length in lengths]
    padded = torch.cat([torch.cat((text(1, 9 - length, seed=99), one), dim=1) for length, one in zip(lengths, texts, strict=True)])
    document_BT = torch.stack([(torch.arange(9) >= 9 - length).long() - 1 for length in lengths])
    state, more = model.new_state(3), text(3, 4, seed=5)
    together = torch.cat([model(padded, document_BT=document_BT, state=state).logits, read(model, more, (1,), state)], dim=1)
    for row, (length, one) in enumerate(zip(lengths, texts, strict=True)):
        alone = read(model, torch.cat((one, more[row : row + 1]), dim=1), (length, length + 1))
        assert_close_fp32(together[row : row + 1, 9 - length :], alone)


def test_documents_change_between_and_inside_chunks():
    model, tokens_BT = build(whole()), text(1, 12)
    document_BT = torch.tensor([[0, 0, 0, 4, 4, 4, 4, 4, 1, 1, 1, 1]])
    state = model.new_state()
    parts = [model(tokens_BT[:, a:b], document_BT=document_BT[:, a:b], state=state).logits for a, b in ((0, 3), (3, 5), (5, 10), (10, 12))]
    assert_close_fp32(torch.cat(parts, dim=1), model(tokens_BT, document_BT=document_BT).logits)


def test_a_document_may_follow_a_text_that_had_no_number():
    model, tokens_BT = build(whole()), text(1, 9)
    state = model.new_state()
    model(tokens_BT[:, :4], state=state)
    fresh = model(tokens_BT[:, 4:], document_BT=torch.full((1, 5), 3), state=state).logits
    assert_close_fp32(fresh, model(tokens_BT[:, 4:]).logits)


def test_rows_may_be_fetched_before_the_call():
    model, tokens_BT = build(whole()), text(2, 9)
    state, twin = model.new_state(2), model.new_state(2)
    for piece in tokens_BT.split(4, dim=1):
        rows = model.memory.fetch(piece, None, state)
        assert_bitwise(model(piece, state=state, rows=rows).logits, model(piece, state=twin).logits)


def test_the_cache_holds_latents_and_rotary_keys_and_nothing_else():
    state = build(whole()).new_state(2)
    assert [track.values.shape[2:] for track in state.caches] == [(ATTENTION.kv_lora_rank + ATTENTION.qk_rope_head_dim,)] * 3
    reach = (ENGRAM.conv_kernel - 1) * ENGRAM.dilation
    assert reach == 9
    assert [tuple(tail.values.shape) for tail in state.tails.values()] == [(2, reach + 16, 3, 16)] * 2


def test_a_long_prefill_is_not_kept_in_a_tail():
    model = build(whole())
    state = model.new_state()
    model(text(1, 300), state=state)
    for tail in state.tails.values():
        assert tail.values.untyped_storage().nbytes() == tail.values.nbytes


def test_the_absorbed_form_equals_the_naive_one(monkeypatch):
    for attention in (ATTENTION, MLAConfig(num_heads=1, kv_lora_rank=3, qk_nope_head_dim=1, qk_rope_head_dim=2, v_head_dim=7)):
        model, tokens_BT = build(bare(attention=attention)), text(2, 13)
        document_BT = torch.tensor([[-1] * 3 + [0] * 10, [0] * 5 + [1] * 8])
        for documents in (None, document_BT):
            logits = {}
            for limit in (0, 99):
                monkeypatch.setattr(mla, "ABSORB_UP_TO", limit)
                logits[limit] = model(tokens_BT, document_BT=documents, state=model.new_state(2)).logits
            assert_close_fp32(logits[99], logits[0])
            assert_close_fp32(logits[99], model(tokens_BT, document_BT=documents).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_absorbed_form_has_the_gradients_of_the_naive_one(monkeypatch, dtype):
    tokens_BT, cotangent_BTV, models = text(2, 13), torch.randn(2, 13, VOCAB), []
    for limit in (0, 99):
        monkeypatch.setattr(mla, "ABSORB_UP_TO", limit)
        models.append(build(bare(num_layers=1)).to(dtype))
        with torch.enable_grad():
            logits_BTV = models[-1](tokens_BT, state=models[-1].new_state(2)).logits
            (logits_BTV * cotangent_BTV).sum().backward()
    assert_same_gradients(*models)


def test_the_limit_of_a_state_is_kept_before_anything_is_appended():
    model = build(whole())
    state = model.new_state(max_tokens=5)
    model(text(1, 4), state=state)
    with pytest.raises(CapacityError, match="4 tokens so far and 2 more pass this state's limit of 5"):
        model(text(1, 2), state=state)
    assert state.length == 4
    model(text(1, 1), state=state)


def test_a_state_of_another_batch_size_is_refused():
    model = build(whole())
    state = model.new_state(2)
    with pytest.raises(RequestError, match=r"new_state\(batch=1\)"):
        model(text(1, 2), state=state)
    assert state.length == 0


def test_no_tokens_leave_a_state_as_it_is():
    model, tokens_BT = build(whole()), text(2, 5)
    state = model.new_state(2)
    for piece in (tokens_BT[:, :0], tokens_BT[:, :4], tokens_BT[:, :0]):
        assert model(piece, state=state).logits.shape[1] == piece.shape[1]
    assert_close_fp32(model(tokens_BT[:, 4:], state=state).logits, model(tokens_BT).logits[:, 4:])


def test_a_state_in_bf16_stays_close():
    model, tokens_BT = build(whole()), text(1, LENGTH)
    state = model.new_state(dtype=torch.bfloat16)
    assert state.caches[0].values.dtype == torch.bfloat16
    got, want = read(model, tokens_BT, tuple(range(4, LENGTH)), state), model(tokens_BT).logits
    assert (got - want).abs().max() < 0.05 * want.abs().max()
