"""byrote's model and transformers' DeepseekV32ForCausalLM are twins: with every key chosen, and with a real choice.

Between keys whose scores agree to 1e-5 no choice is wrong, and such a choice moves logits. So where there is a real choice the
chosen sets are compared first: they may differ by such keys only, which is rare, and with the seeds used here happens at length 4096 alone.
"""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from byrote.checkpoint.huggingface import from_transformers, to_transformers
from byrote.checkpoint.v32_names import v32_pieces
from byrote.model import dsa
from byrote.model.transformer import Model
from tests.parity.choices import assert_same_choices, choices, joined
from tests.parity.v32_models import VARIANTS, tiny_v32
from tests.tolerances import assert_bitwise, assert_close_fp32

WHOLE = 1e-4  # of the largest: a whole model, or its gradient, summed in another order


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 53, shape, generator=torch.Generator().manual_seed(seed))


def indexers(theirs: torch.nn.Module) -> list[torch.nn.Module]:
    return [layer.self_attn.indexer for layer in theirs.model.layers]


def assert_whole(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() <= WHOLE * want.abs().max()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("top_k", [7, 64], ids=["a real choice", "every key"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_all_gradients_are_the_twins(variant: str, top_k: int, seed: int) -> None:
    theirs = tiny_v32(seed, **{"index_topk": top_k} | VARIANTS[variant])
    ours = from_transformers(theirs)
    tokens_BT = tokens(*((3, 17), (1, 8), (2, 33))[seed], seed=seed)
    with choices(dsa, indexers(theirs)) as (mine, other):
        want_BTV, got_BTV = theirs(tokens_BT).logits, ours(tokens_BT).logits
    assert len(mine) == (ours.config.num_layers if tokens_BT.shape[1] > top_k else 0)
    assert assert_same_choices(mine, other if mine else []) == 0
    assert_whole(got_BTV, want_BTV)
    cotangent_BTV = torch.randn_like(want_BTV)
    (want_BTV * cotangent_BTV).sum().backward()
    (got_BTV * cotangent_BTV).sum().backward()
    assert_same_gradients(ours, theirs)


def assert_same_gradients(ours: Model, theirs: torch.nn.Module) -> None:
    """The indexer has none on either side: the language-model loss does not reach it."""
    got, want = dict(ours.named_parameters()), dict(theirs.named_parameters())
    seen = set()
    for piece in v32_pieces(ours.config, stacked=True):
        if piece.name not in want:  # the router's bias is a buffer
            assert piece.target.endswith(".bias")
            continue
        seen.add(piece.name)
        if ".indexer." in piece.name:
            assert got[piece.target].grad is None and want[piece.name].grad is None
            continue
        assert_whole(piece.of(got[piece.target].grad), want[piece.name].grad)
    assert seen == want.keys()


@pytest.mark.parametrize("length", [257, 512])
def test_long_texts_with_a_real_choice_are_the_twins(length: int) -> None:
    theirs = tiny_v32(5, std=0.2, index_topk=64, max_position_embeddings=length)
    ours, tokens_BT = from_transformers(theirs), tokens(1, length, seed=5)
    with torch.no_grad(), choices(dsa, indexers(theirs)) as (mine, other):
        want, got = theirs(tokens_BT).logits, ours(tokens_BT).logits
    assert assert_same_choices(mine, other) == 0
    assert_whole(got, want)


def test_choices_and_logits_at_length_4096_are_the_twins() -> None:
    """One block: after a near tie in the first, the second chooses by other numbers. Theirs reads in chunks, at once it holds gigabytes."""
    theirs = tiny_v32(6, num_hidden_layers=1, index_topk=256, max_position_embeddings=4096)
    ours, tokens_BT, cache = from_transformers(theirs), tokens(1, 4096, seed=6), DynamicCache(config=theirs.config)
    with torch.no_grad(), choices(dsa, indexers(theirs)) as (mine, other):
        got = ours(tokens_BT).logits
        want = torch.cat([theirs(part, past_key_values=cache, use_cache=True).logits for part in tokens_BT.split(512, 1)], 1)
    differ = assert_same_choices(mine, [joined(other)])
    assert differ <= 4096 // 100
    off_T = (got - want)[0].abs().amax(-1) > WHOLE * want.abs().max()
    assert off_T.sum() <= differ


@pytest.mark.parametrize("variant", ["groups", "yarn"])
def test_cached_steps_and_chunks_are_the_twins(variant: str) -> None:
    theirs = tiny_v32(4, **VARIANTS[variant])
    ours, tokens_BT, start = from_transformers(theirs), tokens(2, 30, seed=4), 0
    state, cache = ours.new_state(2), DynamicCache(config=theirs.config)
    with torch.no_grad():
        for length in (5, 1, 1, 19, 1, 3):
            part_BT = tokens_BT[:, start : start + length]
            start += length
            assert_close_fp32(ours(part_BT, state=state).logits, theirs(part_BT, past_key_values=cache, use_cache=True).logits)


def test_left_padding_is_the_twins() -> None:
    theirs = tiny_v32(6)
    ours, tokens_BT = from_transformers(theirs), tokens(2, 20)
    document_BT = torch.tensor([[-1] * 3 + [0] * 17, [0] * 20])
    real_BT = document_BT >= 0
    with torch.no_grad():
        want = theirs(tokens_BT, attention_mask=real_BT.long()).logits
        assert_close_fp32(ours(tokens_BT, document_BT=document_BT).logits[real_BT], want[real_BT])


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_again_is_bitwise(variant: str) -> None:
    theirs = tiny_v32(3, **VARIANTS[variant])
    ours = from_transformers(theirs)
    back = to_transformers(ours)
    want, got = theirs.state_dict(), back.state_dict()
    assert got.keys() == want.keys()
    for name in want:
        assert_bitwise(got[name], want[name])
    back.set_experts_implementation("eager")
    back.set_attn_implementation("eager")
    with torch.no_grad():
        assert_bitwise(back(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)
    assert from_transformers(back).config == ours.config
