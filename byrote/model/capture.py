"""A captured decoding step: the same call as the model's, for a few tokens at a time, without Python between its parts.

    step = capture(model)                        once; ConfigError names what a tape cannot express
    step(tokens_BT, state=state).logits          as model(tokens_BT, state=state).logits

`capture` walks the finished model and writes down, operation by operation, what a forward pass would do: which weights are read, where
results go, where all threads must have finished (`kernels/decode_step`). A call then prepares the state as the model itself does
(positions, documents, rows of memory), hands C the addresses of this call, and is done. Both append to the same `DecodeState`, so
that captured and ordinary steps may alternate, and roll-backs and snapshots need to know nothing.

Weights are read where they lie: training on, or loading into the same tensors, shows in the next step. What a tape cannot see, a
parameter or module exchanged, moved or hooked, is looked for at the first step of every text, and the tape is written again; until
then the tape keeps alive what it reads. Calls that a tape is not made for (more than MOST_ROWS rows, gradients, autocast, packs,
other extras than `hidden`) go to the model.

Shapes: B batch, T tokens, D model, R streams, V vocabulary.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from byrote.errors import ConfigError
from byrote.kernels import native
from byrote.kernels.decode_step import cpu
from byrote.memory.conditional import Rows
from byrote.model.batch import check_tokens
from byrote.model.draft_tape import write_draft_tape
from byrote.model.linear import GroupedLinear, Linear
from byrote.model.moe import MoE
from byrote.model.mtp import check_draft, follow
from byrote.model.state import DecodeState, Drawers, Entries, Tail, Track
from byrote.model.tape import write_tape
from byrote.model.transformer import Model, Output

_EXTRAS = frozenset({"hidden"})


def capture(model: Model) -> "Captured":
    """The model as a captured step. Raises ConfigError for a model, device or machine that has none, and says why."""
    return Captured(model)


def capture_or_model(model: Any) -> tuple[Any, str]:
    """(the captured step, "") where there is one, else (the model itself, why)."""
    if not isinstance(model, Model):
        return model, f"{type(model).__name__} is no byrote model"
    try:
        return capture(model), ""
    except ConfigError as error:
        return model, str(error)


class Captured:
    """Called like the model, by one thread at a time. `reason` says why the model itself has served since it changed, or is empty."""

    def __init__(self, model: Model) -> None:
        self.model, self.reason = model, ""
        self._tape, self._drafter, self._watch = write_tape(model), write_draft_tape(model), _Watch(model)
        self._text: Callable[[], DecodeState | None] = _no_text  # a weak reference: the state of the last call
        self._is_plain = True  # whether that state's caches are those a tape writes to
        self._drafts_from_streams = model.config.mtp is not None and model.config.mtp.form == "streams"

    @property
    def weight_bytes(self) -> int:
        """What one token reads of weights; no step is faster than memory gives them."""
        return self._tape.active_bytes

    def __call__(
        self,
        tokens_BT: Tensor,
        *,
        document_BT: Tensor | None = None,
        position_BT: Tensor | None = None,
        state: DecodeState | None = None,
        rows: Rows | None = None,
        packs: Sequence[Iterable[str]] | None = None,
        last: int | None = None,
        want: Iterable[str] = (),
    ) -> Output:
        """As `Model.forward`. Losses and loads stay empty, as nobody trains from a step of decoding."""
        want = frozenset(want)
        if state is None or not self._takes(tokens_BT, state, want) or not self._is_current(state):
            given = {"document_BT": document_BT, "position_BT": position_BT, "state": state, "rows": rows, "packs": packs}
            return self.model(tokens_BT, **given, last=last, want=want)
        check_tokens(tokens_BT, self.model.config.vocab_size, targets_BT=None, document_BT=document_BT, position_BT=position_BT)
        batch = self.model._batch(tokens_BT, document_BT, position_BT, state, rows, packs)
        hidden_BTD, logits_BTV = self._tape.run(batch)
        if state.drafts and self._drafter is not None and _is_plain_draft(state):
            self._drafter.follow(state, hidden_BTD, tokens_BT)
        elif state.drafts:
            follow(self.model._drafting(), state, hidden_BTD, tokens_BT, self.model.embed)
        logits_BTV = logits_BTV if last is None else logits_BTV[:, -last:]
        return Output(logits_BTV, {}, {}, batch.rows, {"hidden": hidden_BTD} if want else {})

    def draft(self, state: DecodeState, token_B1: Tensor, count: int = 1) -> Tensor:
        """As `Model.draft`."""
        check_draft(state, count)
        free = native.can_take(token_B1) and native.is_enabled() and not torch.is_autocast_enabled("cpu") and _is_plain_draft(state)
        if not (free and len(token_B1) <= cpu.MOST_ROWS and self._is_current(state) and self._drafter is not None):
            return self.model.draft(state, token_B1, count)
        check_tokens(token_B1, self.model.config.vocab_size, targets_BT=None)
        return self._drafter.draft(state, token_B1, count)

    def _takes(self, tokens_BT: Tensor, state: DecodeState, want: frozenset[str]) -> bool:
        few = 0 < tokens_BT.numel() <= cpu.MOST_ROWS and want <= _EXTRAS and not self.model.packs
        free = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")) and native.can_take(tokens_BT) and native.is_enabled()
        return few and free and not (state.drafts and self._drafts_from_streams)

    def _is_current(self, state: DecodeState) -> bool:
        """Whether the tape stands for the model as it is now; looked at before every text, and a new tape written where it does not."""
        if self._text() is not state:
            self._text, self._is_plain = weakref.ref(state), all(map(_is_plain, state.caches))
            if self._watch.has_changed():
                self._write_again()
        return self._is_plain and not self.reason

    def _write_again(self) -> None:
        try:
            self._tape, self._drafter, self.reason = write_tape(self.model), write_draft_tape(self.model), ""
        except ConfigError as error:
            self.reason = str(error)
        self._watch = _Watch(self.model)


def _no_text() -> None:
    return None


def _is_plain(cache: Any) -> bool:
    if type(cache) is Drawers:
        return all(map(_is_plain, cache.parts.values()))
    return type(cache) in (Track, Tail, Entries) and cache.values.dtype == torch.float32


def _is_plain_draft(state: DecodeState) -> bool:
    return all(map(_is_plain, state.drafts))


def _values(tables: list[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(table.values() for table in tables)


class _Watch:
    """Notices what changes behind a tape's back: weights that move, and modules, parameters, products and hooks exchanged."""

    def __init__(self, model: Model) -> None:
        modules = list(model.modules())
        tables: Any = [table for module in modules for table in (module._modules, module._parameters, module._buffers) if table]
        self._tables: list[dict[str, Any]] = tables
        self._held = list(_values(tables))
        self._tensors = [part for part in self._held if isinstance(part, Tensor)]
        self._places = list(map(Tensor.data_ptr, self._tensors))
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._was_hooked = any(self._hooks)
        injected = {Linear: "matmul", GroupedLinear: "matmul", MoE: "dispatcher"}
        self._owners = [module for module in modules if type(module) in injected]
        self._names = [injected[type(module)] for module in self._owners]
        self._injected = list(map(getattr, self._owners, self._names))

    def has_changed(self) -> bool:
        """Some 50 microseconds, or a hundred right after a step that filled the caches with weights."""
        same_count = sum(map(len, self._tables)) == len(self._held)
        same_parts = all(map(is_, _values(self._tables), self._held))
        same_places = list(map(Tensor.data_ptr, self._tensors)) == self._places
        same_products = all(map(is_, map(getattr, self._owners, self._names), self._injected))
        return not (same_count and same_parts and same_places and same_products and any(self._hooks) == self._was_hooked)
