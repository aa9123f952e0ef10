"""byrote's model and transformers' DeepseekV4ForCausalLM are twins: logits, gradients, cached steps, and the published vectors.

Left padding and packed documents have no twin there (its compressors pool across them); tests/model/test_csa.py compares lone documents.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4Config, DynamicCache

from byrote.checkpoint.v4_config import check_expressible, config_from_v4, config_to_v4, ignored_keys
from byrote.checkpoint.v4_names import v4_pieces
from byrote.errors import ConfigError
from byrote.model import csa
from byrote.model.config import MTPConfig
from byrote.model.transformer import Model
from tests.parity.choices import assert_same_choices, choices, joined
from tests.parity.v4_models import VOCAB, published_v4, tiny_v4, twin_of

TWINS = 1e-4  # of the largest value: a whole model there and back, summed in another order
PUBLISHED = {  # position → the first logits and the largest one's place, to the digits given
    0: ((-0.7039, -1.9466, 0.1721, 0.7174, 0.5994), 68),
    5: ((0.7130, -0.3629, -0.3117, 0.2078, -0.5734), 17),
    127: ((-0.1065, -0.3407, -0.7476, 0.5166, 0.6882), 237),
    128: ((0.7308, 1.1354, -0.6478, -1.5461, 1.1901), 231),
    150: ((-0.7240, -0.2538, 0.2919, -0.3250, 1.7992), 139),
    299: ((-1.0122, -0.6019, 1.0169, -0.5070, 0.1991), 44),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "all kinds of blocks": {},
    "window alone": {"compress_ratios": [0, 0], "num_hidden_layers": 2},
    "overlapping groups alone": {"compress_ratios": [4], "num_hidden_layers": 1, "num_hash_layers": 0},
    "groups of 128 alone": {"compress_ratios": [128], "num_hidden_layers": 1},
    "one group of heads, no YaRN, two streams": {"o_groups": 1, "rope_scaling": None, "hc_mult": 2, "num_hash_layers": 4},
    "every channel turns": {"qk_rope_head_dim": 8, "head_dim": 8, "sliding_window": 1},
}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def assert_twins(got: Tensor, want: Tensor, what: str = "logits") -> None:
    assert (got - want).abs().max() <= TWINS * want.abs().max(), what


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_all_gradients_are_the_twins(variant: str, seed: int) -> None:
    theirs = tiny_v4(seed, **VARIANTS[variant])
    ours = twin_of(theirs)
    tokens_BT = tokens(*((3, 7), (1, 261), (2, 133))[seed], seed=seed)
    want_BTV, got_BTV = theirs(tokens_BT).logits, ours(tokens_BT).logits
    assert_twins(got_BTV, want_BTV)
    cotangent_BTV = torch.randn_like(want_BTV)
    (want_BTV * cotangent_BTV).sum().backward()
    (got_BTV * cotangent_BTV).sum().backward()
    assert_same_gradients(ours, theirs)


def assert_same_gradients(ours: Model, theirs: torch.nn.Module) -> None:
    """Parameters without a gradient there (indexers; compressors of texts too short for them) have none, or zero, here."""
    got, want, seen = dict(ours.named_parameters()), dict(theirs.named_parameters()), set()
    largest = max(parameter.grad.abs().max() for parameter in want.values() if parameter.grad is not None)
    for piece in v4_pieces(ours.config, stacked=True):
        if piece.name not in want:  # the router's bias and table are buffers
            continue
        seen.add(piece.name)
        grad, wanted = got[piece.target].grad, want[piece.name].grad
        grad = torch.zeros(()) if grad is None else piece.of(grad)
        wanted = torch.zeros_like(grad) if wanted is None else wanted
        floor = 1e-6 * largest  # terms of a parameter may cancel to nothing
        assert (grad - wanted).abs().max() <= max(TWINS * wanted.abs().max(), floor), piece.name
    assert seen == want.keys()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_real_choice_of_entries_is_the_twins(seed: int) -> None:
    theirs = tiny_v4(seed, index_topk=16, index_n_heads=32)
    ours, tokens_BT = twin_of(theirs), tokens(1, 509, seed=seed)
    with torch.no_grad():
        assert_twins(ours(tokens_BT).logits, theirs(tokens_BT).logits)


def in_pieces(theirs: torch.nn.Module, tokens_BT: Tensor) -> Tensor:
    """Their logits. Read at once, a long text holds gigabytes."""
    cache = DynamicCache(config=theirs.config)
    with torch.no_grad():
        return torch.cat([theirs(piece, past_key_values=cache, use_cache=True).logits for piece in tokens_BT.split(512, dim=1)], dim=1)


@pytest.mark.parametrize("length", [1021, 4096])
def test_long_texts_with_every_entry_chosen_are_the_twins(length: int) -> None:
    theirs = tiny_v4(5)
    ours, tokens_BT = twin_of(theirs), tokens(1, length, seed=5)
    assert theirs.config.index_topk >= length
    with torch.no_grad():
        assert_twins(ours(tokens_BT).logits, in_pieces(theirs, tokens_BT))


def test_choices_and_logits_at_length_4096_are_the_twins() -> None:
    """One block: after a near tie in the first, the second chooses by other numbers."""
    theirs = tiny_v4(6, compress_ratios=[4], num_hidden_layers=1, num_hash_layers=0, index_topk=256)
    ours, tokens_BT = twin_of(theirs), tokens(1, 4096, seed=6)
    with torch.no_grad(), choices(csa, [theirs.model.layers[0].self_attn.compressor.indexer]) as (mine, other):
        got, want = ours(tokens_BT).logits, in_pieces(theirs, tokens_BT)
    differ = assert_same_choices(mine, [joined(other)])
    assert differ <= 4096 // 100
    off_T = (got - want)[0].abs().amax(-1) > TWINS * want.abs().max()
    assert off_T.sum() <= differ


def test_cached_steps_are_the_twins() -> None:
    theirs = tiny_v4(4)
    ours, tokens_BT = twin_of(theirs), tokens(2, 150, seed=4)
    state, cache = ours.new_state(2), DynamicCache(config=theirs.config)
    with torch.no_grad():
        for piece in tokens_BT.split((126, 1, 1, 1, 1, 20), dim=1):
            assert_twins(ours(piece, state=state).logits, theirs(piece, past_key_values=cache, use_cache=True).logits)


def test_the_published_logits_come_out() -> None:
    ours = twin_of(published_v4())
    assert ours.embed.weight[3, :4].tolist() == pytest.approx([1.603086, -0.895391, -0.123508, 0.778396], abs=1e-6)
    tokens_BT = ((37 * torch.arange(300) + 11) % 250 + 3)[None]
    with torch.no_grad():
        logits_TV = ours(tokens_BT).logits[0]
    for position, (first, place) in PUBLISHED.items():
        assert logits_TV[position, :5].tolist() == pytest.approx(first, abs=6e-5)
        assert logits_TV[position].argmax() == place
    assert logits_TV.sum().item() == pytest.approx(30.7182, abs=2e-3)
    assert logits_TV.std().item() == pytest.approx(0.99502, abs=6e-6)
    assert torch.nn.functional.cross_entropy(logits_TV[:-1], tokens_BT[0, 1:]).item() == pytest.approx(5.94806, abs=6e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_configuration_survives_the_way_out_and_back(variant: str) -> None:
    ours = config_from_v4({**tiny_v4(**VARIANTS[variant]).config.to_dict(), "num_nextn_predict_layers": 1})
    assert ours.mtp == MTPConfig(form="streams")
    written = config_to_v4(ours, "float32", 0, 1)
    assert config_from_v4(written) == ours
    assert ignored_keys(written) == []
    again = DeepseekV4Config(**{key: value for key, value in written.items() if key not in ("architectures", "torch_dtype")})
    assert config_from_v4({**again.to_dict(), "num_nextn_predict_layers": 1}) == ours


def test_every_number_has_one_name_in_the_release_and_mtp_too() -> None:
    config = config_from_v4({**tiny_v4().config.to_dict(), "num_nextn_predict_layers": 2})
    state = Model(config).state_dict()
    covered = {name: torch.zeros_like(tensor, dtype=torch.int64) for name, tensor in state.items() if not name.endswith("_extra_state")}
    pieces = v4_pieces(config)
    for piece in pieces:
        piece.of(covered[piece.target]).add_(1)
    assert all((count == 1).all() for count in covered.values())
    assert len({piece.name for piece in pieces}) == len(pieces)
    names = {piece.name for piece in pieces}
    assert {"mtp.1.e_proj.weight", "layers.1.attn.indexer.compressor.ape", "layers.0.ffn.gate.tid2eid", "hc_head_fn"} <= names


def test_what_v4_cannot_say_is_refused() -> None:
    config = config_from_v4({**tiny_v4().config.to_dict(), "num_nextn_predict_layers": 1})
    check_expressible(config)
    with pytest.raises(ConfigError, match="swiglu_limit"):
        check_expressible(replace(config, swiglu_limit=None))
    with pytest.raises(ConfigError, match="streams"):
        check_expressible(replace(config, mtp=MTPConfig()))
    with pytest.raises(ConfigError, match="hidden_act"):
        config_from_v4({**tiny_v4().config.to_dict(), "hidden_act": "gelu"})
    with pytest.raises(ConfigError, match="compress_ratios"):
        config_from_v4({**config_to_v4(config, "float32"), "compress_ratios": [0, 4]})
