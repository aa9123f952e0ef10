"""Text from one model and one prompt, one token at a time: the plain loop, without the engine's batch and caches.

    prompt ids ──▶ model + DecodeState ──▶ logits of the last position ──▶ choose ──▶ id ──▶ TextStream ──▶ text
                        ▲                                                              │
                        └──────────────────────────────────────────────────────────────┘

Choices and text are the engine's own (`engine/sampler.py`, `engine/request.py`), so a seed draws here what it draws there.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from byrote.engine.request import ByteTokenizer, Choice, SamplingParams, TextStream
from byrote.engine.sampler import choose
from byrote.errors import RequestError
from byrote.model.capture import capture_or_model

PREFILL_TOKENS = 512  # of the prompt in one forward pass: bounds memory, changes no result


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
    if params.n > 1 or params.grammar is not None:
        raise RequestError("several choices and grammars are for the engine: byrote.LLM")
    choice = _choice(ids, params, end_ids)
    step = capture_or_model(model)[0] if step is None else step
    state = model.new_state(batch=1)
    logits_V = _prefill(step, state, ids)
    while choice.finish is None:
        token = choose(logits_V, choice)
        choice.take(token)
        if choice.finish == "stop":
            return
        yield token.id
        if choice.finish is None:
            logits_V = _forward(step, state, [token.id])


def _choice(ids: Sequence[int], params: SamplingParams, end_ids: Collection[int]) -> Choice:
    return Choice(
        request="",
        index=0,
        ids=ids,
        params=params,
        end_ids=end_ids,
        max_tokens=params.max_tokens,
        stream=None,
        mask=None,
        pack=None,
        arrival=0,
    )


def _prefill(step: Any, state: Any, ids: Sequence[int]) -> Tensor:
    for start in range(0, len(ids), PREFILL_TOKENS):
        logits_V = _forward(step, state, ids[start : start + PREFILL_TOKENS])
    return logits_V


@torch.inference_mode()
def _forward(step: Any, state: Any, ids: Sequence[int]) -> Tensor:
    """Logits behind the last of `ids`, in fp32 on the CPU."""
    tokens_BT = torch.tensor([list(ids)], dtype=torch.int64, device=state.device)
    return step(tokens_BT, state=state).logits[0, -1].float().cpu()


def decode_pieces(tokenizer: ByteTokenizer, ids: Iterable[int], stop: Sequence[str] = ()) -> Iterator[str]:
    """Whole characters of `ids` as they become certain, up to the first stop string; bytes that are no UTF-8 show as U+FFFD."""
    stream = TextStream(tokenizer, stop)
    for token in ids:
        if piece := stream.push(token):
            yield piece
        if stream.stopped_by is not None:
            return
    if rest := stream.finish():
        yield rest
