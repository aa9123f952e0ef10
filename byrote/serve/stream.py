"""Events of the engine as OpenAI's objects: each choice as it grows (`TextChoice`, `ChatChoice`), in chunks or whole.

Text between <think> and </think> at the start of a chat answer goes out as `reasoning_content`; a tag may be cut anywhere by the
tokens, so what could become one is held (`Thinking`):

    pieces  "<th" "ink>a" "b</thi" "nk>c"      reasoning "a" "b"      content "c"
"""

import codecs
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

OPEN, CLOSE = "<think>", "</think>"


Event = Mapping[str, Any]  # an event, or one of its tokens, as the engine's process wrote it


class HasBytes(Protocol):
    def token_bytes(self, token: int) -> bytes: ...


class Split(NamedTuple):
    reasoning: str
    content: str


class Thinking:
    """Splits a chat answer into reasoning and content as it arrives. Only a tag at the very start opens reasoning."""

    def __init__(self) -> None:
        self._held, self._tag = "", OPEN

    def push(self, text: str) -> Split:
        """What `text` makes certain."""
        if not self._tag:
            return Split("", text)
        self._held += text
        return self._before() if self._tag == OPEN else self._inside()

    def finish(self) -> Split:
        """What was held, when nothing more comes: part of a tag that was none."""
        rest, self._held = self._held, ""
        return Split(rest, "") if self._tag == CLOSE else Split("", rest)

    def _before(self) -> Split:
        if self._held.startswith(OPEN):
            self._held, self._tag = self._held[len(OPEN) :], CLOSE
            return self._inside()
        if OPEN.startswith(self._held):
            return Split("", "")
        rest, self._held, self._tag = self._held, "", ""
        return Split("", rest)

    def _inside(self) -> Split:
        reasoning, found, rest = self._held.partition(CLOSE)
        if found:
            self._held, self._tag = "", ""
            return Split(reasoning, rest)
        size = next((size for size in range(len(CLOSE) - 1, 0, -1) if self._held.endswith(CLOSE[:size])), 0)
        cut = len(self._held) - size
        certain, self._held = self._held[:cut], self._held[cut:]
        return Split(certain, "")


class TextChoice:
    """One choice of /v1/completions. With `echo` it begins with the prompt."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, index: int, tokenizer: HasBytes, *, logprobs: bool, gates: bool, echo: str = "") -> None:
        self._index, self._tokenizer, self._logprobs, self._gates, self._text = index, tokenizer, logprobs, gates, echo
        self._echo, self._offset, self._tokens, self._finish = echo, 0, list[Event](), None
        self._joined = Gates(tokenizer)

    def chunk(self, event: Event) -> dict[str, Any]:
        """What this event adds."""
        text, self._echo = self._echo + event["text"], ""
        self._text += event["text"]
        tokens = [*event["prompt"], *event["tokens"]]
        self._tokens += tokens
        self._finish = event["finish"]
        return self._choice(text, tokens)

    def whole(self) -> dict[str, Any]:
        self._offset, self._joined = 0, Gates(self._tokenizer)
        return self._choice(self._text, self._tokens)

    def _choice(self, text: str, tokens: list[Event]) -> dict[str, Any]:
        logprobs = text_logprobs(self._tokenizer, tokens, self._offset) if self._logprobs else None
        self._offset += sum(map(len, logprobs["tokens"])) if logprobs else 0
        choice = {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": self._finish}
        return choice | ({"gates": self._joined.push(tokens, last=self._finish is not None)} if self._gates else {})


class ChatChoice:
    """One choice of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, index: int, tokenizer: HasBytes, *, logprobs: bool, gates: bool) -> None:
        self._index, self._tokenizer, self._logprobs, self._gates = index, tokenizer, logprobs, gates
        self._thinking, self._joined, self._begun = Thinking(), Gates(tokenizer), False
        self._reasoning, self._content, self._tokens, self._finish = "", "", list[Event](), None

    def chunk(self, event: Event) -> dict[str, Any]:
        """What this event adds."""
        parts = [self._thinking.push(event["text"]), self._thinking.finish() if event["finish"] else Split("", "")]
        split = Split(*map("".join, zip(*parts)))
        self._reasoning += split.reasoning
        self._content += split.content
        self._tokens += event["tokens"]
        self._finish = event["finish"]
        delta = {} if self._begun else {"role": "assistant", "content": ""}
        self._begun = True
        delta |= {"reasoning_content": split.reasoning} if split.reasoning else {}
        delta |= {"content": split.content} if split.content else {}
        return self._choice({"delta": delta}, event["tokens"])

    def whole(self) -> dict[str, Any]:
        self._joined = Gates(self._tokenizer)
        message = {"role": "assistant", "content": self._content, "refusal": None}
        message |= {"reasoning_content": self._reasoning} if self._reasoning else {}
        return self._choice({"message": message}, self._tokens)

    def _choice(self, said: dict[str, Any], tokens: list[Event]) -> dict[str, Any]:
        logprobs = chat_logprobs(self._tokenizer, tokens) if self._logprobs else None
        choice = {"index": self._index, **said, "logprobs": logprobs, "finish_reason": self._finish}
        return choice | ({"gates": self._joined.push(tokens, last=self._finish is not None)} if self._gates else {})


