"""Sparse attention: all keys chosen is dense attention, documents stand alone, caches agree, and each loss stays where it belongs."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from byrote.kernels.sparse_index import portable
from byrote.model import dsa
from byrote.model.config import DSAConfig, RopeConfig, YarnConfig
from byrote.model.dsa import DSA, hadamard
from byrote.model.state import DecodeState
from byrote.model.transformer import Model
from tests.model.tiny_models import ATTENTION, assert_same_gradients, bare, build, gradients, next_tokens, text, whole
from tests.tolerances import assert_bitwise, assert_close_fp32

LENGTH = 23
SPARSE = DSAConfig(mla=ATTENTION, index_num_heads=16, index_head_dim=8, index_top_k=5)
YARN = RopeConfig(theta=100.0, yarn=YarnConfig(factor=4.0, original_positions=16))
MODELS = {
    "whole": whole(attention=SPARSE, mtp=None),
    "bare": bare(attention=SPARSE),
    "full-rank queries, half layout": bare(
        attention=replace(SPARSE, mla=replace(ATTENTION, q_lora_rank=None, rope=replace(ATTENTION.rope, layout="half")))
    ),
    "yarn, hadamard, fp8": bare(attention=replace(SPARSE, mla=replace(ATTENTION, rope=YARN), index_hadamard=True, index_fp8=True)),
    "one key": bare(attention=replace(SPARSE, index_top_k=1)),
    "beside dense blocks": bare(attention=(ATTENTION, SPARSE, ATTENTION)),
}
every_model = pytest.mark.parametrize("name", MODELS)


def with_top_k(config, top_k: int):
    def changed(attention):
        return replace(attention, index_top_k=top_k) if isinstance(attention, DSAConfig) else attention

    one = config.attention
    return replace(config, attention=tuple(map(changed, one)) if isinstance(one, tuple) else changed(one))


def read(model: Model, tokens_BT: Tensor, cuts: tuple[int, ...], state: DecodeState | None = None, **documents: Tensor) -> Tensor:
    state = model.new_state(len(tokens_BT)) if state is None else state
    borders = (0, *cuts, tokens_BT.shape[1])
    parts = [
        model(tokens_BT[:, a:b], state=state, **{name: one[:, a:b] for name, one in documents.items()}).logits for a, b in pairwise(borders)
    ]
    return torch.cat(parts, dim=1)


def sparsely_always(monkeypatch) -> None:
    """Every call goes through choosing and absorbed attention, even where all keys are chosen."""
    monkeypatch.setattr(dsa, "_all_are_chosen", lambda batch, top_k: False)


# --- twins ------------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_keys_chosen_is_dense_attention_in_values_and_gradients(monkeypatch, name, dtype):
    tokens_BT, cotangent, models = text(2, LENGTH), torch.randn(2, LENGTH, 29, dtype=dtype), []
    document_BT = torch.tensor([[-1] * 3 + [0] * 20, [0] * 9 + [1] * 14])
    for always in (False, True):
        if always:
            sparsely_always(monkeypatch)
        models.append(build(with_top_k(MODELS[name], LENGTH)).to(dtype))
        logits = models[-1](tokens_BT, document_BT=document_BT).logits
        (logits * cotangent).sum().backward()
        models[-1].seen = logits.detach()
    assert_close_fp32(models[1].seen, models[0].seen)
    assert_same_gradients(*models)


def test_dsa_with_all_keys_chosen_is_mla():
    sparse = build(with_top_k(MODELS["bare"], LENGTH))
    dense = Model(bare()).eval()
    weights = {key.replace(".attn.mla.", ".attn."): value for key, value in sparse.state_dict().items() if ".indexer." not in key}
    dense.load_state_dict(weights)
    with torch.no_grad():
        assert_bitwise(sparse(text(2, LENGTH)).logits, dense(text(2, LENGTH)).logits)


@every_model
def test_real_choices_differ_from_dense_attention(name):
    """Else nothing below would test anything."""
    with torch.no_grad():
        sparse, dense = (build(config)(text(2, LENGTH)).logits for config in (MODELS[name], with_top_k(MODELS[name], LENGTH)))
    top_k = 1 if name == "one key" else 5
    assert_close_fp32(sparse[:, :top_k], dense[:, :top_k])
    assert (sparse - dense)[:, top_k + 1 :].abs().amax() > 1e-3 * dense.abs().max()


@every_model
@pytest.mark.parametrize("cuts", [tuple(range(1, LENGTH)), (1, 2, 19), (20,)], ids=["one by one", "mixed", "long then short"])
def test_any_chunking_equals_the_whole(name, cuts):
    model, tokens_BT = build(MODELS[name]), text(2, LENGTH)
    document_BT = torch.tensor([[-1] * 2 + [0] * 21, [0] * 9 + [1] * 14])
    with torch.no_grad():
        for documents in ({}, {"document_BT": document_BT}):
            assert_close_fp32(read(model, tokens_BT, cuts, **documents), model(tokens_BT, **documents).logits)


@every_model
def test_packed_padded_and_lone_documents_are_the_same(name):
    model, lengths = build(MODELS[name]), (9, 1, 13)
    texts = [text(1, length, seed=length) for length in lengths]
    packed = torch.cat(texts, dim=1)
    document_BT = torch.cat([torch.full((1, length), number) for number, length in enumerate(lengths)], dim=1)
    with torch.no_grad():
        alone = torch.cat([model(one).logits for one in texts], dim=1)
        assert_close_fp32(model(packed, document_BT=document_BT).logits, alone)
        padded = torch.cat((text(1, 4, seed=99), texts[2]), dim=1)
        got = model(padded, document_BT=torch.tensor([[-1] * 4 + [0] * 13])).logits
        assert_close_fp32(got[:, 4:], alone[:, -13:])


@every_model
@pytest.mark.parametrize("place", [0, 11, 22])
def test_no_token_moves_a_logit_before_it(name, place):
    model, tokens_BT = build(MODELS[name]), text(1, LENGTH)
    other = tokens_BT.clone()
    other[0, place] = (other[0, place] + 1) % 29
    with torch.no_grad():
        before, after = model(tokens_BT).logits, model(other).logits
    assert_close_fp32(after[:, :place], before[:, :place])
    assert (after - before)[:, place].abs().max() > 1e-3


def test_rolled_back_restored_and_selected_texts_go_on_as_if_nothing_had_happened():
    model, right, wrong = build(MODELS["whole"]), text(2, LENGTH), text(2, LENGTH, seed=1)
    with torch.no_grad():
        want, state = read(model, right, (9, 10)), model.new_state(2)
        model(right[:, :9], state=state)
        model(wrong[:, :7], state=state)
        state.rollback(7)
        assert_bitwise(read(model, right[:, 9:], (1,), state), want[:, 9:])
        state = model.new_state(2)
        model(right[:, :9], state=state)
        snapshot = state.snapshot()
        model(wrong[:, :14], state=state)
        state.restore(snapshot)
        state.select(torch.tensor([1, 0, 1]))
        assert_close_fp32(read(model, right[[1, 0, 1], 9:], (1,), state), want[[1, 0, 1], 9:])


def test_the_cache_holds_latents_rotary_keys_and_index_keys():
    state = build(MODELS["bare"]).new_state(2)
    shapes = {key: part.values.shape[2:] for key, part in state.caches[0].parts.items()}
    assert shapes == {"latents": (ATTENTION.kv_lora_rank + ATTENTION.qk_rope_head_dim,), "index": (8,)}


def test_a_state_in_bf16_stays_close():
    model, tokens_BT = build(MODELS["whole"]), text(1, LENGTH)
    with torch.no_grad():
        got = read(model, tokens_BT, tuple(range(4, LENGTH)), model.new_state(dtype=torch.bfloat16))
        want = model(tokens_BT).logits
    assert ((got - want).abs() < 0.05 * want.abs().max()).float().mean() > 0.9  # a bf16 index key may tip a choice


# --- the indexer ------------------------------------------------------------------------------------------------------


def test_the_hadamard_turn_is_orthogonal_its_own_inverse_and_leaves_every_product():
    x, y = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    assert_close_fp32(hadamard(hadamard(x)), x)
    assert_close_fp32((hadamard(x) * hadamard(y)).sum(-1), (x * y).sum(-1))
    square = hadamard(torch.eye(8)) * 8**0.5
    assert_close_fp32(square.abs(), torch.ones(8, 8))
    assert_close_fp32(square @ square.T, 8 * torch.eye(8))


def test_the_hadamard_turn_alone_changes_no_logit():
    models = [build(bare(attention=replace(SPARSE, index_hadamard=turned))) for turned in (False, True)]
    with torch.no_grad():
        assert_close_fp32(models[1](text(2, LENGTH)).logits, models[0](text(2, LENGTH)).logits)


def test_scores_are_those_of_the_equation_with_half_layout_and_a_layer_norm():
    """By hand, one token at a time, whatever MLA's own layout is."""
    model, tokens_BT = build(MODELS["bare"]), text(1, 7)
    attention, noted = model.blocks[0].attn, {}
    attention.indexer.register_forward_hook(lambda module, args, out: noted.update(x=args[0][0], source=args[1][0], parts=out))
    with torch.no_grad():
        model(tokens_BT)
        indexer, (q_TJI, k_TI, weight_TJ) = attention.indexer, (part[0] for part in noted["parts"])
        frequencies = 10_000.0 ** -(torch.arange(2) / 2)
        for t in range(7):
            turn = partial(turned_in_halves, angles=t * frequencies)
            k = indexer.k.weight @ noted["x"][t]
            k = (k - k.mean()) / (k.var(unbiased=False) + 1e-6).sqrt() * indexer.k_norm.weight + indexer.k_norm.bias
            assert_close_fp32(k_TI[t], turn(k))
            assert_close_fp32(q_TJI[t], turn((indexer.q_b.weight @ noted["source"][t]).view(16, 8)))
            assert_close_fp32(weight_TJ[t], indexer.weights.weight @ noted["x"][t] / (16 * 8) ** 0.5)


