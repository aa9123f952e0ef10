"""The model's part of the engine: one call of it, and texts on their way through it.

    Reading   a prompt going in, a chunk at a time          a state of its own
    Batch     texts being continued, a row each             one state for all, padded on the left

A short call is handed to the captured step (`model/capture.py`) where there is one, any other to the model; both append to the same
state. Rows of memory are asked for as soon as tokens are known, and waited for when the model is called: a whole prompt's
before its first chunk, a batch's next ones when they are chosen, while other work goes on.

Shapes: B texts, T tokens, L last positions whose logits are wanted, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byrote.engine.cache import PAGE, Page, Text, assemble, take_up
from byrote.engine.request import Choice
from byrote.kernels.decode_step.cpu import MOST_ROWS
from byrote.memory.conditional import PendingRows, Rows
from byrote.model.capture import capture_or_model
from byrote.model.state import DecodeState
from byrote.model.transformer import Model


class Result(NamedTuple):
    logits_BLV: Tensor  # fp32, on the CPU
    gates_BL: Tensor | None  # how strongly memory spoke: mean over the memory layers of the text, packs included, and streams


class Runner:
    """Calls the model. `with_drafts`: whether states let the MTP modules read along. `why_not`: why nothing is captured, or empty."""

    def __init__(self, model: Model, *, captured: bool, max_rollback: int, with_drafts: bool) -> None:
        self.model, self._max_rollback, self.with_drafts = model, max_rollback, with_drafts
        self._step: Any
        self._step, self.why_not = capture_or_model(model) if captured else (model, "switched off")

    @torch.inference_mode()
    def new_state(self, batch: int) -> DecodeState:
        return self.model.new_state(batch, max_rollback=self._max_rollback, drafts=self.with_drafts)

    @torch.inference_mode()
    def assemble(self, texts: Sequence[Text]) -> DecodeState:
        return assemble(self.new_state, texts)

    @torch.inference_mode()
    def take_up(self, pages: Sequence[Page]) -> DecodeState:
        return take_up(self.new_state, pages)

    @torch.inference_mode()
    def run(
        self,
        tokens: Sequence[Sequence[int]],
        state: DecodeState,
        packs: Sequence[str | None],
        *,
        last: int = 1,
        rows: Rows | None = None,
        gates: bool = False,
    ) -> Result:
        """Read `tokens`, one list a row, all equally long; logits of the `last` positions."""
        tokens_BT = torch.tensor(tokens, dtype=torch.int64, device=state.device)
        want = ("gates",) if gates else ()
        if self.model.packs or want or tokens_BT.numel() > MOST_ROWS:
            chosen = [() if pack is None else (pack,) for pack in packs] if self.model.packs else None
            output = self.model(tokens_BT, state=state, rows=rows, packs=chosen, last=last, want=want)
        else:
            output = self._step(tokens_BT, state=state, rows=rows)
        logits_BLV = output.logits[:, -last:].float().cpu()
        return Result(logits_BLV, _strength(output.extras["gates"], logits_BLV) if want else None)

    @torch.inference_mode()
    def draft(self, state: DecodeState, tokens: Sequence[int], count: int) -> list[list[int]]:
        """`count` guesses of what follows each of `tokens`, which follow what `state` holds."""
        return self._step.draft(state, torch.tensor(tokens, device=state.device)[:, None], count).tolist()

    @torch.inference_mode()
    def ask(self, tokens: Sequence[Sequence[int]], state: DecodeState) -> PendingRows | None:
        """Start reading the rows of memory that `tokens` will need next."""
        if self.model.memory is None:
            return None
        return self.model.memory.prefetch(torch.tensor(tokens, dtype=torch.int64, device=state.device), None, state)


def _strength(gates: Sequence[Tensor], logits_BLV: Tensor) -> Tensor:
    """[B, L]: mean over streams and those layers that speak to the text; 0 where none does."""
    B, L = logits_BLV.shape[:2]
    spoken = [gates_BTR.float().mean(-1)[:, -L:].cpu() for gates_BTR in gates]
    return torch.stack([torch.full((B, L), float("nan")), *spoken]).nanmean(0).nan_to_num(0.0)


class Reading:
    """The choices of one request, which share all known tokens, while these go in. `start`: a state that has read some already."""

    def __init__(self, runner: Runner, choices: list[Choice], state: DecodeState, *, matched: int) -> None:
        first = choices[0]
        self.choices, self.state, self.matched = choices, state, matched
        self.is_resumed = bool(first.output)
        self.tokens = first.known[:-1] if self.is_resumed else list(first.prompt)  # the newest output is read by the batch
        self._runner = runner
        self._asked = runner.ask([self.tokens[state.length :]], state)
        self._offset = state.length
        self._rows: Rows | None = None

    @property
    def is_done(self) -> bool:
        return self.state.length == len(self.tokens)

    def next_end(self, most: int, *, at_borders: bool) -> int:
        """Where the next chunk of at most `most` tokens ends; with `at_borders` where other texts may go on, if one lies in reach:
        where earlier ones were seen to part, before the end of the prompt, or anywhere on the way."""
        here, total = self.state.length, len(self.tokens)
        reach = min(here + most, total)
        stops = (self.matched * PAGE, (total - 1) // PAGE * PAGE, reach // PAGE * PAGE)
        return next((stop for stop in stops if at_borders and here < stop <= reach), reach)

    def read(self, end: int, *, last: int = 1, gates: bool = False) -> Result:
        """Take the tokens up to `end` in."""
        here = self.state.length
        if self._asked is not None:
            self._rows, self._asked = self._asked.wait(), None
        rows = self._rows
        if rows is not None:
            rows = rows._replace(inverse_BTLN=rows.inverse_BTLN[:, here - self._offset : end - self._offset])
        tokens = [self.tokens[here:end]]
        return self._runner.run(tokens, self.state, [self.choices[0].pack], last=last, rows=rows, gates=gates)

    def rebuild(self) -> None:
        """The state in the form that the model asks for now."""
        length = self.state.length
        self.state = self._runner.assemble([Text(self.state, 0, length)]) if length else self._runner.new_state(1)


class Batch:
    """Choices being continued, row by row, and the state that holds the first `cached` known tokens of each."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.choices: list[Choice] = []
        self.state: DecodeState | None = None
        self._asked: PendingRows | None = None

    def text(self, row: int) -> Text:
        assert self.state is not None, "an empty batch has no texts"
        return Text(self.state, row, self.choices[row].cached)

    def change(self, *, keep: Sequence[Choice], new: Sequence[tuple[Choice, Text]] = ()) -> None:
        """Go on with some of the choices, and with new ones; padding that no text needs goes."""
        self._asked = None
        rows = [(choice, self.text(row)) for row, choice in enumerate(self.choices) if choice in keep] + list(new)
        same = len(rows) == 1 and new and new[0][1].length == new[0][1].state.length and new[0][1].state.batch == 1
        if not rows:
            self.state = None
        elif same:
            self.state = new[0][1].state
        else:
            self.state = self._runner.assemble([text for _, text in rows])
        self.choices = [choice for choice, _ in rows]

    def keep(self, tokens: int, *, of: int) -> None:
        """Of the `of` tokens that were just read the first `tokens` were right."""
        assert self.state is not None, "an empty batch has read nothing"
        if tokens < of:
            with torch.inference_mode():
                self.state.rollback(of - tokens)
        for choice in self.choices:
            choice.cached += tokens

    def ask(self) -> None:
        """Start reading what the next step needs, if no drafts will come in between."""
        if self.state is not None and not self._runner.with_drafts:
            self._asked = self._runner.ask([choice.ahead for choice in self.choices], self.state)

    def run(self, tokens: Sequence[Sequence[int]]) -> Result:
        """Read `tokens`, equally many of each choice, with the logits of all."""
        assert self.state is not None, "an empty batch reads nothing"
        rows = None if self._asked is None else self._asked.wait()
        self._asked = None
        gates = any(choice.params.gates for choice in self.choices)
        packs = [choice.pack for choice in self.choices]
        return self._runner.run(tokens, self.state, packs, last=len(tokens[0]), rows=rows, gates=gates)
