"""A model to talk to from Python: the engine with a checkpoint's model and tokenizer, and nobody else's requests.

llm = byrote.LLM("runs/quickstart")
for answer in llm.generate(["def main(", "class Reader:"], SamplingParams(temperature=0)): print(answer.text)
for event in llm.stream("def main("): print(event.text, end="")
"""

import os
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeGuard, cast

import torch

from byrote.checkpoint.local import load
from byrote.device import keep_freed_memory
from byrote.engine.engine import Engine, EngineConfig
from byrote.engine.request import Event, SamplingParams, TokenOut, Usage
from byrote.errors import RequestError
from byrote.tokenizer.chat import chat_template

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Completion:
    """One choice of one prompt, whole. `ids` hold the end token where one ended it; `text` does not."""

    text: str
    ids: tuple[int, ...]
    finish: str
    tokens: tuple[TokenOut, ...]
    prompt: tuple[TokenOut, ...]  # with prompt_logprobs
    index: int
    usage: Usage


class LLM:
    """The newest checkpoint of a run, or one checkpoint. A prompt is the beginning of a document, or token ids as they are.

    `weights`: "saved", or "int8" to serve on the CPU from a quarter of the memory, as `byrote.load` says.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device = "auto",
        weights: str = "saved",
        config: EngineConfig | None = None,
    ) -> None:
        keep_freed_memory()
        self.model, self.tokenizer = load(path, device=device, weights=weights)
        self.engine = Engine(self.model, self.tokenizer, config, name=str(path))
        self._inbox: dict[str, deque[Event]] = {}  # request → events nobody has taken yet
        self._open: dict[str, int] = {}  # request → choices that have not ended

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        pack: str | None = None,
    ) -> list[Completion]:
        """Answers in the order of the prompts, `n` for each. `params`: for all, or one for each prompt. The first error is raised."""
        several: list[Prompt] = [prompts] if _is_prompt(prompts) else cast(list[Prompt], list(prompts))
        each = list(params) if isinstance(params, Sequence) else [params] * len(several)
        if len(each) != len(several):
            raise RequestError(f"{len(several)} prompts and {len(each)} params; give one for all, or as many as prompts")
        names: list[str] = []
        try:
            for prompt, one in zip(several, each, strict=True):
                names.append(self._add(prompt, one, pack))
            events = [event for name in names for event in sorted(self._events(name), key=lambda event: event.index)]
            return [_completion(list(choice)) for _, choice in groupby(events, key=lambda event: (event.request, event.index))]
        finally:
            for name in names:
                self._leave(name)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, pack: str | None = None) -> Generator[Event, None, None]:
        """Events of one prompt as they come. Leaving the loop early ends the request; several streams may run side by side."""
        name = self._add(prompt, params, pack)
        try:
            yield from self._events(name)
        finally:
            self._leave(name)

    def chat(
        self, messages: Sequence[Mapping[str, str]], params: SamplingParams | None = None, *, pack: str | None = None
    ) -> list[Completion]:
        """Answers to a conversation, by the chat template of the tokenizer. Raises RequestError for a model that has none."""
        return self.generate(self.chat_ids(messages), params, pack=pack)

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The prompt of a conversation, up to where the answer begins."""
        if self.tokenizer is None:
            raise RequestError("this model was saved without a tokenizer: give token ids to generate")
        return chat_template(self.tokenizer).encode(messages)

    def _add(self, prompt: Prompt, params: SamplingParams | None, pack: str | None) -> str:
        name = self.engine.add_request(self.engine.encode_prompt(prompt) if isinstance(prompt, str) else prompt, params, pack=pack)
        self._inbox[name], self._open[name] = deque(), 1 if params is None else params.n
        return name

    def _leave(self, name: str) -> None:
        self.engine.abort(name)
        del self._inbox[name], self._open[name]

    def _events(self, name: str) -> Iterator[Event]:
        """All events of a request; those of others that come with them are kept for whoever waits for them."""
        while self._open[name] or self._inbox[name]:
            for event in self.engine.step() if not self._inbox[name] else ():
                if event.request in self._inbox:
                    self._inbox[event.request].append(event)
                    self._open[event.request] -= event.finish is not None
            while self._inbox[name]:
                event = self._inbox[name].popleft()
                if event.error is not None:
                    raise event.error
                yield event


def _is_prompt(prompts: Prompt | Sequence[Prompt]) -> TypeGuard[Prompt]:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))


def _completion(events: Sequence[Event]) -> Completion:
    last, tokens = events[-1], tuple(token for event in events for token in event.tokens)
    assert last.finish is not None and last.usage is not None, "the engine stopped before this request had ended"
    text, prompt = "".join(event.text for event in events), tuple(token for event in events for token in event.prompt)
    return Completion(text, tuple(token.id for token in tokens), last.finish, tokens, prompt, last.index, last.usage)
