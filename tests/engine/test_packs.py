"""Packs chosen per request within one batch, loaded and unloaded while requests run."""

import pytest
import torch

from byrote.engine.cache import PAGE
from byrote.engine.request import SamplingParams
from byrote.errors import MemoryPackError, RequestError
from byrote.model.config import MTPConfig
from byrote.model.pack import Pack, PackFacts, attach, base_fingerprint, new_pack
from byrote.model.transformer import Model
from tests.engine.small import Bytes, answers, drain, engine_of, prompts, said, tiny, twin
from tests.model.tiny_models import ENGRAM, RESIDUALS, VOCAB, build, whole
from tests.tolerances import assert_close_fp32

PARAMS = SamplingParams(max_tokens=10, temperature=0.0)


def pack_for(model: Model, name: str, seed: int) -> Pack:
    facts = PackFacts(name=name, tokenizer="t", base=base_fingerprint(model))
    pack = new_pack(ENGRAM, dim=16, streams=RESIDUALS["mhc"].num_streams, vocab_size=VOCAB, init_std=0.4, seed=seed, facts=facts)
    with torch.no_grad():
        for parameter in pack.parameters():
            parameter.add_(0.2)
    return pack


def with_packs(engine):
    for seed, name in enumerate(("law", "med"), start=1):
        engine.load_pack(name, pack_for(engine.model, name, seed))
    return engine


@pytest.mark.parametrize("speculate", ["off", "always"])
def test_requests_with_different_packs_share_a_batch(speculate):
    model, asked = build(whole(mtp=MTPConfig())), prompts(6, longest=40)
    engine = with_packs(engine_of(model, max_batch=6, speculate=speculate))
    chosen = ["law", None, "med", "law", None, "med"]
    names = [engine.add_request(one, PARAMS, pack=pack) for one, pack in zip(asked, chosen, strict=True)]
    got = said(drain(engine))
    want = [twin(model, one, 10, packs=[() if pack is None else (pack,)]) for one, pack in zip(asked, chosen, strict=True)]
    assert [got[name, 0] for name in names] == want
    assert twin(model, asked[0], 10, packs=[()]) != want[0], "the pack must have something to say"


def test_a_pack_comes_while_requests_run_and_goes_when_they_have_ended():
    model, asked = tiny(), prompts(4, longest=30, seed=4)
    engine = engine_of(model, max_batch=4, chunk_tokens=16)
    want = [twin(model, one, 10) for one in asked]
    names = [engine.add_request(one, PARAMS) for one in asked]
    events = engine.step()
    engine.load_pack("law", pack_for(model, "law", 1))
    engine.add_request(asked[0], PARAMS, request="with", pack="law")
    events += engine.step()
    events += engine.step()
    engine.unload_pack("law")
    assert engine.packs() == []
    assert "law" in model.packs, "a request still uses it"
    with pytest.raises(RequestError, match="no pack named 'law' is loaded; loaded: none"):
        engine.add_request(asked[0], PARAMS, pack="law")
    with pytest.raises(RequestError, match="no pack named 'law'"):
        engine.unload_pack("law")
    with pytest.raises(RequestError, match="leaves when the last request"):
        engine.load_pack("law", pack_for(model, "law", 2))
    events += drain(engine)
    assert model.packs == {}
    got = said(events)
    assert [got[name, 0] for name in names] == want
    attach(model, pack_for(model, "law", 1), "law")
    assert got["with", 0] == twin(model, asked[0], 10)


def test_prefixes_of_another_pack_or_an_earlier_one_of_its_name_are_not_used():
    model, ids = tiny(), [7] * (PAGE + 5)
    engine = with_packs(engine_of(model))
    for pack in ("law", "med", None):
        answers(engine, [ids], PARAMS, pack=pack)
    assert engine.stats().prefix_hit_tokens == 0
    answers(engine, [ids], PARAMS, pack="law")
    assert engine.stats().prefix_hit_tokens == PAGE
    engine.unload_pack("law")
    engine.load_pack("law", pack_for(model, "law", 9))
    assert answers(engine, [ids], PARAMS, pack="law") == [twin(model, ids, 10, packs=[("law",)])]
    assert engine.stats().prefix_hit_tokens == PAGE


def test_a_pack_for_another_base_or_tokenizer_is_refused_and_nothing_changes():
    model = tiny()
    pack = pack_for(model, "law", 1)
    with torch.no_grad():
        model.embed.weight.mul_(2)
    engine = engine_of(model, Bytes())
    with pytest.raises(MemoryPackError, match="base"):
        engine.load_pack("law", pack)
    assert engine.packs() == []
    engine.load_pack("law", pack, any_base=True)
    assert engine.packs() == ["law"]


def test_gates_of_a_request_are_those_of_its_pack_and_nought_without_one():
    model, ids = build(whole(engram=None)), prompts(1, longest=30)[0]
    engine = with_packs(engine_of(model, max_batch=2))
    asked = SamplingParams(max_tokens=6, temperature=0.0, gates=True)
    heard, unheard = engine.add_request(ids, asked, pack="law"), engine.add_request(ids, asked)
    events = drain(engine)
    spoken = {name: [token.gate for event in events if event.request == name for token in event.tokens] for name in (heard, unheard)}
    known = torch.tensor([[*ids, *said(events)[heard, 0]]])
    with torch.no_grad():
        gates = model(known, packs=[("law",)], want=("gates",)).extras["gates"]
    want = torch.stack([gate_BTR.mean(-1)[0] for gate_BTR in gates]).mean(0)[len(ids) - 1 : -1]
    assert_close_fp32(torch.tensor(spoken[heard]), want)
    assert set(spoken[unheard]) == {0.0}