def turned_in_halves(v: Tensor, angles: Tensor) -> Tensor:
    """The first four channels, pairs (0, 2) and (1, 3)."""
    a, b, still = v.split((2, 2, 4), dim=-1)
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos(), still), -1)


# --- what learns from what --------------------------------------------------------------------------------------------


def losses(config, stage: str, **documents: Tensor) -> tuple[Model, dict[str, Tensor]]:
    model, tokens_BT = build(config).train(), text(2, LENGTH)
    for attention in attentions(model):
        attention.stage = stage
    return model, model(tokens_BT, targets_BT=next_tokens(tokens_BT, documents.get("document_BT")), **documents).losses


def attentions(model: Model) -> list[DSA]:
    return [module for module in model.modules() if isinstance(module, DSA)]


@pytest.mark.parametrize("stage", ["sparse", "dense_warmup"])
@pytest.mark.parametrize("config", [whole(attention=SPARSE), MODELS["yarn, hadamard, fp8"]], ids=["whole with MTP", "hadamard, fp8"])
def test_the_language_model_teaches_no_indexer_and_the_indexers_loss_nothing_else(config, stage):
    model, terms = losses(config, stage)
    sum(loss for name, loss in terms.items() if name != "indexer").backward(retain_graph=True)
    others = {name for name, _ in model.named_parameters() if ".indexer." not in name}
    assert gradients(model).keys() == others
    model.zero_grad()
    terms["indexer"].backward()
    taught = gradients(model)
    assert taught.keys() == {name for name, _ in model.named_parameters()} - others
    assert all(grad.any() for grad in taught.values())


