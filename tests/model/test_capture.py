"""A captured step is the ordinary one, whatever the model is made of and however the two alternate."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import byrote
from byrote.errors import ConfigError
from byrote.kernels import native
from byrote.kernels.decode_step import cpu
from byrote.model import tape as tapes
from byrote.model.capture import Captured, capture, capture_or_model
from byrote.model.config import MLAConfig, MTPConfig, RopeConfig, YarnConfig
from byrote.model.presets import load_preset
from byrote.model.transformer import Model
from tests.kernels.twins import need
from tests.model.tiny_models import ATTENTION, ENGRAM, MOE, RESIDUALS, bare, build, text, whole
from tests.tolerances import assert_bitwise, assert_close_fp32

ROPE = replace(ATTENTION.rope, layout="half", yarn=YarnConfig(factor=4.0, original_positions=8, mscale=0.7))
GROUPS = replace(MOE, num_experts=12, num_groups=4, top_groups=2, top_k=3, route_scale=2.5, normalize_gate=False)
ODD = MLAConfig(num_heads=5, kv_lora_rank=37, qk_nope_head_dim=9, qk_rope_head_dim=6, v_head_dim=19)
WIDE = MLAConfig(num_heads=2, q_lora_rank=33, kv_lora_rank=112, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32)
MODELS = {
    "whole": whole(),
    "bare": bare(),
    "hc": whole(residual=RESIDUALS["hc"]),
    "eight streams, one iteration": whole(residual=replace(RESIDUALS["mhc"], num_streams=8, sinkhorn_iters=1)),
    "plain with memory": whole(residual=RESIDUALS["plain"]),
    "hard gate": whole(engram=replace(ENGRAM, gate="hard")),
    "no convolution, order 4": whole(engram=replace(ENGRAM, conv_kernel=0, max_order=4)),
    "long convolution, memory in bf16": whole(engram=replace(ENGRAM, conv_kernel=5, conv_dilation=2, table_dtype="bfloat16")),
    "full-rank queries, half layout, yarn": whole(attention=replace(ATTENTION, q_lora_rank=None, rope=ROPE)),
    "groups, sums kept": whole(moe=GROUPS),
    "sqrt-softplus, no shared expert, clamp": whole(moe=replace(MOE, num_shared=0, score="sqrt_softplus"), swiglu_limit=0.3),
    "clamp on a plain residual": bare(moe=replace(MOE, num_shared=2), swiglu_limit=0.3),
    "odd sizes": bare(attention=ODD, dim=53, vocab_size=29, ffn_hidden=41),
    "wide latents": bare(attention=WIDE, dim=96, ffn_hidden=130),
}
CALLS = [(1, 1), (3, 1), (1, 16), (2, 5), (5, 3)]  # batch, tokens


@pytest.fixture(autouse=True)
def decoding():
    need(cpu.library)
    with torch.no_grad():
        yield


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    """Threads that share even the smallest step."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(native, "WORTH_A_THREAD", 0)
    yield request.param
    torch.set_num_threads(before)


