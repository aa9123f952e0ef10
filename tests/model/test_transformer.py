"""The model as a whole: what it refuses, what precision, recompute and copies leave as it was."""

import copy
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from byrote.errors import ConfigError
from byrote.model.config import MTPConfig
from byrote.model.transformer import Model
from byrote.optim.groups import treatment
from tests.model.tiny_models import MOE, RESIDUALS, VOCAB, assert_same_gradients, bare, build, gradients, next_tokens, text, whole
from tests.tolerances import assert_bitwise, assert_close_fp32

MODELS = {"whole": whole(), "hc": whole(residual=RESIDUALS["hc"]), "bare": bare()}


def train_once(model: Model, rows: int = 2, length: int = 11) -> dict[str, torch.Tensor]:
    """Losses of one forward pass; gradients stay in the model."""
    tokens_BT = text(rows, length)
    out = model.train()(tokens_BT, targets_BT=next_tokens(tokens_BT))
    sum(out.losses.values()).backward()
    return {name: loss.detach() for name, loss in out.losses.items()}


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[0, VOCAB]]), r"span 0\.\.29.*0\.\.28.*another tokenizer"),
        (torch.tensor([[-1, 0]]), r"span -1\.\.0"),
        (torch.tensor([0, 1]), r"shape \(2,\)"),
        (torch.tensor([[0.0, 1.0]]), "torch.float32"),
    ],
    ids=["too large", "negative", "one dim", "floating"],
)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_that_are_none_are_refused(name, tokens, message):
    with pytest.raises(ConfigError, match=message):
        build(MODELS[name])(tokens)


@pytest.mark.parametrize("name", ["document_BT", "position_BT", "targets_BT"])
def test_shapes_that_disagree_are_refused(name):
    with pytest.raises(ConfigError, match=rf"{name} has shape \(1, 5\), tokens \(1, 4\)"):
        build(whole())(text(1, 4), **{name: torch.zeros(1, 5, dtype=torch.int64)})


@pytest.mark.parametrize("bad", [-1, VOCAB])
def test_targets_that_are_no_tokens_are_refused(bad):
    with pytest.raises(ConfigError, match="targets other than -100"):
        build(bare())(text(1, 4), targets_BT=torch.tensor([[1, -100, bad, 2]]))


@pytest.mark.parametrize("want", [("hiden",), "hidden", ("hidden", "logits")])
def test_unknown_extras_are_refused(want):
    with pytest.raises(ConfigError, match=r"unknown extra .* allowed: hidden, gates"):
        build(bare())(text(1, 4), want=want)


def test_extras_are_what_their_names_say():
    model, tokens_BT = build(whole()), text(2, 7)
    targets_BT = next_tokens(tokens_BT)
    out = model(tokens_BT, want=("hidden", "streams", "router", "gates"))
    assert_close_fp32(out.logits, out.extras["hidden"] @ model.head.weight.T)
    assert_bitwise(model.norm(model.read_out(out.extras["streams"])), out.extras["hidden"])
    assert [experts.shape for experts in out.extras["router"]] == [(2, 7, MOE.top_k)] * 2
    scored = model(tokens_BT, targets_BT=targets_BT, want=("token_losses",))
    assert scored.logits is None
    by_hand = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets_BT.flatten(), reduction="none", ignore_index=-100)
    assert_close_fp32(scored.extras["token_losses"].flatten(), by_hand)
    assert_close_fp32(scored.losses["next_token"], by_hand.sum() / 12)


