"""What clients may send: unknown fields, wrong types and contradictions are refused with the field's name."""

import pytest
from pydantic import ValidationError

from byrote.engine.request import Grammar
from byrote.errors import RequestError
from byrote.serve.config import Limits
from byrote.serve.link import _as_error
from byrote.serve.schema import ChatRequest, CompletionRequest

TEXT = {"model": "m", "prompt": "p"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


REFUSED = (
    {"tools": []},
    {"best_of": 2},
    {"suffix": "x"},
    {"user": "u"},
    {"prompt": ["a", 1]},
    {"prompt": [[1], "a"]},
    {"prompt": [-1]},
    {"prompt": [1.5]},
    {"max_tokens": "5"},
    {"max_tokens": True},
    {"n": 0},
    {"temperature": -1.0},
    {"top_p": 0.0},
    {"seed": 2**63},
    {"logprobs": 21},
    {"stop": ""},
    {"stop": ["a"] * 17},
    {"logit_bias": {"x": 1.0}},
    {"logit_bias": {"5": 101.0}},
    {"response_format": {"type": "xml"}},
)


@pytest.mark.parametrize("extra", REFUSED, ids=str)
def test_what_is_not_supported_is_an_error_at_its_field(extra: dict) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate(TEXT | extra)
    assert caught.value.errors()[0]["loc"][0] in extra


def test_every_field_reaches_the_sampler() -> None:
    asked = CompletionRequest.model_validate(
        TEXT
        | {
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 4,
            "min_p": 0.1,
            "n": 3,
            "stop": ["a", "b"],
            "seed": 5,
            "logprobs": 2,
        }
        | {"presence_penalty": 0.25, "frequency_penalty": 0.75, "repetition_penalty": 1.5, "logit_bias": {"7": -100.0}, "min_tokens": 2}
        | {"ignore_end": True, "gates": True, "echo": True, "regex": "a+"}
    )
    params = asked.params(Limits())
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.min_p, params.n) == (9, 0.5, 0.9, 4, 0.1, 3)
    assert (params.stop, params.seed, params.logprobs, params.logit_bias) == (("a", "b"), 5, 2, ((7, -100.0),))
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.25, 0.75, 1.5)
    assert params.min_tokens == 2 and params.ignore_end and params.gates and params.prompt_logprobs
    assert params.grammar == Grammar(kind="regex", text="a+")


def test_limits_and_contradictions_are_refused_with_what_is_allowed() -> None:
    for asked, words in (
        (CompletionRequest.model_validate(TEXT | {"max_tokens": 11}), "at most 10"),
        (CompletionRequest.model_validate(TEXT | {"n": 3, "max_tokens": 1}), "at most 2"),
        (CompletionRequest.model_validate(TEXT | {"max_tokens": 1, "regex": "a", "response_format": {"type": "json_object"}}), "exclude"),
        (ChatRequest.model_validate(CHAT | {"max_tokens": 1, "max_completion_tokens": 1}), "say the same"),
        (ChatRequest.model_validate(CHAT | {"max_tokens": 1, "top_logprobs": 1}), "needs logprobs"),
        (ChatRequest.model_validate(CHAT | {"max_tokens": 1, "response_format": {"type": "json_schema"}}), "json_schema is missing"),
    ):
        with pytest.raises(RequestError, match=words):
            asked.params(Limits(output_tokens=10, choices=2))


def test_a_schema_becomes_a_grammar() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": True}}
    assert ChatRequest.model_validate(CHAT | {"response_format": form}).params(Limits()).grammar == Grammar(
        kind="json_schema", text='{"type": "object"}'
    )
    assert ChatRequest.model_validate(CHAT | {"response_format": {"type": "text"}}).params(Limits()).grammar is None


def test_parts_of_text_are_joined_and_other_parts_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = ChatRequest.model_validate(CHAT | {"messages": [{"role": "developer", "content": parts}]})
    assert asked.messages[0].plain() == {"role": "system", "content": "ab"}
    with pytest.raises(ValidationError, match="image_url"):
        ChatRequest.model_validate(CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]})
    for message in ({"role": "tool", "content": "x"}, {"role": "user", "content": "x", "name": "y"}):
        with pytest.raises(ValidationError, match=r"messages\.0\.(role|name)"):
            ChatRequest.model_validate(CHAT | {"messages": [message]})


def test_what_the_servers_packages_cannot_do_is_the_requests_error() -> None:
    error = _as_error({"kind": "ConfigError", "message": "a grammar needs the extra package xgrammar"})
    assert type(error) is RequestError
