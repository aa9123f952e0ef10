"""The two halves of a step, and the room they need.

    continue_batch   every choice in the batch reads its newest token, and drafts with it; behind what was right the next is chosen
    read_prompts     prompts go in, at most `chunk_tokens` of them, after prefixes that are known already; those that are in have
                     their first token chosen and join the batch

So a long prompt delays the others by one chunk a step and no more. What ends a choice is an event; a part of the step that fails ends
the choices that were in it, and no others.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from byrote.engine.cache import PAGE, Pages, Text, pages_of, usable
from byrote.engine.request import Choice, Event, TokenOut
from byrote.engine.runner import Batch, Reading, Result, Runner
from byrote.engine.sampler import choose, greedy, report_prompt
from byrote.engine.scheduler import Scheduler
from byrote.engine.speculative import Drafter
from byrote.errors import ByroteError, RequestError

COUNTED = ("prefix_hit_tokens", "prompt_tokens", "output_tokens", "preemptions", "finished", "aborted", "errors", "steps")


class Loop:
    """`prefix_root(pack)` names what a prefix was read with: pages of another root are never used."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        drafter: Drafter,
        *,
        chunk_tokens: int,
        prefix_cache: bool,
        prefix_root: Callable[[str | None], bytes],
    ) -> None:
        self.runner, self.scheduler, self.drafter = runner, scheduler, drafter
        self.pages, self.batch = Pages(), Batch(runner)
        self.reading: Reading | None = None
        self.events: list[Event] = []
        self.totals = dict.fromkeys(COUNTED, 0)
        self._chunk_tokens, self._prefix_cache, self._prefix_root = chunk_tokens, prefix_cache, prefix_root

    def step(self) -> None:
        self.totals["steps"] += 1
        self._guarded(self.batch.choices, self.continue_batch)
        self.sweep()
        self.read_prompts()
        self._follow_drafter()
        self.batch.ask()

    # ── the batch ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def continue_batch(self) -> None:
        batch, drafts = self.batch, self._drafts_now()
        if not batch.choices:
            return
        self._make_room(drafts + 1)
        start, rows = time.perf_counter(), len(batch.choices)
        tokens = self._tokens_now(drafts)
        right = self._choose_all(tokens, batch.run(tokens))
        fewest = min((count for count, choice in zip(right, batch.choices, strict=True) if choice.finish is None), default=len(tokens[0]))
        batch.keep(fewest, of=len(tokens[0]))
        self.drafter.record(rows, drafts, time.perf_counter() - start, fewest)
        if self._prefix_cache:
            self._keep_generated(fewest)

    def _drafts_now(self) -> int:
        """Drafts of the next step, as many as may still be accepted. Choices that know more already take part with that."""
        choices = self.batch.choices
        if not choices or not self.runner.with_drafts:
            return 0
        left = max(choice.max_tokens - len(choice.output) for choice in choices)
        return max(self.drafter.count(len(choices), left - 1), max(len(choice.ahead) for choice in choices) - 1)

    def _tokens_now(self, drafts: int) -> list[list[int]]:
        """What each choice reads: what it knows already, then drafts."""
        ahead = [choice.ahead for choice in self.batch.choices]
        if all(len(known) > drafts for known in ahead):
            return ahead
        assert self.batch.state is not None, "a batch with choices has a state"
        guesses = self.runner.draft(self.batch.state, [known[0] for known in ahead], drafts)
        return [[*known, *guess[len(known) - 1 :]] for known, guess in zip(ahead, guesses, strict=True)]

    def _choose_all(self, tokens: Sequence[Sequence[int]], result: Result) -> list[int]:
        """Choose behind every position that turns out to be right; how many of `tokens` were, row by row."""
        choices = self.batch.choices
        best_BL = greedy(result.logits_BLV) if all(choice.is_plain for choice in choices) else None
        return [self._choose_row(row, choice, tokens[row], result, best_BL) for row, choice in enumerate(choices)]

    def _choose_row(self, row: int, choice: Choice, tokens: Sequence[int], result: Result, best_BL: list[list[int]] | None) -> int:
        known = right = len(choice.ahead)
        for place in range(known - 1, len(tokens)):
            if best_BL is None:
                token = self._choose_one(choice, result, row, place)
            else:
                token = best_BL[row][place]
                self._take(choice, TokenOut(token))
            if choice.finish is not None or place + 1 == len(tokens) or token != tokens[place + 1]:
                break
            right += 1
        self.drafter.mark(len(tokens) - known, right - known)
        return right

    def _choose_one(self, choice: Choice, result: Result, row: int, place: int) -> int | None:
        """The next token of a choice from the logits at `place`; None if that ended it with an error."""
        gate = None if result.gates_BL is None or not choice.params.gates else float(result.gates_BL[row, place])
        try:
            token = choose(result.logits_BLV[row, place], choice, gate)
        except ByroteError as error:
            self.end([choice], "error", error)
            return None
        self._take(choice, token)
        return token.id

    def _take(self, choice: Choice, token: TokenOut) -> None:
        self.events.append(choice.take(token))
        self.totals["output_tokens"] += 1
        self.totals["finished"] += choice.finish is not None

    def _keep_generated(self, fewest: int) -> None:
        """Publish the pages of choices that have just passed a border."""
        for row, choice in enumerate(self.batch.choices):
            beyond = choice.cached % PAGE
            if choice.finish is None and choice.cached >= PAGE and beyond < fewest:
                text = self.batch.text(row)
                if beyond:
                    state = self.runner.assemble([text])
                    state.rollback(beyond)
                    text = Text(state, 0, state.length)
                self.pages.publish(self._prefix_root(choice.pack), choice.known[: text.length], text)

    # ── prompts ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def read_prompts(self) -> None:
        """Until `chunk_tokens` have gone in, or nobody waits who has room."""
        left, joined = self._chunk_tokens, list[tuple[Choice, Text]]()
        while left > 0:
            if self.reading is None:
                self.reading = self._begin([*self.batch.choices, *(choice for choice, _ in joined)])
            if self.reading is None:
                break
            reading, before = self.reading, self.reading.state.length
            if self._guarded(reading.choices, partial(self._read_some, reading, left)):
                left -= reading.state.length - before
                if reading.is_done:
                    text = Text(reading.state, 0, reading.state.length)
                    joined += [(choice, text) for choice in reading.choices if choice.finish is None]
                    self.reading = None
            self.sweep()
        if joined:
            self.batch.change(keep=self.batch.choices, new=joined)
        self._shrink()

    def _begin(self, running: Sequence[Choice]) -> Reading | None:
        """The next request, with what is known of its prompt already in its state."""
        choices = self.scheduler.admit(running)
        if choices is None:
            return None
        first, is_new = choices[0], not choices[0].output
        tokens = first.prompt if is_new else first.known[:-1]
        found = self.pages.match(self._prefix_root(first.pack), tokens) if self._prefix_cache and not first.wants_prompt else []
        pages = usable(found, len(tokens))
        state = self.runner.take_up(pages) if pages else self.runner.new_state(1)
        if is_new:
            self.totals["prefix_hit_tokens"] += state.length
            self.totals["prompt_tokens"] += len(tokens)
            for choice in choices:
                choice.cached_tokens = state.length
        return Reading(self.runner, choices, state, matched=len(found))

    def _read_some(self, reading: Reading, most: int) -> None:
        """One chunk; behind the last one the first tokens are chosen."""
        first, here = reading.choices[0], reading.state.length
        end = reading.next_end(most, at_borders=self._prefix_cache)
        result = reading.read(end, last=end - here if first.wants_prompt else 1, gates=first.params.gates)
        if first.wants_prompt:
            self._report_prompt(first, result, here, end)
        if self._prefix_cache and end % PAGE == 0:
            self.pages.publish(self._prefix_root(first.pack), reading.tokens[:end], Text(reading.state, 0, end))
        if reading.is_done:
            for choice in reading.choices:
                choice.cached = end
                if not reading.is_resumed:
                    self._choose_one(choice, result, 0, result.logits_BLV.shape[1] - 1)

    @staticmethod
    def _report_prompt(choice: Choice, result: Result, here: int, end: int) -> None:
        if here == 0:
            choice.prompt_out.append(TokenOut(choice.prompt[0]))
        following = choice.prompt[here + 1 : end + 1]
        choice.prompt_out += report_prompt(result.logits_BLV[0, : len(following)], following, choice.params.logprobs or 0)

    # ── ends and room ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _guarded(self, choices: Sequence[Choice], work: Callable[[], None]) -> bool:
        """Do a part of the step; what fails ends `choices` and nothing else."""
        try:
            work()
        except Exception as error:  # an engine must outlive whatever a request makes a model do
            self.end(
                choices, "error", error if isinstance(error, ByroteError) else RequestError(f"the model failed on this request: {error}")
            )
            return False
        return True

    def end(self, choices: Iterable[Choice], finish: str, error: ByroteError | None = None) -> None:
        """Say that these are over, those that are not already; `sweep` frees what they hold."""
        for choice in choices:
            if choice.finish is None:
                self.events.append(choice.end(finish, error))
                self.totals["finished"] += 1
                self.totals["errors"] += error is not None

    def sweep(self) -> None:
        """Free what finished choices hold."""
        self.scheduler.sweep()
        if self.reading is not None and all(choice.finish for choice in self.reading.choices):
            self.reading = None
        if any(choice.finish for choice in self.batch.choices):
            self.batch.change(keep=[choice for choice in self.batch.choices if choice.finish is None])

    def _make_room(self, growth: int) -> None:
        """For the batch to grow by `growth` tokens a choice: kept prefixes go first, then the newest choices wait again."""
        leave = self.scheduler.to_preempt(self.batch.choices, growth)
        if leave:
            self.totals["preemptions"] += len(leave)
            self._wait_again(leave)
        self._shrink(growth)

    def _wait_again(self, choices: Sequence[Choice]) -> None:
        self.batch.change(keep=[choice for choice in self.batch.choices if choice not in choices])
        for choice in choices:
            choice.cached = 0
        self.scheduler.put_back(choices)

    def _shrink(self, growth: int = 0) -> None:
        self.pages.shrink(self.scheduler.pages - self.held(growth))

    def held(self, growth: int = 0) -> int:
        """Pages of the batch, `growth` tokens longer, and of what is being read."""
        state = self.batch.state
        grown = 0 if state is None else state.batch * pages_of(state.length + growth)
        return grown + (0 if self.reading is None else pages_of(self.reading.state.length))

    def forget_caches(self) -> None:
        """All that was read is out of date: kept prefixes go, and every running choice is read again."""
        self.pages.clear()
        reading, self.reading = self.reading, None
        if reading is not None:
            self.scheduler.waiting.appendleft(reading.choices)
        self._wait_again(list(self.batch.choices))

    def rebuild(self) -> None:
        """Give states the form that the model asks for now: packs come and go, MTP reads along or not."""
        self.batch.change(keep=self.batch.choices)
        if self.reading is not None:
            self.reading.rebuild()

    def _follow_drafter(self) -> None:
        """MTP stops reading along as soon as drafting has lost, and starts again with new texts only: it has to know them whole."""
        wanted = self.drafter.is_active
        if wanted != self.runner.with_drafts and (not wanted or (self.batch.state is None and self.reading is None)):
            self.runner.with_drafts = wanted
            self._wait_again([choice for choice in self.batch.choices if len(choice.ahead) > 1])  # else rows would read unequally much
            self.rebuild()
