"""What clients get back, as the OpenAPI schema at /openapi.json tells it. Handlers write plain dictionaries (`stream.py`); the tests hold
them against these."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Finish = Literal["stop", "length", "abort", "error"]


class Exact(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Cached(Exact):
    cached_tokens: int


class Usage(Exact):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Cached


class Gate(Exact):
    token: str
    gate: float | None


class TextLogprobs(Exact):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextAnswerChoice(Exact):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish
    gates: list[Gate] = []


class Envelope(Exact):
    id: str
    created: int
    model: str
    usage: Usage


class TextAnswer(Envelope):
    object: Literal["text_completion"]
    choices: list[TextAnswerChoice]


class LikelyToken(Exact):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(Exact):
    content: list[ChatToken]
    refusal: None


class AnswerMessage(Exact):
    role: Literal["assistant"]
    content: str
    refusal: None
    reasoning_content: str = ""


class ChatAnswerChoice(Exact):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    gates: list[Gate] = []


class ChatAnswer(Envelope):
    object: Literal["chat.completion"]
    choices: list[ChatAnswerChoice]


class ModelFacts(Exact):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    chat: bool


class Models(Exact):
    object: Literal["list"]
    data: list[ModelFacts]


class MemoryFacts(Exact):
    name: str
    attached: bool


class Memories(Exact):
    object: Literal["list"]
    data: list[MemoryFacts]


class Health(Exact):
    status: Literal["ok", "starting"]


class ErrorFacts(Exact):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Exact):
    error: ErrorFacts


_ERRORS = (
    "in OpenAI's form. 400: cannot be done as asked, and why; 401: key; 403: host; 408, 413: body too slow, too large; "
    "429: too many requests; 503: the engine is starting again; 504: took too long"
)


def responses(answer: type[BaseModel], *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: its answer, or an error."""
    events: dict[str, Any] = {"content": {"text/event-stream": {"schema": {"type": "string"}}}} if streams else {}
    errors: dict[int | str, dict[str, Any]] = {f"{kind}XX": {"model": Error, "description": _ERRORS} for kind in (4, 5)}
    return {200: {"model": answer, "description": "the answer", **events}, **errors}
