"""Memory in the model: what it adds, what it hears, and what it is without."""

from dataclasses import replace

import pytest
import torch

from byrote.errors import CheckpointError, ConfigError
from byrote.kernels.engram_gate import gate
from byrote.model.config import EngramConfig
from byrote.model.transformer import Model
from tests.model.tiny_models import ENGRAM, VOCAB, bare, build, gradients, text, whole
from tests.tolerances import assert_bitwise, assert_close_fp32

GATE_TABLE = {
    -4.0: 0.119203,
    -1.0: 0.268941,
    -0.25: 0.377541,
    -1e-8: 0.499750,
    0.0: 0.5,
    1e-8: 0.500250,
    0.25: 0.622459,
    1.0: 0.731059,
    4.0: 0.880797,
}


def without_memory(model: Model) -> Model:
    """The same weights in a model that has no memory."""
    twin = Model(replace(model.config, engram=None)).eval()
    kept = {name: tensor for name, tensor in model.state_dict().items() if ".engram." not in name and name != "_extra_state"}
    twin.load_state_dict(kept | {"_extra_state": torch.zeros(1, dtype=torch.int64)})
    return twin


@pytest.mark.parametrize("score", GATE_TABLE)
def test_the_gate_has_the_published_values(score):
    """A width of 16 and parallel vectors make any score up to 4; the rest comes from the gain."""
    streams, keys = torch.ones(1, 1, 16), torch.ones(1, 1, 16)
    alpha = gate(streams, keys, torch.full((1, 16), score / 4), eps=1e-20)
    assert alpha.item() == pytest.approx(GATE_TABLE[score], abs=1e-6)


@pytest.mark.parametrize("gate_kind", ["soft", "hard"])
def test_memory_of_zeros_is_no_memory(gate_kind):
    model = build(whole(engram=replace(ENGRAM, gate=gate_kind)))
    model.memory.store.vectors_NE.zero_()
    with torch.no_grad():
        assert_bitwise(model(text(2, 17)).logits, without_memory(model)(text(2, 17)).logits)


def test_memory_speaks_where_it_stands_and_only_there():
    model = build(whole())
    with torch.no_grad():
        both = model(text(1, 9)).logits
        for layer in ENGRAM.layers:
            silenced = build(whole())
            silenced.blocks[layer].engram.value.weight.data.zero_()
            assert (silenced(text(1, 9)).logits - both).abs().max() > 1e-3
    assert [block.engram is not None for block in model.blocks] == [True, False, True]
    assert all(module.block.engram is None for module in model.mtp)


def test_zero_taps_leave_the_gated_value_alone():
    """Y = Ṽ: a fresh convolution, which starts at zero, and none at all give the same model."""
    fresh, none = Model(whole()), Model(whole(engram=replace(ENGRAM, conv_kernel=0)))
    weights = fresh.state_dict()
    none.load_state_dict({name: weights[name] for name in none.state_dict()})
    with torch.no_grad():
        assert_bitwise(fresh.eval()(text(1, 17)).logits, none.eval()(text(1, 17)).logits)


def test_the_convolution_hears_0_3_6_and_9_tokens_back():
    """One memory layer, last in a model whose attention is silent: what row a token reads reaches just those positions."""
    length, at = 20, 5
    model = build(bare(num_layers=1, engram=replace(ENGRAM, layers=(0,))))
    model.blocks[0].attn.o.weight.data.zero_()
    rows = model.memory.fetch(text(1, length))
    with torch.no_grad():
        before = model(text(1, length), rows=rows).logits
        vectors_NE = torch.cat((rows.vectors_UE, torch.randn(1, 3)))
        inverse_BTLN = rows.inverse_BTLN.clone()
        inverse_BTLN[0, at] = len(rows.vectors_UE)  # this token alone reads something else
        after = model(text(1, length), rows=rows._replace(vectors_UE=vectors_NE, inverse_BTLN=inverse_BTLN)).logits
    changed = (after - before).abs().amax(-1)[0] > 1e-7
    assert changed.nonzero().flatten().tolist() == [at, at + 3, at + 6, at + 9]


def test_a_token_changes_the_next_n_grams_and_what_the_convolution_makes_of_them():
    length, at = 24, 6
    model = build(bare(num_layers=1, engram=replace(ENGRAM, layers=(0,))))
    model.blocks[0].attn.o.weight.data.zero_()
    text_BT = text(1, length)
    other = text_BT.clone()
    other[0, at] = (other[0, at] + 1) % VOCAB
    with torch.no_grad():
        rows = model.memory.fetch(other)
        changed = (model(text_BT, rows=rows).logits - model(text_BT).logits).abs().amax(-1)[0] > 1e-7
    reached = changed.nonzero().flatten()
    assert reached.min() == at and reached.max() <= at + (ENGRAM.max_order - 1) + 9
    assert (model.memory.global_rows(other) != model.memory.global_rows(text_BT)).flatten(2).any(-1)[0].nonzero().flatten().tolist() == [
        6,
        7,
        8,
    ]


