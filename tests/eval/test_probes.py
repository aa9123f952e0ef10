"""Looks inside a model: each number against its definition, and the model is the same afterwards."""

import math
from dataclasses import replace

import pytest
import torch

from byrote.eval.probes import composite_gain, expert_loads, index_recall, memory_gates, memory_silenced, mtp_acceptance
from byrote.model.config import DSAConfig
from byrote.model.transformer import Model
from tests.model.tiny_models import ATTENTION, ENGRAM, MOE, RESIDUALS, bare, build, next_tokens, text, whole
from tests.tolerances import assert_bitwise, assert_close_fp32

LINES = [text(1, length, seed=length)[0].tolist() for length in (17, 2, 9)]


def logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model(text(1, 9)).logits


def test_silenced_memory_reads_as_zeros_and_comes_back():
    model, zero = build(whole()), build(whole())
    zero.memory.store.vectors_NE.zero_()
    before, digest = logits(model), model.get_extra_state()
    with memory_silenced(model):
        assert_bitwise(logits(model), logits(zero))
        state = model.new_state()
        with torch.no_grad():
            assert_close_fp32(model(text(1, 9), state=state).logits, logits(zero))
    assert_bitwise(logits(model), before)
    assert_bitwise(model.get_extra_state(), digest)


def test_silenced_memory_comes_back_after_an_error():
    model = build(whole())
    memory = model.memory
    with pytest.raises(KeyError), memory_silenced(model):
        raise KeyError
    assert model.memory is memory


def test_a_model_without_memory_can_be_silenced_all_the_same():
    model = build(bare())
    with memory_silenced(model):
        assert_bitwise(logits(model), logits(build(bare())))


def test_gates_are_those_of_every_layer_and_stream():
    model = build(whole())
    gates_TLR = memory_gates(model, LINES[0])
    want = model(torch.tensor([LINES[0]]), want=("gates",)).extras["gates"]
    assert gates_TLR.shape == (17, len(ENGRAM.layers), RESIDUALS["mhc"].streams)
    assert_close_fp32(gates_TLR, torch.stack([gate[0].detach() for gate in want], dim=1))
    assert ((gates_TLR > 0) & (gates_TLR < 1)).all()


def test_composite_gain_multiplies_the_mixes_in_order_and_averages_over_tokens():
    model = build(bare(residual=RESIDUALS["hc"]))
    mixes, plain = [], {}
    sites = [site for block in model.blocks for site in (block.attn_site, block.ffn_site)]
    for site in sites:
        plain[site] = site.enter
        site.__dict__["enter"] = lambda streams, site=site: (entered := plain[site](streams), mixes.append(entered[1][1][0]))[0]
    logits(model)
    for site in sites:
        del site.__dict__["enter"]
    gains = composite_gain(model, text(1, 9)[0].tolist())
    assert [gain.sites for gain in gains] == [1, 2, 3, 4, 5, 6]
    for token_gains, count in ((gains[0], 1), (gains[-1], 6)):
        rows, columns = [], []
        for token in range(9):
            composite = torch.eye(2)
            for mix in mixes[:count]:
                composite = mix[token].T @ composite
            rows.append(composite.abs().sum(1).max())
            columns.append(composite.abs().sum(0).max())
        assert token_gains.forward == pytest.approx(torch.stack(rows).mean().item(), rel=1e-5)
        assert token_gains.backward == pytest.approx(torch.stack(columns).mean().item(), rel=1e-5)


def test_manifold_mixing_amplifies_nothing_and_free_mixing_may():
    bounded = composite_gain(build(bare(residual=RESIDUALS["mhc"])), LINES[0])
    assert all(abs(gain.forward - 1) < 1e-3 and abs(gain.backward - 1) < 0.05 for gain in bounded)
    wild = build(bare(residual=RESIDUALS["hc"]))
    for block in wild.blocks:
        block.attn_site.base_res.data.fill_(1.5)
    assert composite_gain(wild, LINES[0])[-1].forward > 3
    assert composite_gain(build(bare()), LINES[0]) == []


def test_sites_are_as_before_even_after_an_error():
    model = build(whole())
    before = logits(model)
    composite_gain(model, LINES[0])
    with pytest.raises(Exception, match="span"):
        composite_gain(model, [99])
    assert not any("enter" in site.__dict__ for block in model.blocks for site in (block.attn_site, block.ffn_site))
    assert_bitwise(logits(model), before)


