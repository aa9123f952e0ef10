"""What clients may send, in the words of OpenAI's API, and how that becomes `SamplingParams`.

A field that is not here is refused with its name: a client that asks for something must not get an answer that ignored it. Fields beyond
OpenAI's: top_k, min_p, min_tokens, repetition_penalty, ignore_end, regex, gates. Types are strict: "1" is no number.
"""

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from byrote.engine.request import Grammar, SamplingParams
from byrote.errors import RequestError
from byrote.serve.config import Limits

_MOST_STOPS = 16
_LONGEST_STOP = 512
_AS_THEY_ARE = (
    *("temperature", "top_p", "top_k", "min_p", "n", "seed", "min_tokens", "ignore_end", "gates"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class JsonSchema(Strict):
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> Grammar | None:
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Grammar(kind="json")
        if self.json_schema is None:
            raise RequestError("response_format.json_schema is missing; type json_schema needs it")
        import json

        return Grammar(kind="json_schema", text=json.dumps(self.json_schema.schema_))


class StreamOptions(Strict):
    include_usage: bool = False


class Common(Strict):
    """What both endpoints take."""

    model: str
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    n: int = Field(default=1, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=_MOST_STOPS)] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = None
    min_tokens: int = Field(default=0, ge=0)
    ignore_end: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    regex: str | None = None
    gates: bool = False

    def _grammar(self) -> Grammar | None:
        return None if self.regex is None else Grammar(kind="regex", text=self.regex)

    def _sampling(self, limits: Limits, max_tokens: int, **more: Any) -> SamplingParams:
        if max_tokens > limits.output_tokens:
            raise RequestError(f"max_tokens is {max_tokens}; this server allows at most {limits.output_tokens}")
        if self.n > limits.choices:
            raise RequestError(f"n is {self.n}; this server allows at most {limits.choices}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            **{name: getattr(self, name) for name in _AS_THEY_ARE},
            max_tokens=max_tokens,
            stop=stop,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            **more,
        )


class CompletionRequest(Common):
    prompt: str | list[TokenId] | Annotated[list[str], Field(min_length=1)] | Annotated[list[list[TokenId]], Field(min_length=1)]
    max_tokens: int = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False
    response_format: ResponseFormat | None = None

    def prompts(self) -> list[str | list[int]]:
        """Each text, or list of token ids, that is to be continued."""
        is_list = isinstance(self.prompt, list) and bool(self.prompt) and not isinstance(self.prompt[0], int)
        return cast(list[str | list[int]], self.prompt if is_list else [self.prompt])

    def params(self, limits: Limits) -> SamplingParams:
        grammar = _one_grammar(self._grammar(), self.response_format)
        return self._sampling(limits, self.max_tokens, logprobs=self.logprobs, prompt_logprobs=self.echo, grammar=grammar)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "user", "assistant", "developer"]
    content: str | list[TextPart]
    reasoning_content: str | None = None

    def plain(self) -> dict[str, str]:
        """What a chat template takes."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text}  # earlier reasoning is not shown to the model again


class ChatRequest(Common):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    def params(self, limits: Limits) -> SamplingParams:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RequestError("max_tokens and max_completion_tokens say the same; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true")
        max_tokens = self.max_completion_tokens or self.max_tokens or min(1024, limits.output_tokens)
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(limits, max_tokens, logprobs=logprobs, grammar=_one_grammar(self._grammar(), self.response_format))


class MemoryChange(Strict):
    name: str


def _one_grammar(regex: Grammar | None, wanted: ResponseFormat | None) -> Grammar | None:
    form = None if wanted is None else wanted.grammar()
    if regex is not None and form is not None:
        raise RequestError("regex and response_format exclude each other; give one of them")
    return regex or form
