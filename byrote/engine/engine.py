"""The engine: requests in, events out, one step at a time. Token ids in, token ids out; with a tokenizer text as well.

    add_request ──▶ waiting ──▶ reading ──▶ batch ──▶ finished          step() moves all of it on (`loop.py`) and says what happened

One thread owns an engine; nothing here waits but `step`.

What a request says does not depend on its neighbours: rows are computed side by side, choices are made row by row (`sampler.py`), padding
is masked. What differs is the shape of the products, by a few units of the last place; so "the same" holds up to the first place
where two logits, or two experts, are that close.

A pack is chosen per request, and one batch mixes requests with different packs or none. Packs come and go while requests run: one that
is unloaded takes no new requests and goes when its last one has ended.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from byrote.checkpoint.packs import open_pack
from byrote.engine.cache import PAGE, pages_of
from byrote.engine.grammar import Grammars
from byrote.engine.loop import Loop
from byrote.engine.request import ByteTokenizer, Choice, Event, SamplingParams, TextStream
from byrote.engine.runner import Runner
from byrote.engine.scheduler import Scheduler
from byrote.engine.speculative import Drafter
from byrote.errors import CapacityError, ConfigError, PromptTooLong, RequestError
from byrote.model.pack import Pack, attach, detach
from byrote.model.transformer import Model

_SPECULATE = ("auto", "always", "off")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    max_batch: int = 16  # choices continued at once
    cache_tokens: int = 65_536  # of all caches together, kept prefixes included
    chunk_tokens: int = 1024  # of prompts in one step
    max_waiting: int = 1024  # requests
    max_length: int | None = None  # prompt and output; None: the model's max_positions
    prefix_cache: bool = True
    speculate: str = "auto"  # with MTP, where the model has it and it pays; "always" whether it pays or not; "off"
    max_drafts: int = 3  # a step
    captured: bool = True  # short steps in one C call, where that is possible

    def __post_init__(self) -> None:
        for name, least in (("max_batch", 1), ("cache_tokens", 2 * PAGE), ("chunk_tokens", 1), ("max_waiting", 1), ("max_drafts", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"engine {name} is {getattr(self, name)}; it must be at least {least}")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"engine max_length is {self.max_length}; it must be at least 2: a prompt and an answer")
        if self.speculate not in _SPECULATE:
            raise ConfigError(f"engine speculate is {self.speculate!r}; allowed: {', '.join(_SPECULATE)}")


class Stats(NamedTuple):
    waiting: int  # choices
    running: int
    pages_used: int
    pages_total: int
    pages_kept: int  # of those used: prefixes, for later prompts
    prefix_hit_tokens: int
    prompt_tokens: int
    output_tokens: int
    preemptions: int
    finished: int  # choices, whatever ended them
    aborted: int
    errors: int
    steps: int
    drafted: tuple[int, ...]  # by draft position: drafts that were judged …
    accepted: tuple[int, ...]  # … and right
    speculating: bool


class Engine:
    """`name` belongs to the key of kept prefixes. Without a tokenizer events carry ids only; text stops and grammars are refused."""

    def __init__(
        self, model: Model, tokenizer: ByteTokenizer | None = None, config: EngineConfig | None = None, *, name: str = "model"
    ) -> None:
        config = EngineConfig() if config is None else config
        self.model, self.tokenizer, self.config, self.name = model, tokenizer, config, name
        drafts = config.max_drafts if len(model.mtp) and config.speculate != "off" else 0
        self.drafter = Drafter(drafts, fixed=config.speculate == "always")
        self.runner = Runner(model, captured=config.captured, max_rollback=max(drafts, 1), with_drafts=drafts > 0)
        self.scheduler = Scheduler(max_batch=config.max_batch, pages=config.cache_tokens // PAGE)
        self.max_length = min(config.max_length or model.config.max_positions, self.scheduler.pages * PAGE - drafts - 1)
        self._loop = Loop(
            self.runner,
            self.scheduler,
            self.drafter,
            chunk_tokens=config.chunk_tokens,
            prefix_cache=config.prefix_cache,
            prefix_root=self._prefix_root,
        )
        self._grammars = None if tokenizer is None else Grammars(tokenizer, model.config.vocab_size)
        self._live: dict[str, list[Choice]] = {}
        self._arrivals, self._weights, self._generations = count(), 0, dict[str | None, int]()
        self._leaving: set[str] = set()  # packs

    # ── requests ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def encode_prompt(self, text: str) -> list[int]:
        """`text` as training documents begin: with the begin token."""
        if self.tokenizer is None:
            raise RequestError("this engine has no tokenizer: give token ids")
        return [self.tokenizer.begin_id, *self.tokenizer.encode(text)]

    def add_request(
        self, ids: Sequence[int], params: SamplingParams | None = None, *, request: str | None = None, pack: str | None = None
    ) -> str:
        """Queue a prompt; returns the request's id. `max_tokens` is cut to what `max_length` leaves.

        Raises RequestError for what can never be served, CapacityError for what cannot be now (the queue is full).
        """
        params, arrival = params or SamplingParams(), next(self._arrivals)
        request = f"request-{arrival}" if request is None else request
        self._check(ids, params, request, pack)
        if len(self.scheduler.waiting) >= self.config.max_waiting:
            raise CapacityError(f"{len(self.scheduler.waiting)} requests are waiting, no more than that are taken; try again later")
        choices = [self._choice(ids, params, request, index, pack, arrival) for index in range(params.n)]
        self._live[request] = choices
        self.scheduler.waiting.append(list(choices))
        return request

    def _check(self, ids: Sequence[int], params: SamplingParams, request: str, pack: str | None) -> None:
        vocab_size = self.model.config.vocab_size
        named = [*ids, *params.stop_ids, *(token for token, _ in params.logit_bias)]
        outside = next((token for token in named if not 0 <= token < vocab_size), None)
        for wrong, message in (
            (not ids, "there are no ids to continue; begin with the tokenizer's begin_id"),
            (outside is not None, f"token id {outside} lies outside the model's vocabulary 0..{vocab_size - 1}"),
            (request in self._live, f"a request with id {request!r} is in use; choose another, or leave the choice to the engine"),
            (
                pack is not None and pack not in self.packs(),
                f"no pack named {pack!r} is loaded; loaded: {', '.join(self.packs()) or 'none'}",
            ),
            (params.n > self.config.max_batch, f"n is {params.n}; this engine continues at most {self.config.max_batch} choices at once"),
            (
                params.n * pages_of(len(ids) + 1) > self.scheduler.pages,
                f"{params.n} choices of {len(ids)} tokens do not fit into a cache of {self.scheduler.pages * PAGE} tokens; lower n",
            ),
            (
                self.tokenizer is None and (params.stop or params.grammar),
                "this engine has no tokenizer: stop strings and grammars need one",
            ),
            (
                params.gates and self.model.memory is None and not self.packs(),
                "this model has no memory whose gates could be reported: engram is none, and no pack is loaded",
            ),
        ):
            if wrong:
                raise RequestError(message)
        if len(ids) >= self.max_length:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens; at most {self.max_length - 1} leave room for an answer (max_length {self.max_length})"
            )

    def _choice(self, ids: Sequence[int], params: SamplingParams, request: str, index: int, pack: str | None, arrival: int) -> Choice:
        ends = () if self.tokenizer is None else (self.tokenizer.end_id,)
        choice = Choice(
            request=request,
            index=index,
            ids=ids,
            params=params,
            end_ids=ends,
            max_tokens=min(params.max_tokens, self.max_length - len(ids)),
            stream=None if self.tokenizer is None else TextStream(self.tokenizer, params.stop),
            mask=None,
            pack=pack,
            arrival=arrival,
        )
        if params.grammar is not None:
            assert self._grammars is not None, "a grammar without a tokenizer was refused"
            choice.mask = self._grammars.mask(params.grammar, choice.ends)
        return choice

    def abort(self, request: str) -> bool:
        """End a request and free what it holds; the events that say so come with the next step. False if there is none of this id."""
        if request not in self._live:
            return False
        self._loop.totals["aborted"] += 1
        self._loop.end(self._live.pop(request), "abort")
        self._loop.sweep()
        return True

    def step(self) -> list[Event]:
        """Continue what runs, read what waits; what happened."""
        if self._live:
            self._loop.step()
            self._live = {request: choices for request, choices in self._live.items() if not all(choice.finish for choice in choices)}
            self._drop_packs()
            if not self._live:
                self.check_integrity()
        events, self._loop.events = self._loop.events, []
        return events

    def has_work(self) -> bool:
        """Whether a step would do or say anything."""
        return bool(self._live or self._loop.events)

    def running(self) -> list[str]:
        """Ids of the requests that are being read or continued."""
        reading = self._loop.reading
        return list(dict.fromkeys(choice.request for choice in (*self._loop.batch.choices, *(reading.choices if reading else ()))))

    def waiting(self) -> list[str]:
        return list(dict.fromkeys(group[0].request for group in self.scheduler.waiting))

    # ── packs and weights ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def packs(self) -> list[str]:
        """Names that a request may choose."""
        return [name for name in self.model.packs if name not in self._leaving]

    def load_pack(self, name: str, pack: Pack | str | os.PathLike[str], *, any_base: bool = False) -> None:
        """Put a pack on under `name`, from its folder or as it is. Requests that run go on without it. Raises MemoryPackError."""
        if name in self._leaving:
            raise RequestError(f"the pack {name!r} is still used and leaves when the last request with it has ended; try again then")
        pack = pack if isinstance(pack, Pack) else open_pack(pack)
        fingerprint = getattr(self.tokenizer, "fingerprint", None)
        attach(self.model, pack, name, tokenizer=fingerprint() if fingerprint else None, any_base=any_base)
        self._generations[name] = self._generations.get(name, 0) + 1
        self._loop.rebuild()

    def unload_pack(self, name: str) -> None:
        """Take no more requests for a pack, and take it off when the last one that uses it has ended."""
        if name not in self.packs():
            raise RequestError(f"no pack named {name!r} is loaded; loaded: {', '.join(self.packs()) or 'none'}")
        self._leaving.add(name)
        self._drop_packs()

    def _drop_packs(self) -> None:
        used = {choice.pack for choices in self._live.values() for choice in choices if choice.finish is None}
        for name in self._leaving - used:
            detach(self.model, name)
            self._leaving.discard(name)
            self._loop.rebuild()

    def weights_changed(self) -> None:
        """To be told after weights or table rows were updated in place: what was read with the old ones is read again."""
        self._weights += 1
        self._loop.forget_caches()

    def _prefix_root(self, pack: str | None) -> bytes:
        return repr((self.name, self._weights, pack, self._generations.get(pack, 0), self.runner.with_drafts)).encode()

    # ── what is going on ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def stats(self) -> Stats:
        loop, totals = self._loop, self._loop.totals
        reading = loop.reading.choices if loop.reading else []
        return Stats(
            waiting=sum(len(group) for group in self.scheduler.waiting),
            running=len(loop.batch.choices) + len(reading),
            pages_used=len(loop.pages) + loop.held(),
            pages_total=self.scheduler.pages,
            pages_kept=len(loop.pages),
            drafted=tuple(self.drafter.drafted),
            accepted=tuple(self.drafter.accepted),
            speculating=self.runner.with_drafts,
            **totals,
        )

    def check_integrity(self) -> None:
        """AssertionError if a choice is lost or held twice, a row holds other tokens than it should, or a page is lost or miscounted."""
        loop, state = self._loop, self._loop.batch.state
        held = [
            *loop.batch.choices,
            *(loop.reading.choices if loop.reading else ()),
            *(one for group in self.scheduler.waiting for one in group),
        ]
        alive = [choice for choices in self._live.values() for choice in choices]
        assert len(set(map(id, held))) == len(held), "a choice is held twice"
        lost = [choice.request for choice in alive if choice.finish is None and choice not in held]
        assert not lost, f"requests were lost: {lost}"
        assert all(choice in alive for choice in held), "a choice is held whose request has ended"
        assert (state is None) == (not loop.batch.choices), "a batch without choices holds a state, or the other way round"
        for row, choice in enumerate(loop.batch.choices):
            assert state is not None and state.batch == len(loop.batch.choices), "the batch's state has rows of nobody"
            read = state.length if state.documents is None else int((state.documents.all()[row] >= 0).sum())
            assert read == choice.cached == int(state.places.all()[row, -1]) + 1 < choice.length + 1, (
                "a row holds other tokens than its choice"
            )
        loop.pages.check()
        used = len(loop.pages) + loop.held()
        assert used <= self.scheduler.pages or len(loop.pages) == 0, f"{used} pages are in use, there are {self.scheduler.pages}"
