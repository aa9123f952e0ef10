"""What is asked of the engine, what it answers, and one answer on its way.

    Request  ids + SamplingParams ──▶ n Choices ──▶ Events: tokens, safe text, and at the end why it ended

A token of a byte-level vocabulary may end in the middle of a character, and a stop string may end in the middle of a token. So bytes
are held until they are whole characters, and text is held as long as it could be the start of a stop string (`TextStream`):

    stop "END"      tokens  "the E" "N" "T" " E" "ND of"      pieces  "the " "" "ENT" " " (stop found, nothing more)

A choice owns all that decides its next draw: its tokens, its random stream, its grammar. So it can leave the batch at any token
and come back later, and what it says does not depend on who else was there.
"""

import codecs
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import torch

from byrote.errors import ByroteError, RequestError

MOST_LOGPROBS = 20
_GRAMMARS = ("json_schema", "regex", "json", "ebnf")


class ByteTokenizer(Protocol):
    """What the engine needs of a tokenizer."""

    begin_id: int
    end_id: int

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, token: int) -> bytes: ...

    def token_strings(self) -> list[str]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Grammar:
    """What the text must be: a JSON value of a schema, a match of a regular expression, a JSON object, or a sentence of an EBNF grammar."""

    kind: str
    text: str = ""  # the schema, expression or grammar; nothing for "json"

    def __post_init__(self) -> None:
        if self.kind not in _GRAMMARS:
            raise RequestError(f"grammar.kind is {self.kind!r}; allowed: {', '.join(_GRAMMARS)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop besides at the end of the document."""

    max_tokens: int = 256
    temperature: float = 0.8  # 0: always the most probable token
    top_k: int = 0  # choose among this many; 0: no limit
    top_p: float = 1.0  # choose among the most probable tokens that together reach this share
    min_p: float = 0.0  # choose among tokens at least this probable, as a share of the most probable one
    repetition_penalty: float = 1.0  # divides (multiplies, if negative) the logit of a token that stands in prompt or output
    presence_penalty: float = 0.0  # taken off the logit of a token that stands in the output
    frequency_penalty: float = 0.0  # taken off for every time it stands there
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    seed: int | None = None  # None: a new draw every time
    n: int = 1  # choices; each draws from its own stream of the seed
    min_tokens: int = 0  # neither the end of the document nor a stop id before
    stop: tuple[str, ...] = ()  # text that ends the output and is not part of it
    stop_ids: tuple[int, ...] = ()
    ignore_end: bool = False  # the end-of-document token is a token like any other
    logprobs: int | None = None  # natural log, of the model's own distribution: of the token, and this many most probable ones
    prompt_logprobs: bool = False
    grammar: Grammar | None = None
    gates: bool = False  # report how strongly memory spoke

    def __post_init__(self) -> None:
        inf = float("inf")
        for name, allowed, fits in (
            ("max_tokens", "at least 1", self.max_tokens >= 1),
            ("temperature", "0 (greedy) or more", 0 <= self.temperature < inf),
            ("top_k", "0 (no limit) or more", self.top_k >= 0),
            ("top_p", "above 0, at most 1", 0 < self.top_p <= 1),
            ("min_p", "0 to 1", 0 <= self.min_p <= 1),
            ("repetition_penalty", "above 0", 0 < self.repetition_penalty < inf),
            ("presence_penalty", "a finite number", abs(self.presence_penalty) < inf),
            ("frequency_penalty", "a finite number", abs(self.frequency_penalty) < inf),
            ("logit_bias", "pairs of a token id and a number below infinity", all(bias < inf for _, bias in self.logit_bias)),
            ("seed", "an integer from -2**63 to 2**63 - 1, or None", self.seed is None or -(2**63) <= self.seed < 2**63),
            ("n", "at least 1", self.n >= 1),
            ("min_tokens", "0 to max_tokens", 0 <= self.min_tokens <= self.max_tokens),
            ("stop", "strings that are not empty", all(self.stop)),
            ("logprobs", f"None, or 0 to {MOST_LOGPROBS}", self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS),
        ):
            if not fits:
                raise RequestError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the largest logit is all there is to a choice."""
        plain = _PLAIN
        return self.temperature == 0 and all(getattr(self, name) == value for name, value in plain.items())


_PLAIN = {
    field.name: field.default
    for field in fields(SamplingParams)
    if field.name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "min_tokens", "logprobs", "grammar")
}


class TokenOut(NamedTuple):
    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (id, log-probability), the most probable first
    gate: float | None = None  # how strongly memory spoke where this token was predicted: mean over memory layers and streams


class Usage(NamedTuple):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache


class Event(NamedTuple):
    """Something new of one choice. `text` is safe to show; `finish`: stop, length, abort, error, or None while it goes on."""

    request: str
    index: int  # type: ignore[assignment]  # of the choice; nobody looks a value up in an event
    tokens: tuple[TokenOut, ...] = ()
    text: str = ""
    finish: str | None = None
    stopped_by: str | int | None = None  # the stop string or token id
    error: ByroteError | None = None
    usage: Usage | None = None  # with `finish`
    prompt: tuple[TokenOut, ...] = ()  # with prompt_logprobs, in the first event of choice 0


class TokenMask(Protocol):
    """A grammar at one point of a text."""

    def forbid(self, logits_V: torch.Tensor) -> None:
        """Set the logits of impossible tokens to −∞, in place."""

    def accept(self, token: int) -> None: ...


class TextStream:
    """Text of tokens as it becomes certain, up to the first stop string; bytes that are no UTF-8 show as U+FFFD."""

    def __init__(self, tokenizer: ByteTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, token: int) -> str:
        """The text that `token` makes certain."""
        self._held += self._decoder.decode(self._tokenizer.token_bytes(token))
        found = [(self._held.find(one), one) for one in self._stop if one in self._held]
        if found:
            place, self.stopped_by = min(found)
            self._held, certain = "", self._held[:place]
            return certain
        cut = len(self._held) - self._open()
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def finish(self) -> str:
        """What is still held, when no more tokens come."""
        rest, self._held = self._held, ""
        return "" if self.stopped_by else rest + self._decoder.decode(b"", final=True)

    def _open(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        text, longest = self._held, max(map(len, self._stop), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((size for size in sizes if any(one.startswith(text[-size:]) for one in self._stop)), 0)


class Choice:
    """One choice of a request. `known` tokens are prompt and output; the caches hold a part of them (`cached`, kept by the engine)."""

    def __init__(
        self,
        *,
        request: str,
        index: int,
        ids: Sequence[int],
        params: SamplingParams,
        end_ids: Collection[int],
        max_tokens: int,
        stream: TextStream | None,
        mask: TokenMask | None,
        pack: str | None,
        arrival: int,
    ) -> None:
        self.request, self.index, self.params, self.pack, self.arrival = request, index, params, pack, arrival
        self.prompt, self.output = list(ids), list[int]()
        self.ends = frozenset(params.stop_ids) | (frozenset() if params.ignore_end else frozenset(end_ids))
        self.max_tokens, self.stream, self.mask = max_tokens, stream, mask
        self.generator = torch.Generator()
        self.generator.seed() if params.seed is None else self.generator.manual_seed((params.seed + 0x9E3779B97F4A7C15 * index) % 2**64)
        self.is_plain = params.is_plain_greedy and not params.gates  # the largest logit is all there is to it
        self.finish: str | None = None
        self.stopped_by: str | int | None = None
        self.cached = 0  # known tokens that the batch's state holds
        self.cached_tokens = 0  # of the prompt, from the prefix cache
        self.prompt_out: list[TokenOut] = []
        self._counts: dict[int, int] = {}

    @property
    def known(self) -> list[int]:
        return self.prompt + self.output

    @property
    def ahead(self) -> list[int]:
        """Known tokens that wait to be read."""
        return self.known[self.cached :] if self.cached < len(self.prompt) else self.output[self.cached - len(self.prompt) :]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def wants_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are still to be reported."""
        return self.params.prompt_logprobs and not self.output

    @property
    def counts(self) -> dict[int, int]:
        """How often each token stands in the output."""
        return self._counts

    def take(self, token: TokenOut) -> Event:
        """Add the token that was chosen; says whether the choice ends with it."""
        self.output.append(token.id)
        self._counts[token.id] = self._counts.get(token.id, 0) + 1
        if self.mask is not None:
            self.mask.accept(token.id)
        text = ""
        if token.id in self.ends and len(self.output) > self.params.min_tokens:
            self.finish, self.stopped_by = "stop", token.id
        elif self.stream is not None:
            text = self.stream.push(token.id)
            if self.stream.stopped_by is not None:
                self.finish, self.stopped_by = "stop", self.stream.stopped_by
        if self.finish is None and len(self.output) >= self.max_tokens:
            self.finish = "length"
        if self.finish is not None and self.stream is not None:
            text += self.stream.finish()
        return self.event(tokens=(token,), text=text)

    def end(self, finish: str, error: ByroteError | None = None) -> Event:
        """Stop here, with the text that was held back."""
        self.finish = finish
        return self.event(text="" if self.stream is None else self.stream.finish(), error=error)

    def event(self, *, tokens: tuple[TokenOut, ...] = (), text: str = "", error: ByroteError | None = None) -> Event:
        """An event of this choice as it stands."""
        prompt, self.prompt_out = tuple(self.prompt_out), []
        usage = Usage(len(self.prompt), len(self.output), self.cached_tokens) if self.finish else None
        return Event(
            request=self.request,
            index=self.index,
            tokens=tokens,
            text=text,
            finish=self.finish,
            stopped_by=self.stopped_by,
            error=error,
            usage=usage,
            prompt=prompt,
        )