def usage_fields(usages: Mapping[int, Mapping[str, int]], choices: int) -> dict[str, Any]:
    """Of all choices of a request by their index; each prompt counts once for its `choices`."""
    prompt, cached = (sum(usages[index][name] for index in usages if index % choices == 0) for name in ("prompt_tokens", "cached_tokens"))
    completion = sum(usage["completion_tokens"] for usage in usages.values())
    total = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return total | {"prompt_tokens_details": {"cached_tokens": cached}}


def chat_logprobs(tokenizer: HasBytes, tokens: Iterable[Event]) -> dict[str, Any]:
    """`logprobs` of a chat choice."""
    content = []
    for token in tokens:
        top = [_chat_token(tokenizer, *pair) for pair in token["top"]]
        content.append(_chat_token(tokenizer, token["id"], token["logprob"]) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_token(tokenizer: HasBytes, token: int, logprob: float) -> dict[str, Any]:
    content = tokenizer.token_bytes(token)
    return {"token": content.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(content)}


def text_logprobs(tokenizer: HasBytes, tokens: Iterable[Event], offset: int) -> dict[str, Any]:
    """`logprobs` of a completion; `offset` is where the first token begins in the text."""
    result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        text = _text(tokenizer, token["id"])
        result["tokens"].append(text)
        result["token_logprobs"].append(None if token["logprob"] is None else _finite(token["logprob"]))
        result["top_logprobs"].append({_text(tokenizer, id_): _finite(logprob) for id_, logprob in token["top"]} or None)
        result["text_offset"].append(offset)
        offset += len(text)
    return result


def _text(tokenizer: HasBytes, token: int) -> str:
    """OpenAI writes the bytes of a token that is no whole character as bytes:\\x.."""
    content = tokenizer.token_bytes(token)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _finite(logprob: float) -> float:
    """JSON knows no infinity; OpenAI writes −9999 for a token that cannot come."""
    return max(logprob, -9999.0)


class Gates:
    """How strongly memory spoke at each token (byrote's own field `gates`). A character that several tokens share stands under the mean
    of their gates; text comes out as soon as it is certain, together with the answer's own."""

    def __init__(self, tokenizer: HasBytes) -> None:
        self._tokenizer, self._decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")
        self._text, self._gates = "", list[float]()

    def push(self, tokens: Iterable[Event], *, last: bool) -> list[dict[str, Any]]:
        """What these tokens make certain; with the `last` ones all there is."""
        shown = []
        for token in tokens:
            self._text += self._decoder.decode(self._tokenizer.token_bytes(token["id"]))
            self._gates += [] if token["gate"] is None else [token["gate"]]
            if self._text or not self._is_inside():
                shown.append(self._take())
        if last and self._is_inside():
            self._text = self._decoder.decode(b"", final=True)
            shown.append(self._take())
        return shown

    def _is_inside(self) -> bool:
        """Whether the last token ended inside a character."""
        return bool(self._decoder.getstate()[0])

    def _take(self) -> dict[str, Any]:
        text, gates = self._text, self._gates
        self._text, self._gates = "", gates[-1:] if self._is_inside() else []
        return {"token": text, "gate": sum(gates) / len(gates) if gates else None}


def server_sent(data: Mapping[str, Any] | str) -> bytes:
    """One server-sent event, in ASCII: there are clients that break lines at U+2028, U+0085 and the like too."""
    text = data if isinstance(data, str) else json.dumps(data)
    return f"data: {text}\n\n".encode()
