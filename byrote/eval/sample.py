"""Text from a model, one token at a time: choose an id, decode its bytes, stop where asked.

    prompt ids ──▶ model + DecodeState ──▶ logits of the last position ──▶ pick ──▶ id ──▶ bytes ──▶ text
                        ▲                                                           │
                        └───────────────────────────────────────────────────────────┘

Picking: logits / temperature, then the `top_k` largest, then of these the smallest set whose probability reaches `top_p`
(the one that crosses it included), then one draw. Temperature 0 takes the largest. The draw comes from a generator on the
CPU in fp32, so that a seed means the same on every device, up to differences in the logits themselves.

A token of a byte-level vocabulary may end in the middle of a character, and a stop string may end in the middle of a token.
So bytes are held until they are whole characters, and text is held as long as it could be the start of a stop string:

    stop "END"      tokens  "the E" "N" "T" " E" "ND of"      pieces  "the " "" "ENT" " " (stop found, nothing more)
"""

import codecs
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from byrote.errors import RequestError
from byrote.model.capture import capture_or_model

PREFILL_TOKENS = 512  # of the prompt in one forward pass: bounds memory, changes no result


class ByteTokenizer(Protocol):
    """What decoding needs of a tokenizer."""

    begin_id: int
    end_id: int

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, token: int) -> bytes: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop besides at the end of the document."""

    max_tokens: int = 256
    temperature: float = 0.8  # 0: always the most probable token
    top_k: int = 0  # choose among this many; 0: no limit
    top_p: float = 1.0  # choose among the most probable tokens that together reach this share
    seed: int | None = None  # None: a new draw every time
    stop: tuple[str, ...] = ()  # text that ends the output and is not part of it

    def __post_init__(self) -> None:
        for name, allowed, fits in (
            ("max_tokens", "at least 1", self.max_tokens >= 1),
            ("temperature", "0 (greedy) or more", 0 <= self.temperature < float("inf")),
            ("top_k", "0 (no limit) or more", self.top_k >= 0),
            ("top_p", "above 0, at most 1", 0 < self.top_p <= 1),
            ("stop", "strings that are not empty", all(self.stop)),
        ):
            if not fits:
                raise RequestError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")


def generate(model: Any, tokenizer: ByteTokenizer, prompt: str, params: SamplingParams) -> Iterator[str]:
    """Pieces of text that continue `prompt`, the beginning of a document, until its end, a stop string or max_tokens."""
    ids = generate_ids(model, prompt_ids(tokenizer, prompt), params, end_ids=(tokenizer.end_id,))
    return decode_pieces(tokenizer, ids, params.stop)


def prompt_ids(tokenizer: ByteTokenizer, prompt: str) -> list[int]:
    """`prompt` as training documents begin: with the begin token. An empty prompt is a document yet to be written."""
    return [tokenizer.begin_id, *tokenizer.encode(prompt)]


def generate_ids(
    model: Any, ids: Sequence[int], params: SamplingParams, *, end_ids: Collection[int] = (), step: Any = None
) -> Iterator[int]:
    """Ids that continue `ids`, at most `params.max_tokens`; one of `end_ids` ends them and is not given out.

    `step` is what reads tokens: the model, or a captured step of it; None takes the captured one where there is one.
    `params.stop` is about text: `decode_pieces` looks for it. Raises RequestError without a first id: a model continues.
    """
    if not ids:
        raise RequestError("there are no ids to continue; begin with the tokenizer's begin_id")
    generator = torch.Generator()
    generator.seed() if params.seed is None else generator.manual_seed(params.seed)
    step = capture_or_model(model)[0] if step is None else step
    state = model.new_state(batch=1)
    logits_V = _prefill(step, state, ids)
    for made in range(params.max_tokens):
        token = pick(logits_V, params, generator)
        if token in end_ids:
            return
        yield token
        if made + 1 < params.max_tokens:
            logits_V = _forward(step, state, [token])


def _prefill(step: Any, state: Any, ids: Sequence[int]) -> Tensor:
    for start in range(0, len(ids), PREFILL_TOKENS):
        logits_V = _forward(step, state, ids[start : start + PREFILL_TOKENS])
    return logits_V


@torch.inference_mode()
def _forward(step: Any, state: Any, ids: Sequence[int]) -> Tensor:
    """Logits behind the last of `ids`, in fp32 on the CPU."""
    tokens_BT = torch.tensor([list(ids)], dtype=torch.int64, device=state.device)
    return step(tokens_BT, state=state).logits[0, -1].float().cpu()


def pick(logits_V: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """One id drawn from fp32 `logits_V` on the CPU."""
    if params.temperature == 0:
        return int(logits_V.argmax())
    if params.top_k == 0 and params.top_p == 1:
        return _draw(_share(logits_V, params.temperature), generator)
    values_V, ids_V = torch.sort(logits_V, descending=True, stable=True)
    shares_K = _share(values_V[: params.top_k or None], params.temperature)
    before_K = shares_K.cumsum(0) - shares_K  # what more probable tokens already hold
    return int(ids_V[_draw(shares_K.where((before_K < params.top_p) | (params.top_p == 1), 0.0), generator)])


def _share(logits_K: Tensor, temperature: float) -> Tensor:
    return torch.softmax((logits_K - logits_K.max()) / temperature, dim=0)


def _draw(weights_K: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(weights_K, 1, generator=generator))


def decode_pieces(tokenizer: ByteTokenizer, ids: Iterable[int], stop: Sequence[str] = ()) -> Iterator[str]:
    """Whole characters of `ids` as they become certain, up to the first stop string; bytes that are no UTF-8 show as U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    held = ""
    for token in ids:
        held += decoder.decode(tokenizer.token_bytes(token))
        if _first(held, stop) is not None:
            break
        certain = len(held) - _open(held, stop)
        if certain:
            yield held[:certain]
            held = held[certain:]
    else:
        held += decoder.decode(b"", final=True)
    rest = held[: _first(held, stop)]
    if rest:
        yield rest


def _first(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string in `text` begins."""
    found = [text.find(one) for one in stop if one in text]
    return min(found) if found else None


def _open(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    longest = max(map(len, stop), default=1) - 1
    return next((size for size in range(min(longest, len(text)), 0, -1) if any(one.startswith(text[-size:]) for one in stop)), 0)
