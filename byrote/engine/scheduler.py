"""Who is read, who is continued, who must wait: first come, first served, within a number of choices and a number of pages.

    waiting ──admit──▶ reading ──▶ batch ──▶ finished
       ▲                             │
       └──────── preempt ────────────┘      the newest goes back to the front, with all it has said

A page is 128 tokens of one choice. The batch's state is rectangular, so it is counted as rows times pages of the longest; prefixes that
are kept for later count as well, and are what is given up first. A preempted choice loses its cache and nothing else: what it
knows is read again when there is room, and its next draw is the one it would have made.

No model in here: lengths and counts only.
"""

from collections import deque
from collections.abc import Sequence

from byrote.engine.cache import pages_of
from byrote.engine.request import Choice


class Scheduler:
    """`max_batch`: choices at once. `pages`: of all caches together."""

    def __init__(self, *, max_batch: int, pages: int) -> None:
        self.max_batch, self.pages = max_batch, pages
        self.waiting: deque[list[Choice]] = deque()  # choices in one list share all they know

    def admit(self, running: Sequence[Choice]) -> list[Choice] | None:
        """The next to be read, if it has room beside `running`; alone it always has."""
        if not self.waiting:
            return None
        first = self.waiting[0]
        if running and not self.has_room([*running, *first], growth=1):
            return None
        return self.waiting.popleft()

    def has_room(self, choices: Sequence[Choice], *, growth: int) -> bool:
        """Whether these fit as a batch, each `growth` tokens longer than what it knows."""
        return len(choices) <= self.max_batch and footprint(choices, growth) <= self.pages

    def to_preempt(self, running: Sequence[Choice], growth: int) -> list[Choice]:
        """Those that must leave before the others can grow: the newest first, never the last one."""
        stay = sorted(running, key=lambda choice: (choice.arrival, choice.index))
        leave = []
        while len(stay) > 1 and footprint(stay, growth) > self.pages:
            leave.append(stay.pop())
        return leave

    def put_back(self, choices: Sequence[Choice]) -> None:
        """To the front, in order of arrival."""
        for choice in sorted(choices, key=lambda choice: (choice.arrival, choice.index), reverse=True):
            self.waiting.appendleft([choice])

    def sweep(self) -> None:
        """Forget those that have ended while they waited."""
        groups = ([choice for choice in group if choice.finish is None] for group in self.waiting)
        self.waiting = deque(group for group in groups if group)


def footprint(choices: Sequence[Choice], growth: int) -> int:
    """Pages of a batch of these, each `growth` tokens longer."""
    return len(choices) * pages_of(max((choice.length for choice in choices), default=0) + growth)
