"""Packs on a live model: on, off, exchanged, stacked, mixed; and off again the model is the base, bitwise."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from byrote.errors import MemoryPackError, RequestError
from byrote.model.config import EngramConfig
from byrote.model.pack import Pack, PackFacts, attach, base_fingerprint, detach, new_pack, own_memory, swap
from byrote.model.transformer import Model
from tests.model.tiny_models import ENGRAM, VOCAB, build, next_tokens, text, whole
from tests.tolerances import assert_bitwise, assert_close_bf16, assert_close_fp32

BASE = whole(engram=None)
OTHER_HASH = EngramConfig(layers=(1,), rows_per_order=31, head_dim=4, num_heads=3, max_order=2, hash_seed=3, gate="hard", table_std=0.5)


def facts(model: Model, name: str = "A", **changes: str) -> PackFacts:
    return PackFacts(**({"name": name, "tokenizer": "a" * 64, "base": base_fingerprint(model)} | changes))


def pack_for(model: Model, name: str = "A", *, config: EngramConfig = ENGRAM, seed: int = 1, **changes: str) -> Pack:
    """A memory that changes every output: nothing of it is zero."""
    size = {"dim": model.config.dim, "streams": model.config.residual.streams, "vocab_size": VOCAB}
    pack = new_pack(config, **size, init_std=0.2, seed=seed, facts=facts(model, name, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pack.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return pack


def logits(model: Model, tokens_BT: Tensor, **how: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens_BT, **how).logits


def test_base_a_base_b_base_is_the_base_bitwise() -> None:
    model, tokens_BT = build(BASE), text(3, 13)
    base, state = logits(model, tokens_BT), model.state_dict()
    attach(model, pack_for(model))
    with_a = logits(model, tokens_BT)
    detach(model, "A")
    assert_bitwise(logits(model, tokens_BT), base)
    attach(model, pack_for(model, "B", config=OTHER_HASH))
    with_b = logits(model, tokens_BT)
    detach(model, "B")
    assert_bitwise(logits(model, tokens_BT), base)
    assert not torch.allclose(with_a, base) and not torch.allclose(with_b, base) and not torch.allclose(with_a, with_b)
    assert model.state_dict().keys() == state.keys() and not model.packs
    for name, tensor in model.state_dict().items():
        assert_bitwise(tensor, state[name])


def test_swapping_is_detaching_and_attaching_in_its_place() -> None:
    model, tokens_BT = build(BASE), text(2, 9)
    a, b, c = (pack_for(model, name, seed=seed) for name, seed in (("A", 1), ("B", 2), ("C", 3)))
    attach(model, a)
    attach(model, b)
    assert swap(model, "A", c) == (a, "C") and list(model.packs) == ["C", "B"]
    swapped = logits(model, tokens_BT)
    twin = build(BASE)
    attach(twin, c)
    attach(twin, b)
    assert_bitwise(swapped, logits(twin, tokens_BT))


def test_attached_packs_do_not_show_in_parameters_or_state() -> None:
    model = build(BASE)
    before = [name for name, _ in model.named_parameters()]
    attach(model, pack_for(model))
    assert [name for name, _ in model.named_parameters()] == before == list(model.param_roles())


def test_a_pack_with_zero_rows_changes_nothing_bitwise() -> None:
    model, tokens_BT = build(BASE), text(2, 9)
    base = logits(model, tokens_BT)
    attach(model, pack_for(model, config=replace(ENGRAM, table_std=0.0)))
    assert_bitwise(logits(model, tokens_BT), base)


@pytest.mark.parametrize("residual", ["mhc", "hc", "plain"])
def test_the_memory_of_a_model_taken_off_and_put_back_is_the_model_bitwise(residual: str) -> None:
    from tests.model.tiny_models import RESIDUALS

    model, tokens_BT = build(whole(residual=RESIDUALS[residual])), text(3, 13)
    before = logits(model, tokens_BT)
    shared = own_memory(model, facts(model))
    assert_bitwise(logits(model, tokens_BT), before)
    pack = own_memory(model, facts(model), take_off=True)
    silent = logits(model, tokens_BT)
    assert not torch.allclose(silent, before) and model.memory is None and model.config.engram is None
    assert shared.facts.base == base_fingerprint(model), "memory is no part of the base"
    attach(model, pack)
    assert_bitwise(logits(model, tokens_BT), before)
    detach(model, "A")
    assert_bitwise(logits(model, tokens_BT), silent)


def test_stacked_packs_speak_one_after_the_other_in_each_block() -> None:
    model, tokens_BT = build(BASE), text(2, 7)
    a, b = pack_for(model), pack_for(model, "B", config=replace(OTHER_HASH, layers=(0,)))
    attach(model, a)
    attach(model, b)
    batch = model._batch(tokens_BT, None, None, None, None, None)
    streams = torch.randn(2, 7, 3, 16)
    spoken = streams
    for pack in (a, b):
        spoken, _ = pack.layers["0"].speak(spoken, pack.memory.fetch(tokens_BT).layer(0))
    for voice in batch.voices:
        streams, _ = voice.speak(0, streams, batch)
    assert_bitwise(streams, spoken)


def test_a_pack_speaks_beside_the_memory_a_model_was_trained_with() -> None:
    model, tokens_BT = build(whole()), text(2, 9)
    own = logits(model, tokens_BT)
    attach(model, pack_for(model))
    both = logits(model, tokens_BT)
    own_memory(model, facts(model), take_off=True)
    alone = logits(model, tokens_BT)
    assert len({round(float(values.sum()), 3) for values in (own, both, alone)}) == 3


def gates(model: Model, tokens_BT: Tensor, **how: Any) -> list[Tensor]:
    with torch.no_grad():
        return model(tokens_BT, want=("gates",), **how).extras["gates"]


def test_gates_of_a_pack_are_told_as_those_of_a_models_own_memory_are() -> None:
    model, tokens_BT = build(whole()), text(3, 13)
    own = gates(model, tokens_BT)
    attach(model, own_memory(model, facts(model), take_off=True))
    for got, want in zip(gates(model, tokens_BT), own, strict=True):
        assert_bitwise(got, want)
    attach(model, pack_for(model, "B", config=OTHER_HASH))
    told = gates(model, tokens_BT, packs=[("A", "B"), (), ("A",)])
    heard = [[not bool(gate_BTR[row].isnan().any()) for gate_BTR in told] for row in range(3)]
    assert heard == [[True, True, True], [False] * 3, [True, False, True]], "in the order of blocks; NaN where a pack is silent"
    assert_close_fp32(told[0][2], own[0][2])


@pytest.mark.parametrize("precision", ["bf16 weights", "autocast"])
def test_in_half_precision_a_pack_is_the_memory_it_was_bitwise(precision: str) -> None:
    model, tokens_BT = build(whole()), text(3, 13)
    model = model.to(torch.bfloat16) if precision == "bf16 weights" else model
    chosen = [("A",), ("A", "B"), ()]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        own = logits(model, tokens_BT)
        attach(model, own_memory(model, facts(model), take_off=True))
        assert_bitwise(logits(model, tokens_BT), own)
        attach(model, pack_for(model, "B", config=OTHER_HASH))
        assert_bitwise(logits(model, tokens_BT, packs=[("A",)] * 3), own)
        mixed, state = logits(model, tokens_BT, packs=chosen), model.new_state(3)
        assert_close_bf16(mixed[0], own[0])
        parts = [logits(model, part, packs=chosen, state=state) for part in tokens_BT.split([5, 1, 7], dim=1)]
    assert (torch.cat(parts, dim=1) - mixed).abs().mean() < 0.02 * mixed.abs().mean()


# --- mixed in one batch -----------------------------------------------------------------------------------------------


def test_each_sequence_of_a_batch_hears_its_own_packs() -> None:
    model, tokens_BT = build(BASE), text(5, 11)
    base = logits(model, tokens_BT)
    attach(model, pack_for(model))
    attach(model, pack_for(model, "B", config=OTHER_HASH))
    alone = {names: logits(model, tokens_BT, packs=[names] * 5) for names in ((), ("A",), ("B",), ("A", "B"))}
    assert_bitwise(alone[()], base)
    assert_bitwise(alone["A", "B"], logits(model, tokens_BT))
    chosen = [("A",), (), ("B", "A"), ("B",), ()]
    mixed = logits(model, tokens_BT, packs=chosen)
    for row, names in enumerate(chosen):
        assert_close_fp32(mixed[row], alone[tuple(sorted(names))][row])
    assert_bitwise(mixed[1], base[1])
    assert_bitwise(mixed[4], base[4])


def test_a_mixed_batch_decodes_as_it_reads_at_once() -> None:
    model, tokens_BT = build(BASE), text(3, 17)
    attach(model, pack_for(model))
    attach(model, pack_for(model, "B", config=OTHER_HASH))
    chosen = [("A",), ("B", "A"), ()]
    at_once = logits(model, tokens_BT, packs=chosen)
    state = model.new_state(3)
    parts = [logits(model, part, packs=chosen, state=state) for part in tokens_BT.split([5, 1, 1, 7, 3], dim=1)]
    assert_close_fp32(torch.cat(parts, dim=1), at_once)


def test_packs_that_are_not_attached_cannot_be_chosen() -> None:
    model, tokens_BT = build(BASE), text(2, 5)
    attach(model, pack_for(model))
    with pytest.raises(RequestError, match="packs names 'law', which is not attached; attached are: A"):
        model(tokens_BT, packs=[("A",), ("law",)])
    with pytest.raises(RequestError, match="packs has 1 entries, the batch 2 sequences"):
        model(tokens_BT, packs=[("A",)])


# --- texts in parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [False, True], ids=["one text a row", "packed and padded"])
def test_cached_decoding_with_packs_is_the_full_forward(documents: bool) -> None:
    model, tokens_BT = build(whole()), text(2, 21)
    document_BT = torch.tensor([[-1] * 3 + [0] * 8 + [1] * 10, [0] * 6 + [1] * 6 + [2] * 9]) if documents else None
    attach(model, pack_for(model))
    attach(model, pack_for(model, "B", config=OTHER_HASH))
    wanted = logits(model, tokens_BT, document_BT=document_BT)
    state, start, got = model.new_state(2), 0, []
    for length in (7, 1, 1, 1, 5, 6):
        part = slice(start, start + length)
        got.append(logits(model, tokens_BT[:, part], document_BT=None if document_BT is None else document_BT[:, part], state=state))
        start += length
    real_BT = torch.ones_like(tokens_BT, dtype=torch.bool) if document_BT is None else document_BT >= 0
    assert_close_fp32(torch.cat(got, dim=1)[real_BT], wanted[real_BT])


def test_rolled_back_restored_and_reordered_texts_go_on_as_if_nothing_had_been() -> None:
    model, tokens_BT = build(BASE), text(2, 20)
    attach(model, pack_for(model))
    attach(model, pack_for(model, "B", config=OTHER_HASH))
    wanted = logits(model, tokens_BT)
    state = model.new_state(2)
    logits(model, tokens_BT[:, :9], state=state)
    snapshot = state.snapshot()
    logits(model, text(2, 6, seed=5), state=state)
    state.rollback(6)
    assert_close_fp32(logits(model, tokens_BT[:, 9:13], state=state), wanted[:, 9:13])
    state.restore(snapshot)
    state.select(torch.tensor([1, 0, 1]))
    rows = [1, 0, 1]
    assert_close_fp32(logits(model, tokens_BT[rows, 9:], state=state), wanted[rows, 9:])


def test_a_state_made_before_a_pack_was_attached_is_refused() -> None:
    model, tokens_BT = build(BASE), text(1, 4)
    state = model.new_state(1)
    logits(model, tokens_BT, state=state)
    attach(model, pack_for(model))
    with pytest.raises(RequestError, match=r"the pack 'A' was attached after this text had begun.*new_state"):
        model(tokens_BT, state=state)


def test_a_pack_reads_tokens_through_its_own_canonical_map() -> None:
    model, tokens_BT = build(BASE), text(2, 9)
    pack = pack_for(model, config=replace(ENGRAM, canonical_vocab=5))
    pack.memory.set_canonical(torch.arange(VOCAB) % 5)
    attach(model, pack)
    voice = model._batch(tokens_BT, None, None, None, None, None).voices[0]
    twin = pack_for(model, config=replace(ENGRAM, canonical_vocab=5))
    twin.memory.set_canonical(torch.arange(VOCAB) % 5)
    assert_bitwise(voice.rows.rows_U, twin.memory.fetch(tokens_BT).rows_U)


def test_gradients_reach_rows_and_projections_of_an_attached_pack() -> None:
    model, tokens_BT = build(BASE), text(2, 9)
    pack = pack_for(model)
    attach(model, pack)
    fetched = []
    fetch = pack.memory.fetch
    pack.memory.fetch = lambda *args: fetched.append(fetch(*args)) or fetched[-1]  # type: ignore[method-assign]
    sum(model(tokens_BT, targets_BT=next_tokens(tokens_BT)).losses.values()).backward()
    assert fetched[0].vectors_UE.grad.abs().sum() > 0
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in pack.parameters())


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_pack_for_another_model_is_refused_by_field_and_nothing_changes() -> None:
    model = build(BASE)
    narrow, thin = build(whole(engram=None, dim=8)), build(whole(engram=None, residual=replace(BASE.residual, num_streams=2)))
    far = pack_for(model, config=replace(ENGRAM, layers=(0, 9)))
    wrong = {
        "module.dim 8, the model 16": pack_for(narrow),
        "module.streams 2, the model 3": pack_for(thin),
        r"layers \[9\]; the model has blocks 0..2": far,
        "made for base bbbb": pack_for(model, base="b" * 64),
    }
    for message, pack in wrong.items():
        with pytest.raises(MemoryPackError, match=message):
            attach(model, pack)
    with pytest.raises(MemoryPackError, match="made for tokenizer aaaa"):
        attach(model, pack_for(model), tokenizer="c" * 64)
    assert not model.packs
    assert attach(model, pack_for(model, base="b" * 64), any_base=True) == "A"


def test_a_failed_swap_leaves_the_old_pack_speaking() -> None:
    model, tokens_BT = build(BASE), text(1, 9)
    attach(model, pack_for(model))
    attach(model, pack_for(model, "B", seed=2))
    before = logits(model, tokens_BT)
    with pytest.raises(MemoryPackError, match="made for base"):
        swap(model, "A", pack_for(model, "C", base="b" * 64))
    with pytest.raises(MemoryPackError, match="a pack named 'B' is attached already"):
        swap(model, "A", pack_for(model, "B"))
    with pytest.raises(MemoryPackError, match="no pack named 'Z' is attached; attached are: A, B"):
        swap(model, "Z", pack_for(model, "C"))
    with pytest.raises(MemoryPackError, match="no pack named 'Z'"):
        detach(model, "Z")
    assert_bitwise(logits(model, tokens_BT), before)


def test_a_model_without_memory_has_none_to_take_off() -> None:
    model = build(BASE)
    with pytest.raises(MemoryPackError, match="no memory of its own"):
        own_memory(model, facts(model))