def test_expert_loads_are_shares_of_all_lines_together():
    model = build(whole(mtp=None))
    loads = expert_loads(model, LINES)
    counted = {name: torch.zeros(MOE.num_experts) for name in ("blocks.1.ffn", "blocks.2.ffn")}
    for line in LINES:
        for name, experts in zip(counted, model(torch.tensor([line]), want=("router",)).extras["router"], strict=True):
            counted[name] += torch.bincount(experts.flatten(), minlength=MOE.num_experts)
    assert loads.keys() == counted.keys()
    for name, shares in loads.items():
        assert shares == pytest.approx((counted[name] / counted[name].mean()).tolist())
        assert sum(shares) == pytest.approx(MOE.num_experts)
    assert expert_loads(build(bare()), LINES) == {}


def test_acceptance_counts_guesses_that_the_model_itself_would_make():
    model = build(whole())
    hits, asked = [0, 0], [0, 0]
    for line in LINES:
        tokens = torch.tensor([line])
        out = model(tokens, targets_BT=next_tokens(tokens), want=("hidden", "mtp_logits"))
        says = model.head(out.extras["hidden"])[0].argmax(-1).tolist()
        guesses = [logits_BTV[0].argmax(-1).tolist() for logits_BTV in out.extras["mtp_logits"]]
        for depth in (0, 1):
            for i in range(len(line) - 1 - depth):
                asked[depth] += 1
                hits[depth] += all(guesses[shallower][i] == says[i + 1 + shallower] for shallower in range(depth + 1))
    assert mtp_acceptance(model, LINES) == pytest.approx([hit / count for hit, count in zip(hits, asked, strict=True)])


def test_a_module_that_says_what_the_model_says_is_always_accepted():
    """Head and embedding that make every prediction the same token."""
    model = build(bare(mtp=whole().mtp))
    with torch.no_grad():
        model.head.weight.zero_()
    assert mtp_acceptance(model, LINES) == [1.0, 1.0]
    assert mtp_acceptance(model, [[3]]) == [0.0, 0.0], "a line too short to ask"
    assert mtp_acceptance(build(bare()), LINES) == []


@pytest.mark.parametrize("training", [True, False])
def test_probes_leave_mode_weights_and_gradients_alone(training):
    model = build(whole()).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    memory_gates(model, LINES[0])
    composite_gain(model, LINES[0])
    expert_loads(model, LINES)
    mtp_acceptance(model, LINES)
    assert all(module.training == training for module in model.modules())
    assert all(param.grad is None for param in model.parameters())
    for name, tensor in model.state_dict().items():
        assert_bitwise(tensor, before[name])


def test_a_hard_gate_shows_as_open_or_shut():
    gates = memory_gates(build(whole(engram=replace(ENGRAM, gate="hard"))), LINES[0])
    assert set(gates.unique().tolist()) <= {0.0, 1.0}


SPARSE = DSAConfig(mla=ATTENTION, index_num_heads=16, index_head_dim=8, index_top_k=5)


def test_the_recall_of_an_index_is_the_share_of_attention_that_its_choice_would_get():
    """Against full matrices of one text."""
    model, ids = build(bare(attention=(ATTENTION, SPARSE, ATTENTION))), text(1, 90)[0].tolist()
    noted = {}
    handle = model.blocks[1].attn.register_forward_pre_hook(lambda module, args: noted.update(x=args[0], batch=args[1]))
    recall = index_recall(model, [ids])
    handle.remove()
    attention = model.blocks[1].attn
    with torch.no_grad():
        new = attention.mla.project(noted["x"])
        q, k, weight = (part[0] for part in attention.indexer(noted["x"], new.source_BTQ, noted["batch"]))
        scores = torch.einsum("tj,tjs->ts", weight, torch.einsum("tji,si->tjs", q, k).relu())
        query, kept = (part[0] for part in attention.mla.absorb(new, noted["batch"]))
        paid = torch.einsum("thx,sx->ths", query, kept) * attention.mla.scale
    shares = []
    for t in range(5, 90):
        mass = torch.softmax(paid[t, :, : t + 1], -1).sum(0)
        shares.append(mass[scores[t, : t + 1].topk(5).indices].sum() / mass.topk(5).values.sum())
    assert recall.keys() == {"blocks.1"}
    assert abs(recall["blocks.1"] - torch.stack(shares).mean().item()) < 1e-5
    assert 0.1 < recall["blocks.1"] < 0.95


def test_an_index_that_may_choose_all_but_one_misses_little_and_without_a_choice_there_is_no_recall():
    model, ids = build(bare(attention=replace(SPARSE, index_top_k=22))), text(1, 23)[0].tolist()
    assert all(0.9 < share <= 1.0 for share in index_recall(model, [ids]).values())
    assert all(math.isnan(share) for share in index_recall(model, [ids[:22]]).values())
    assert index_recall(build(bare()), [ids]) == {}


def test_looking_at_an_index_changes_nothing_in_the_model():
    model, ids = build(bare(attention=SPARSE)).train(), text(1, 40)
    before = model(ids).logits
    index_recall(model, [ids[0].tolist()])
    assert model.training and torch.equal(model(ids).logits, before)
