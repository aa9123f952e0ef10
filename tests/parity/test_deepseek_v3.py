"""byrote's model and transformers' DeepseekV3ForCausalLM are twins: logits, gradients, cached steps, MTP, and the way back."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from byrote.checkpoint.huggingface import from_transformers, to_transformers
from byrote.checkpoint.v3_names import v3_pieces
from byrote.model.config import ModelConfig, MTPConfig
from byrote.model.rope import frequencies
from byrote.model.transformer import Model
from tests.parity.v3_models import VARIANTS, tiny_v3
from tests.tolerances import assert_bitwise, assert_close_fp32

GRADIENTS = 1e-4  # of each parameter's largest: a whole model backwards, summed in another order


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 53, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_all_gradients_are_the_twins(variant: str, seed: int) -> None:
    theirs = tiny_v3(seed, **VARIANTS[variant])
    ours = from_transformers(theirs)
    tokens_BT = tokens(*((3, 7), (1, 2), (2, 33))[seed], seed=seed)
    want_BTV, got_BTV = theirs(tokens_BT).logits, ours(tokens_BT).logits
    assert_close_fp32(got_BTV, want_BTV)
    cotangent_BTV = torch.randn_like(want_BTV)
    (want_BTV * cotangent_BTV).sum().backward()
    (got_BTV * cotangent_BTV).sum().backward()
    assert_same_gradients(ours, theirs)


def assert_same_gradients(ours: Model, theirs: torch.nn.Module) -> None:
    got, want = dict(ours.named_parameters()), dict(theirs.named_parameters())
    seen = set()
    for piece in v3_pieces(ours.config, stacked=True):
        if piece.name not in want:  # the router's bias is a buffer
            assert piece.target.endswith(".bias")
            continue
        seen.add(piece.name)
        grad, wanted = piece.of(got[piece.target].grad), want[piece.name].grad
        assert (grad - wanted).abs().max() <= GRADIENTS * wanted.abs().max(), piece.name
    assert seen == want.keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_again_is_bitwise(variant: str) -> None:
    theirs = tiny_v3(3, **VARIANTS[variant])
    back = to_transformers(from_transformers(theirs))
    want, got = theirs.state_dict(), back.state_dict()
    assert got.keys() == want.keys()
    for name in want:
        assert_bitwise(got[name], want[name])
    back.set_experts_implementation("eager")
    assert_bitwise(back(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_configuration_survives_the_way_out_and_back(variant: str) -> None:
    ours = from_transformers(tiny_v3(**VARIANTS[variant]))
    assert from_transformers(to_transformers(ours)).config == ours.config


def test_nothing_is_shared_with_the_other_model() -> None:
    theirs = tiny_v3()
    ours = from_transformers(theirs)
    back = to_transformers(ours)
    before = theirs(tokens(1, 5)).logits
    for parameter in (*ours.parameters(), *back.parameters()):
        parameter.data.zero_()
    assert_bitwise(theirs(tokens(1, 5)).logits, before)


def test_bfloat16_weights_stay_bfloat16_and_the_routers_bias_fp32() -> None:
    theirs = tiny_v3().bfloat16()
    ours = from_transformers(theirs)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    assert ours.blocks[1].ffn.bias.dtype == torch.float32
    assert torch.isfinite(ours(tokens(2, 5)).logits).all()
    want, got = theirs.state_dict(), to_transformers(ours).state_dict()
    for name in want:
        assert torch.equal(got[name].float(), want[name].float())


@pytest.mark.parametrize("variant", ["groups and low-rank queries", "full-rank queries", "yarn", "yarn without mscale, half layout"])
def test_cached_steps_and_chunks_are_the_twins(variant: str) -> None:
    theirs = tiny_v3(4, **VARIANTS[variant])
    ours = from_transformers(theirs)
    tokens_BT, state, cache = tokens(2, 30, seed=4), ours.new_state(2), DynamicCache(config=theirs.config)
    start = 0
    with torch.no_grad():
        for length in (5, 1, 1, 19, 1, 3):  # one step, a chunk short enough to be absorbed, one that is not
            part_BT = tokens_BT[:, start : start + length]
            start += length
            assert_close_fp32(ours(part_BT, state=state).logits, theirs(part_BT, past_key_values=cache, use_cache=True).logits)


@pytest.mark.parametrize("variant", ["groups and low-rank queries", "yarn"])
def test_positions_far_out_are_the_twins(variant: str) -> None:
    theirs = tiny_v3(5, **VARIANTS[variant])
    ours = from_transformers(theirs)
    position_BT = torch.tensor([[0, 1, 4_095, 4_096, 100_003, 163_839]])
    want = theirs(tokens(1, 6), position_ids=position_BT).logits
    assert_close_fp32(ours(tokens(1, 6), position_BT=position_BT).logits, want)
    assert_bitwise(frequencies(6, ours.config.attention.rope), theirs.model.rotary_emb.inv_freq)


def test_left_padding_is_the_twins() -> None:
    theirs = tiny_v3(6)
    ours = from_transformers(theirs)
    tokens_BT = tokens(2, 8)
    document_BT = torch.tensor([[-1, -1, -1, 0, 0, 0, 0, 0], [0] * 8])
    want = theirs(tokens_BT, attention_mask=(document_BT >= 0).long()).logits
    real_BT = document_BT >= 0
    assert_close_fp32(ours(tokens_BT, document_BT=document_BT).logits[real_BT], want[real_BT])


@pytest.mark.parametrize("variant", ["groups and low-rank queries", "yarn"])
def test_mtp_modules_are_the_twins(variant: str) -> None:
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(getattr(layers, "MtpModel", None), "forward_layer"):
        pytest.skip("this transformers cannot run one MTP module by itself")
    theirs = tiny_v3(7, **VARIANTS[variant])
    ours = with_mtp(from_transformers(theirs).config, depth=2)
    with pytest.warns(UserWarning, match="2 left out"):
        main = to_transformers(ours)
    main.set_experts_implementation("eager")
    weights = {name: tensor.clone() for name, tensor in main.state_dict().items()}
    drafts = layers.MtpModel(main, 2).eval()  # which gives the shared embedding and head new random numbers
    main.load_state_dict(weights)
    load_mtp(drafts, ours)
    tokens_BT, targets_BT = tokens(2, 11)[:, :-1], tokens(2, 11)[:, 1:]
    output = ours(tokens_BT, targets_BT=targets_BT, want=("mtp_logits",))
    hidden_BTD, ahead_BT = main.model(tokens_BT).last_hidden_state, targets_BT
    for depth, got_BTV in enumerate(output.extras["mtp_logits"]):
        position_BT = torch.arange(depth + 1, depth + 1 + ahead_BT.shape[1])[None]
        hidden_BTD = drafts.forward_layer(depth, hidden_BTD[:, : ahead_BT.shape[1]], position_BT, None, input_ids=ahead_BT)
        assert_close_fp32(got_BTV[:, : ahead_BT.shape[1]], main.lm_head(hidden_BTD))
        ahead_BT = ahead_BT[:, 1:]


def with_mtp(config: ModelConfig, depth: int) -> Model:
    """A model with MTP modules, all weights large."""
    model = Model(replace(config, mtp=MTPConfig(depth=depth))).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def load_mtp(drafts: torch.nn.Module, ours: Model) -> None:
    """transformers' MTP modules number from 0, and call the block and the last norm otherwise."""
    own, tensors = ours.state_dict(), {}
    for piece in v3_pieces(ours.config, stacked=True):
        number, _, rest = piece.name.removeprefix("model.layers.").partition(".")
        if not number.isdigit() or int(number) < ours.config.num_layers or piece.is_copy:
            continue
        plain = rest.startswith(("enorm", "hnorm", "eh_proj"))
        rest = rest if plain else rest.replace("shared_head.norm", "post_norm") if "shared_head" in rest else f"mtp_block.{rest}"
        tensors[f"layers.{int(number) - ours.config.num_layers}.{rest}"] = piece.of(own[piece.target])
    missing, unexpected = drafts.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} <= {"embed_tokens", "shared_head"}