def test_in_the_dense_stage_the_indexer_is_not_asked():
    model, terms = losses(MODELS["bare"], "dense")
    assert "indexer" not in terms
    sum(terms.values()).backward()
    assert not any(".indexer." in name for name in gradients(model))


@pytest.mark.parametrize("stage", ["dense", "dense_warmup"])
def test_before_the_sparse_stage_attention_is_dense(stage):
    model, dense = build(MODELS["whole"]), build(with_top_k(MODELS["whole"], LENGTH))
    for attention in attentions(model):
        attention.stage = stage
    with torch.no_grad():
        assert_bitwise(model(text(2, LENGTH)).logits, dense(text(2, LENGTH)).logits)
        assert_close_fp32(read(model, text(2, LENGTH), (3, 4, 20)), dense(text(2, LENGTH)).logits)


@pytest.mark.parametrize("stage", ["sparse", "dense_warmup"])
def test_the_indexers_loss_is_the_mean_divergence_over_what_it_may_choose(stage):
    """Against plain softmaxes of full score matrices, documents and padding included."""
    config = MODELS["bare"]
    document_BT = torch.tensor([[-1] * 3 + [0] * 20, [0] * 9 + [1] * 14])
    noted = []
    model = build(config).train()
    for attention in attentions(model):
        attention.stage = stage
        attention.register_forward_hook(lambda module, args, out: noted.append((module, args[0], args[1], out[1]["indexer"])))
    model(text(2, LENGTH), document_BT=document_BT, targets_BT=next_tokens(text(2, LENGTH), document_BT))
    for module, x_BTD, batch, loss in noted:
        assert_close_fp32(loss, plain_divergence(module, x_BTD, batch, document_BT, 5 if stage == "sparse" else LENGTH))
    assert len(noted) == config.num_layers