def test_no_scored_token_is_a_loss_of_zero():
    model = build(whole()).train()
    out = model(text(1, 4), targets_BT=torch.full((1, 4), -100))
    sum(out.losses.values()).backward()
    assert out.losses["next_token"] == 0
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("name", MODELS)
def test_without_gradients_the_losses_are_the_same(name):
    model, tokens_BT = build(MODELS[name]), text(2, 11)
    with_gradients = model(tokens_BT, targets_BT=next_tokens(tokens_BT)).losses["next_token"]
    with torch.no_grad():
        assert_close_fp32(model(tokens_BT, targets_BT=next_tokens(tokens_BT)).losses["next_token"], with_gradients)
    with torch.inference_mode():
        assert_close_fp32(model(tokens_BT, targets_BT=next_tokens(tokens_BT)).losses["next_token"], with_gradients)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_autocast_stays_within_half_a_percent_of_the_loss(name):
    exact, rounded = build(MODELS[name]), build(MODELS[name])
    want = train_once(exact, 8, 31)
    tokens_BT = text(8, 31)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = rounded.train()(tokens_BT, targets_BT=next_tokens(tokens_BT), want=("streams",))
        got = dict(out.losses)
    sum(got.values()).backward()
    assert out.extras["streams"].dtype == torch.bfloat16
    assert got["next_token"].item() == pytest.approx(want["next_token"].item(), rel=5e-3)
    for param, gradient in gradients(rounded).items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all(), param


@pytest.mark.parametrize("name", MODELS)
def test_fp64_is_what_fp32_rounds(name):
    exact, rounded = build(MODELS[name]).double(), build(MODELS[name])
    assert exact(text(2, 11)).logits.dtype == torch.float64
    assert_close_fp32(rounded(text(2, 11)).logits.double(), exact(text(2, 11)).logits)


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_blocks_have_the_gradients_of_stored_ones(name):
    stored, recomputed = build(MODELS[name]), build(MODELS[name])
    for block in [*recomputed.blocks, *(module.block for module in recomputed.mtp)]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    losses = train_once(stored), train_once(recomputed)
    for term, loss in losses[0].items():
        assert_bitwise(losses[1][term], loss)
    assert_same_gradients(recomputed, stored)


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_is_the_same_and_independent(name):
    model = build(MODELS[name])
    twin = copy.deepcopy(model)
    before = model(text(1, 9)).logits
    assert_bitwise(twin(text(1, 9)).logits, before)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *([twin.memory.store.vectors_NE] if twin.memory else [])):
            tensor.add_(1)
    assert_bitwise(model(text(1, 9)).logits, before)


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_fixes_every_number(name):
    first, again, other = (Model(MODELS[name], seed=seed) for seed in (3, 3, 4))
    torch.manual_seed(99)
    for (param_name, param), same, different in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert_bitwise(same, param)
        drawn = param.unique().numel() > 3  # all others start as constants
        assert drawn != torch.equal(different, param), param_name
    assert first.get_extra_state() == again.get_extra_state()
    if first.memory is not None:
        assert first.get_extra_state() != other.get_extra_state()


def test_initial_spreads_are_the_ones_asked_for():
    model = Model(whole(dim=64, ffn_hidden=128, init_std=0.02))
    for name, role in model.param_roles().items():
        param = model.get_parameter(name)
        if role == "norm":
            assert_bitwise(param.detach(), torch.ones_like(param))
        elif role == "conv":
            assert not param.any()
        elif role != "mix" and param.numel() > 4000:
            assert param.std().item() == pytest.approx(0.02, rel=0.06), name
            assert abs(param.mean().item()) < 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_a_role_the_optimizer_knows(name):
    model = Model(MODELS[name])
    roles = model.param_roles()
    assert roles.keys() == dict(model.named_parameters()).keys()
    for param, role in roles.items():
        split = treatment(role).split
        if split is not None:
            side = 0 if split[0] == "rows" else 1
            shape = model.get_parameter(param).shape
            assert shape[-2 + side] % split[1] == 0, param