def test_a_hard_gate_is_zero_or_one_and_learns_like_the_soft_one():
    soft, hard = build(whole()), build(whole(engram=replace(ENGRAM, gate="hard")))
    gates = {}
    for name, model in (("soft", soft), ("hard", hard)):
        gates[name] = model(text(2, 17), want=("gates",)).extras["gates"]
    assert len(gates["hard"]) == 2 and gates["hard"][0].shape == (2, 17, 3)
    for alpha in gates["hard"]:
        assert set(alpha.unique().tolist()) == {0.0, 1.0}
    assert_bitwise((gates["soft"][0] > 0.5).float(), gates["hard"][0].detach())
    pulls = [
        torch.autograd.grad(gates[name][0].sum(), model.blocks[0].engram.key.weight)[0] for name, model in (("soft", soft), ("hard", hard))
    ]
    assert_close_fp32(pulls[1], pulls[0])
    assert pulls[0].abs().max() > 0


def test_only_rows_that_were_read_have_a_gradient_and_every_weight_of_the_layer_learns():
    model = build(whole())
    out = model(text(2, 9), targets_BT=text(2, 9, seed=1))
    out.losses["next_token"].backward()
    assert out.rows.vectors_UE.grad.shape == (len(out.rows.rows_U), ENGRAM.head_dim)
    assert (out.rows.vectors_UE.grad.abs().amax(1) > 0).all()
    learnt = gradients(model)
    assert all(learnt[name].abs().max() > 0 for name, _ in model.named_parameters() if ".engram." in name)


def test_hash_ids_change_the_rows_read_and_nothing_else():
    assert whole(engram=replace(ENGRAM, hash_layer_ids=(1, 3))).engram.hash_ids == (1, 3)
    assert ENGRAM.hash_ids == ENGRAM.layers
    plain, shifted = (Model(whole(engram=replace(ENGRAM, hash_layer_ids=ids))) for ids in (None, (1, 3)))
    assert plain.memory.hash.num_rows == shifted.memory.hash.num_rows
    assert not torch.equal(plain.memory.global_rows(text(1, 9)), shifted.memory.global_rows(text(1, 9)))


def test_a_state_dict_carries_a_marker_that_notices_a_lost_table():
    model, other = Model(whole()), Model(whole(), seed=1)
    assert not any("memory" in name for name in model.state_dict())
    Model(whole()).load_state_dict(model.state_dict())
    with pytest.raises(CheckpointError, match=r"other memory rows.*byrote\.load"):
        other.load_state_dict(model.state_dict())
    trained = Model(whole())
    trained.memory.store.vectors_NE[7, 1] += 1
    with pytest.raises(CheckpointError):
        Model(whole()).load_state_dict(trained.state_dict())


def test_a_compressed_model_waits_for_its_map():
    model = Model(whole(engram=replace(ENGRAM, canonical_vocab=7))).eval()
    with pytest.raises(ConfigError, match="set_canonical"):
        model(text(1, 3))
    model.memory.set_canonical(torch.arange(VOCAB) % 7)
    assert model(text(1, 3)).logits.isfinite().all()


def test_rows_for_other_tokens_or_for_no_memory_are_refused():
    model = build(whole())
    rows = model.memory.fetch(text(1, 5))
    with pytest.raises(ConfigError, match=r"what memory\.fetch returned"):
        model(text(1, 6), rows=rows)
    with pytest.raises(ConfigError, match="without memory"):
        build(bare())(text(1, 5), rows=rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ()}, "at least one block"),
        ({"layers": (1, 1)}, "each once"),
        ({"max_order": 1}, "order 2"),
        ({"gate": "open"}, "soft, hard"),
        ({"table_dtype": "float16"}, "bfloat16"),
        ({"hash_layer_ids": (1,)}, "one id per layer"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"head_dim": -1}, "head_dim is -1"),
        ({"conv_kernel": -1}, "leaves the convolution out"),
        ({"conv_dilation": 0}, "conv_dilation is 0"),
    ],
)
def test_memory_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(ENGRAM, **changes)


def test_memory_must_stand_in_blocks_that_exist_and_pad_with_a_token_that_does():
    with pytest.raises(ConfigError, match=r"block \[3\].*0\.\.2"):
        whole(engram=EngramConfig(layers=(3,), rows_per_order=9, head_dim=1))
    with pytest.raises(ConfigError, match="pad_token is 29"):
        whole(engram=replace(ENGRAM, pad_token=VOCAB))