def plain_divergence(module: DSA, x_BTD: Tensor, batch, document_BT: Tensor, top_k: int) -> Tensor:
    new = module.mla.project(x_BTD)
    q, k, weight = module.indexer(x_BTD, new.source_BTQ, batch)
    scores = torch.einsum("btj,btjs->bts", weight, torch.einsum("btji,bsi->btjs", q, k).relu())
    seen = (document_BT[:, :, None] == document_BT[:, None]) & (document_BT >= 0)[:, :, None] & torch.ones(LENGTH, LENGTH).tril().bool()
    scores = scores.masked_fill(~seen, float("-inf"))
    last = scores.topk(top_k, -1).values[..., -1:]
    seen = seen & (scores >= last)
    query, kept = module.mla.absorb(new, batch)
    p = torch.softmax((torch.einsum("bthx,bsx->bths", query, kept) * module.mla.scale).masked_fill(~seen[:, :, None], float("-inf")), -1)
    p = p.sum(2) / p.sum((2, 3), keepdim=False)[..., None]
    terms = torch.special.xlogy(p, p) - p * torch.log_softmax(scores.masked_fill(~seen, float("-inf")), -1).masked_fill(~seen, 0.0)
    return terms[document_BT >= 0].sum(-1).mean()


def test_evaluation_and_decoding_compute_no_loss_of_the_indexer():
    model = build(MODELS["bare"])
    assert "indexer" not in model(text(2, LENGTH), targets_BT=next_tokens(text(2, LENGTH))).losses
    model.train()
    with torch.no_grad():
        assert "indexer" not in model(text(2, LENGTH), targets_BT=next_tokens(text(2, LENGTH))).losses


def test_under_autocast_the_indexer_learns_too():
    model, tokens_BT = build(MODELS["whole"]).train(), text(2, LENGTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = model(tokens_BT, targets_BT=next_tokens(tokens_BT)).losses
    sum(terms.values()).backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    assert any(".indexer." in name and grad.any() for name, grad in gradients(model).items())


def test_dense_blocks_may_stand_beside_sparse_ones():
    model = build(MODELS["beside dense blocks"]).train()
    assert len(attentions(model)) == 1
    assert "indexer" in model(text(2, LENGTH), targets_BT=next_tokens(text(2, LENGTH))).losses


@pytest.mark.parametrize("name", ["bare", "full-rank queries, half layout"])
def test_training_and_prefill_hold_nothing_of_the_texts_length_squared(name, monkeypatch):
    """Every tensor a step makes grows with length · a constant: no [T, T], no [H, T, T]."""
    monkeypatch.setattr(portable, "BLOCK_NUMBERS", 1 << 15)
    length, made = 2048, []
    model, tokens_BT = build(replace(MODELS[name], num_layers=1)).train(), text(1, length)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(part.numel() for part in (out if isinstance(out, tuple | list) else [out]) if isinstance(part, Tensor))
            return out

    with Watch():
        sum(model(tokens_BT, targets_BT=next_tokens(tokens_BT), document_BT=torch.zeros_like(tokens_BT)).losses.values()).backward()
    assert max(made) < length * length / 8