def test_roles_by_example():
    roles = Model(whole()).param_roles()
    assert {roles[name] for name in ("embed.weight", "head.weight")} == {"embedding", "head"}
    expected = {
        "blocks.0.attn.q_b.weight": "matrix_rows:3",
        "blocks.0.attn.kv_b.weight": "matrix_rows:3",
        "blocks.0.attn.o.weight": "matrix_cols:3",
        "blocks.0.attn.kv_a.weight": "matrix",
        "blocks.0.ffn.gate_up.weight": "matrix_pair",
        "blocks.1.ffn.router": "router",
        "blocks.1.ffn.experts.gate_up.weight": "experts_pair",
        "blocks.1.ffn.experts.down.weight": "experts",
        "blocks.1.ffn.shared.gate_up.weight": "matrix_pair",
        "blocks.0.engram.key.weight": "matrix_rows:3",
        "blocks.0.engram.value.weight": "matrix",
        "blocks.0.engram.conv.weight": "conv",
        "blocks.0.engram.conv.gain": "norm",
        "blocks.0.engram.key_gain": "norm",
        "blocks.0.attn.kv_a_norm.weight": "norm",
        "blocks.0.attn_site.fn": "mix",
        "read_out.base": "mix",
        "mtp.1.project.weight": "matrix",
        "mtp.1.read_out.fn": "mix",
    }
    assert {name: roles[name] for name in expected} == expected


@pytest.mark.parametrize("name", MODELS)
def test_a_text_does_not_depend_on_the_rest_of_the_batch(name):
    model, tokens_BT = build(MODELS[name]), text(3, 9)
    with torch.no_grad():
        together = model(tokens_BT).logits
        assert_close_fp32(torch.cat([model(row[None]).logits for row in tokens_BT]), together)


@pytest.mark.parametrize("name", MODELS)
def test_a_token_never_sees_the_future(name):
    model, tokens_BT = build(MODELS[name]), text(1, 12)
    other = tokens_BT.clone()
    other[0, 7] = (other[0, 7] + 1) % VOCAB
    with torch.no_grad():
        difference = (model(tokens_BT).logits - model(other).logits).abs().amax(-1)[0]
    assert difference[:7].max() < 1e-5 < difference[7]


@pytest.mark.parametrize("name", MODELS)
def test_no_tokens_give_no_logits(name):
    model = build(MODELS[name])
    for gradients_on in (True, False):
        with torch.set_grad_enabled(gradients_on):
            for documents in (None, torch.zeros(2, 0, dtype=torch.int64)):
                assert model(torch.zeros(2, 0, dtype=torch.int64), document_BT=documents).logits.shape == (2, 0, VOCAB)


@pytest.mark.parametrize(
    "parts", [{}, {"engram": None}, {"moe": None}, {"mtp": None}, {"mtp": MTPConfig()}, {"residual": RESIDUALS["plain"]}]
)
def test_any_part_can_be_left_out_and_what_is_left_learns(parts):
    model = Model(whole(**parts))
    before = train_once(model)["next_token"]
    with torch.no_grad():
        for param in model.parameters():
            if param.grad is not None:
                param -= 0.05 * param.grad
    model.zero_grad()
    assert train_once(model)["next_token"] < before


def test_a_model_can_be_planned_without_memory_for_its_weights():
    with torch.device("meta"):
        model = Model(whole())
    assert model.embed.weight.is_meta and not model.memory.store.vectors_NE.is_meta
    assert_bitwise(model.memory.store.vectors_NE, Model(whole()).memory.store.vectors_NE)


def test_configurations_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="dim is 0"):
        bare(dim=0)
    with pytest.raises(ConfigError, match="num_layers is -1"):
        bare(num_layers=-1)


def test_an_injected_head_is_honoured_by_the_loss_as_by_the_logits():
    model, tokens_BT = build(whole()), text(2, 11)
    model.head.matmul = lambda x, weight: torch.nn.functional.linear(x, weight.round(decimals=1))
    targets_BT = next_tokens(tokens_BT)
    loss = model(tokens_BT, targets_BT=targets_BT).losses["next_token"]
    logits_NV = model(tokens_BT).logits.flatten(0, 1)
    assert_close_fp32(loss, torch.nn.functional.cross_entropy(logits_NV, targets_BT.flatten()))