class Refusing(nn.Module):
    """Stands in for a model that must not be asked."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.inner = model

    def __getattr__(self, name: str):
        return getattr(super().__getattr__("inner"), name) if name != "inner" else super().__getattr__(name)

    def forward(self, *_args, **_more):
        raise AssertionError("the model itself was called")


def alone(step: Captured) -> Captured:
    """The step, unable to fall back."""
    step.model = Refusing(step.model)
    return step


def both(model: Model, tokens_BT: Tensor, prompt: int, tokens: int, **more) -> None:
    """After a prompt, every further piece gives the same, captured or not."""
    batch, length = tokens_BT.shape
    step, states = alone(capture(model)), [model.new_state(batch) for _ in range(2)]
    for state in states:
        model(tokens_BT[:, :prompt], state=state, **more)
    for start in range(prompt, length, tokens):
        piece = tokens_BT[:, start : start + tokens]
        got, want = step(piece, state=states[0], want=("hidden",)), model(piece, state=states[1], want=("hidden",))
        assert_close_fp32(got.logits, want.logits)
        assert_close_fp32(got.extras["hidden"], want.extras["hidden"])
    assert states[0].length == states[1].length == length
    assert_same_states(*states)


def assert_same_states(got, want) -> None:
    for one, other in zip(got.caches, want.caches, strict=True):
        assert_close_fp32(one.all(), other.all())
    for one, other in zip(got.tails.values(), want.tails.values(), strict=True):
        assert_close_fp32(one.values, other.values)
    for name in ("positions", "places", "canonical"):
        assert_bitwise(getattr(got, name).all(), getattr(want, name).all())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("batch", "tokens"), CALLS)
def test_a_captured_step_equals_the_ordinary_one(name, batch, tokens):
    both(build(MODELS[name]), text(batch, 7 + 3 * tokens), 7, tokens)


@pytest.mark.parametrize("name", ["whole", "hc", "odd sizes", "groups, sums kept"])
def test_any_number_of_threads_gives_the_same(name, threads):
    both(build(MODELS[name]), text(2, 13), 5, 2)


def test_more_keys_than_a_block_and_more_tokens_than_a_buffer_holds_at_first():
    both(build(whole()), text(2, 270), 240, 1)


def test_a_text_may_begin_with_captured_steps():
    model, tokens_BT = build(whole()), text(2, 12)
    step, state = alone(capture(model)), model.new_state(2)
    parts = [step(piece, state=state).logits for piece in tokens_BT.split((1, 5, 6), dim=1)]
    assert_close_fp32(torch.cat(parts, dim=1), model(tokens_BT).logits)


def test_captured_and_ordinary_steps_alternate_and_roll_back():
    model, tokens_BT, wrong_BT = build(whole()), text(1, 40), text(1, 40, seed=1)
    step, state = capture(model), model.new_state()
    model(tokens_BT[:, :9], state=state)
    parts = [model(tokens_BT[:, :9]).logits]
    for place in range(9, 39, 3):
        snapshot = state.snapshot()
        for call in (step, model) if place % 2 else (model, step):
            call(wrong_BT[:, place : place + 2], state=state)
        if place % 4:
            state.rollback(4)
        else:
            state.restore(snapshot)
        parts += [call(tokens_BT[:, place + i : place + i + 1], state=state).logits for i, call in enumerate((model, step, model))]
    assert_close_fp32(torch.cat(parts, dim=1), model(tokens_BT[:, :39]).logits)


@pytest.mark.parametrize("name", ["whole", "hc", "bare", "no convolution, order 4"])
def test_left_padded_texts_decode_as_they_do_alone(name):
    model, lengths = build(MODELS[name]), (3, 9, 1)
    document_BT = torch.stack([(torch.arange(9) >= 9 - length).long() - 1 for length in lengths])
    tokens_BT, step, state = text(3, 17), alone(capture(model)), model.new_state(3)
    model(tokens_BT[:, :9], document_BT=document_BT, state=state)
    together = torch.cat([step(tokens_BT[:, at : at + 2], state=state).logits for at in range(9, 17, 2)], dim=1)
    for row, length in enumerate(lengths):
        assert_close_fp32(together[row : row + 1], model(tokens_BT[row : row + 1, 9 - length :]).logits[:, length:])


def test_documents_change_inside_a_captured_piece_and_padding_sees_nothing():
    model, tokens_BT = build(whole()), text(2, 12)
    document_BT = torch.tensor([[0, 0, 0, 4, 4, 4, 4, 4, 1, 1, 1, 1], [-1, -1, -1, -1, -1, 2, 2, 2, 2, -1, -1, 3]])
    step, state = alone(capture(model)), model.new_state(2)
    pieces = [step(tokens_BT[:, a:b], document_BT=document_BT[:, a:b], state=state).logits for a, b in ((0, 3), (3, 5), (5, 10), (10, 12))]
    assert_close_fp32(torch.cat(pieces, dim=1), model(tokens_BT, document_BT=document_BT).logits)


def test_positions_and_rows_may_be_given():
    model, tokens_BT = build(whole()), text(1, 12)
    step, states = alone(capture(model)), [model.new_state() for _ in range(2)]
    for at in range(0, 12, 4):
        piece, position_BT = tokens_BT[:, at : at + 4], torch.arange(4)[None] * 3 + at
        rows = model.memory.fetch(piece, None, states[0])
        got = step(piece, state=states[0], position_BT=position_BT, rows=rows, last=2)
        assert got.rows is rows
        assert_close_fp32(got.logits, model(piece, state=states[1], position_BT=position_BT).logits[:, -2:])


def test_long_greedy_texts_are_equal_where_no_two_logits_tie():
    model = Model(replace(load_preset("tiny"), num_layers=2, init_std=0.3), seed=3).eval()
    step = alone(capture(model))
    ids, ties = {}, 0
    for name, call in {"captured": step, "ordinary": model}.items():
        state, said = model.new_state(), []
        logits_V = model(text(1, 30), state=state).logits[0, -1]
        for _ in range(150):
            top = logits_V.topk(2)
            ties += bool(top.values[0] - top.values[1] < 1e-4)
            said.append(int(top.indices[0]))
            logits_V = call(torch.tensor([said[-1:]]), state=state).logits[0, -1]
        ids[name] = said
    assert ties == 0 and len(set(ids["ordinary"])) > 20
    assert ids["captured"] == ids["ordinary"]


def test_drafts_read_along_with_captured_steps():
    model, tokens_BT = build(whole(mtp=MTPConfig(depth=2))), text(2, 9)
    step, states = alone(capture(model)), [model.new_state(2, drafts=True) for _ in range(2)]
    for piece in tokens_BT[:, :8].split((3, 1, 4), dim=1):
        step(piece, state=states[0])
        model(piece, state=states[1])
    assert_bitwise(*(model.draft(state, tokens_BT[:, 8:], 2) for state in states))


def test_a_step_is_bitwise_repeatable_and_leaves_its_inputs_alone(threads):
    model, tokens_BT = build(whole()), text(2, 9)
    step, said = alone(capture(model)), []
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        state = model.new_state(2)
        said.append(torch.cat([step(piece, state=state).logits for piece in tokens_BT.split(3, dim=1)], dim=1))
    assert_bitwise(*said)
    for name, tensor in model.state_dict().items():
        assert_bitwise(tensor, weights[name])


def test_a_nan_reaches_the_logits():
    model = build(whole())
    model.blocks[1].ffn.shared.down.weight[3, 2] = float("nan")
    state = model.new_state()
    assert alone(capture(model))(text(1, 2), state=state).logits.isnan().any()


def changed_in_place(model):
    model.blocks[0].attn.o.weight.mul_(1.5)


def loaded_by_assignment(model):
    model.load_state_dict(
        {name: 1.5 * part if part.is_floating_point() else part for name, part in model.state_dict().items()}, assign=True
    )


def storage_exchanged(model):
    for param in model.parameters():
        param.data = param.data * 1.5


def module_exchanged(model):
    model.blocks[2].ffn = build(whole(), seed=9).blocks[2].ffn


@pytest.mark.parametrize("change", [changed_in_place, loaded_by_assignment, storage_exchanged, module_exchanged])
def test_changed_weights_show_in_the_next_text(change):
    model, tokens_BT = build(whole()), text(1, 6)
    step = alone(capture(model))
    before = step(tokens_BT, state=model.new_state()).logits
    change(model)
    gc.collect()
    after = step(tokens_BT, state=model.new_state()).logits
    assert_close_fp32(after, model(tokens_BT).logits)
    assert (after - before).abs().max() > 1e-3


def test_weights_that_move_in_the_middle_of_a_text_stay_readable_until_its_end():
    model, tokens_BT = build(whole()), text(1, 6)
    step, state, twin = alone(capture(model)), model.new_state(), build(whole())
    want = twin(tokens_BT).logits
    step(tokens_BT[:, :3], state=state)
    storage_exchanged(model)
    gc.collect()
    assert_close_fp32(step(tokens_BT[:, 3:], state=state).logits, want[:, 3:])


def strew(model):
    weight = model.head.weight
    weight.data = weight.data.t().contiguous().t()


def inject_product(model):
    model.head.matmul = lambda x, weight: 2 * torch.nn.functional.linear(x, weight)


def inject_grouped(model):
    experts = model.blocks[1].ffn.experts.down
    plain = experts.matmul
    experts.matmul = lambda *parts: 2 * plain(*parts)


def hook(model):
    model.blocks[1].register_forward_hook(lambda *_: None)


REFUSED = {
    inject_product: "Linear.matmul",
    inject_grouped: "GroupedLinear.matmul",
    hook: "forward hook on blocks.1",
    strew: "head.weight is torch.float32 on cpu with gaps",
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.items())
def test_what_a_tape_cannot_express_is_refused_and_later_left_to_the_model(change, reason):
    model, tokens_BT = build(whole()), text(1, 6)
    step = capture(model)
    change(model)
    with pytest.raises(ConfigError, match=reason):
        capture(model)
    assert_bitwise(step(tokens_BT, state=model.new_state()).logits, model(tokens_BT, state=model.new_state()).logits)
    assert reason in step.reason


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (whole(residual=replace(RESIDUALS["mhc"], num_streams=9)), "num_streams is 9; a tape takes up to 8"),
        (whole(moe=replace(MOE, num_experts=40, top_k=33)), "top_k is 33; a tape takes up to 32"),
        (whole(attention=(ATTENTION, replace(ATTENTION, rope=RopeConfig(theta=99.0)), ATTENTION)), "attention of block 1 is MLAConfig"),
    ],
)
def test_configurations_beyond_a_tape_are_refused_by_name(config, reason):
    model = build(config)
    with pytest.raises(ConfigError, match=reason):
        capture(model)
    step, why = capture_or_model(model)
    assert step is model and reason in why


def test_other_precisions_are_refused_by_the_name_of_a_weight():
    with pytest.raises(ConfigError, match=r"embed.weight is torch.bfloat16"):
        capture(build(whole()).bfloat16())


def test_without_native_code_the_model_serves_and_the_reason_is_told(monkeypatch):
    model, tokens_BT = build(whole()), text(1, 4)
    step = capture(model)
    monkeypatch.setenv("BYROTE_NATIVE", "0")
    same, why = capture_or_model(model)
    assert same is model and "BYROTE_NATIVE=0" in why
    assert_bitwise(step(tokens_BT, state=model.new_state()).logits, model(tokens_BT, state=model.new_state()).logits)


@pytest.mark.parametrize("call", ["too many rows", "gradients", "autocast", "other extras", "no state", "bf16 state"])
def test_calls_a_tape_is_not_made_for_go_to_the_model(call, monkeypatch):
    model, tokens_BT = build(whole()), text(2, 9 if call == "too many rows" else 4)
    step = capture(model)
    monkeypatch.setattr(tapes.Tape, "run", lambda *_: pytest.fail("the tape ran"))
    want = ("gates",) if call == "other extras" else ()
    state = None if call == "no state" else model.new_state(2, dtype=torch.bfloat16 if call == "bf16 state" else None)
    with torch.set_grad_enabled(call == "gradients"), torch.autocast("cpu", torch.bfloat16, enabled=call == "autocast"):
        out = step(tokens_BT, state=state, want=want)
    assert out.logits.requires_grad == (call == "gradients")
    assert ("gates" in out.extras) == (call == "other extras")


@pytest.mark.parametrize("tokens", [[[0, 29]], [[-1, 3]]])
def test_ids_outside_the_vocabulary_are_refused_before_anything_is_appended(tokens):
    model = build(whole())
    step, state = capture(model), model.new_state()
    with pytest.raises(ConfigError, match="vocabulary"):
        step(torch.tensor(tokens), state=state)
    assert state.length == 0 and all(cache.length == 0 for cache in state.caches)


def test_the_step_is_one_of_the_packages_names():
    assert byrote.capture is capture
