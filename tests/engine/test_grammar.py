"""Constrained output: whatever a model wants to say, what it says fits the grammar."""

import json
import re
import sys

import pytest
import torch

from byrote.engine.grammar import Grammars
from byrote.engine.request import Grammar, SamplingParams
from byrote.errors import ConfigError, RequestError
from tests.engine.small import BEGIN, END, Bytes, drain, engine_of, text_of
from tests.model.tiny_models import build, whole

PERSON = {"name": {"type": "string", "pattern": "^[a-z]{1,4}$"}, "age": {"enum": [7, 42]}}
SCHEMA = json.dumps({"type": "object", "properties": PERSON, "required": ["name", "age"]})


def model():
    return build(whole(vocab_size=END + 3))


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    engine = engine_of(model(), Bytes())
    with pytest.raises(ConfigError, match=r"pip install \"byrote\[grammar\]\""):
        engine.add_request([BEGIN], SamplingParams(grammar=Grammar(kind="regex", text="a")))
    assert not engine.has_work()


def test_an_unknown_kind_is_refused():
    with pytest.raises(RequestError, match="allowed: json_schema, regex, json, ebnf"):
        Grammar(kind="yaml")


class TestWithXgrammar:
    @pytest.fixture(autouse=True)
    def _package(self):
        pytest.importorskip("xgrammar", reason="the optional extra `grammar` is not installed")

    @pytest.mark.parametrize("speculate", ["off", "always"])
    @pytest.mark.parametrize("temperature", [0.0, 1.5])
    @pytest.mark.parametrize(
        ("grammar", "fits"),
        [
            (Grammar(kind="regex", text=r"[a-c]{3,5}-(7|42)"), lambda text: re.fullmatch(r"[a-c]{3,5}-(7|42)", text)),
            (Grammar(kind="json_schema", text=SCHEMA), lambda text: json.loads(text)["age"] in (7, 42)),
            (Grammar(kind="ebnf", text='root ::= ("ja" | "nein") "!"'), lambda text: text in ("ja!", "nein!")),
        ],
        ids=["regex", "json schema", "ebnf"],
    )
    def test_text_fits_the_grammar(self, grammar, fits, temperature, speculate):
        engine = engine_of(model(), Bytes(), speculate=speculate)
        for seed in range(3):
            engine.add_request([BEGIN, seed], SamplingParams(grammar=grammar, temperature=temperature, seed=seed), request=str(seed))
        events = drain(engine)
        assert [event.finish for event in events if event.finish] == ["stop"] * 3
        assert all(fits(text_of(events, str(seed))) for seed in range(3))

    def test_only_tokens_that_go_on_are_allowed_and_the_end_only_when_complete(self):
        mask = Grammars(Bytes(), END + 3).mask(Grammar(kind="regex", text="ab?"), (END,))
        allowed = []
        for token in (*b"ab", END):
            logits_V = torch.zeros(END + 3)
            mask.forbid(logits_V)
            allowed.append((logits_V == 0).nonzero().flatten().tolist())
            mask.accept(token)
        assert allowed == [[ord("a")], [ord("b"), END], [END]]

    @pytest.mark.parametrize(("kind", "text"), [("regex", "(("), ("json_schema", "{"), ("ebnf", "nothing")])
    def test_a_grammar_that_cannot_be_compiled_is_refused(self, kind, text):
        engine = engine_of(model(), Bytes())
        with pytest.raises(RequestError, match=f"the {kind} grammar cannot be used"):
            engine.add_request([BEGIN], SamplingParams(grammar=Grammar(kind=kind, text=text)))

    def test_a_bias_against_all_that_is_allowed_ends_the_request_alone(self):
        engine = engine_of(model(), Bytes())
        grammar = Grammar(kind="regex", text="a")
        engine.add_request([BEGIN], SamplingParams(grammar=grammar, logit_bias=((ord("a"), float("-inf")),)), request="bad")
        engine.add_request([BEGIN], SamplingParams(grammar=grammar), request="good")
        events = drain(engine)
        assert [event.request for event in events if event.finish == "error"] == ["bad"]
        assert text_of(events, "good") == "a"
