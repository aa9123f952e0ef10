"""Speculative decoding (V3 §5.4.3) with the model's own MTP modules: draft k tokens, read them all in one forward, keep what was right.

    known      … x                      x: chosen, not read yet
    draft      y1 y2                    MTP's guesses of what follows x
    read       x y1 y2                  one forward of k + 1 tokens; the logits behind each
    choose     z1 behind x;  z2 behind y1 if z1 = y1;  z3 behind y2 if z2 = y2
    keep       x and the drafts that were right; the rest is rolled back

The choices are made by the sampler exactly as without drafts, token by token from the model's own distribution, each with the next
number of the choice's random stream; a draft is right when it is what was chosen anyway. So greedy output is identical and sampled
output has the same distribution, and even the same draws. A draft y is right with probability p(y), which is the most that any
rule can have for a guess that is certain (Leviathan et al. 2023, Eq 1, with all of q on y).

A batch is rolled back as one: to the fewest tokens that any of its texts keeps. A text that had more keeps them as known tokens, which
stand in for its first drafts in the next round; nothing is chosen twice. With a texts of acceptance a the batch so advances by
less than 1 + a, which `Drafter` sees in what it measures.

Whether drafts pay is measured, not assumed: for every batch size, seconds a step and tokens a step with 0 … k drafts. The best is
used, the others are tried again from time to time. Where none has won for long, drafting ends and with it the cost of letting
MTP read along; it is tried again with later texts.
"""

from collections import deque

_TRIES = 4  # steps before a count of drafts is judged
_WINDOW = 9  # newest steps that judge it
_PROBE_EVERY = 16  # steps
_LOSSES = 256  # steps that no drafts at all won, in a row
_REST = 4096  # steps without drafts before the next attempt


class Drafter:
    """How many tokens to draft. `most`: 0 drafts never. `fixed`: always as many as there may be."""

    def __init__(self, most: int, *, fixed: bool = False) -> None:
        self._most, self._fixed = most, fixed
        self._steps: dict[tuple[int, int], deque[tuple[float, float]]] = {}  # (rows, drafts) → (seconds, tokens a row)
        self._rates: dict[tuple[int, int], float] = {}  # of the same: tokens a second of one row, as measured
        self._seen = self._losses = self._resting = 0
        self.drafted, self.accepted = [0] * most, [0] * most  # by draft position

    @property
    def is_active(self) -> bool:
        """Whether MTP should read along."""
        return self._most > 0 and not self._resting

    def count(self, rows: int, room: int) -> int:
        """Drafts for the next step of a batch of `rows`, where at most `room` fit."""
        most = min(self._most, room)
        if not self.is_active or most <= 0:
            return 0
        if self._fixed:
            return most
        judged = [self._steps.get((rows, drafts), ()) for drafts in range(most + 1)]
        fewest = min(range(most + 1), key=lambda drafts: len(judged[drafts]))
        if len(judged[fewest]) < _TRIES:
            return fewest
        self._seen += 1
        if self._seen % _PROBE_EVERY == 0:
            return self._seen // _PROBE_EVERY % (most + 1)
        best = max(range(most + 1), key=lambda drafts: self._rates[rows, drafts])
        self._losses = 0 if best else self._losses + 1
        return best

    def record(self, rows: int, drafts: int, seconds: float, tokens: float) -> None:
        """A step of `rows` with `drafts` took `seconds` and brought each row `tokens` further."""
        if not self.is_active:
            self._resting = max(self._resting - 1, 0)
            return
        steps = self._steps.setdefault((rows, drafts), deque(maxlen=_WINDOW))
        steps.append((seconds, tokens))
        each = sorted(pair[0] for pair in steps)
        self._rates[rows, drafts] = sum(pair[1] for pair in steps) / len(steps) / each[len(each) // 2]
        if self._losses >= _LOSSES:
            self._resting, self._losses = _REST, 0
            self._steps.clear()

    def mark(self, drafts: int, accepted: int) -> None:
        """Of one row's drafts in one step the first `accepted` were right; those behind the first wrong one were not judged."""
        for position in range(min(accepted + 1, drafts)):
            self.drafted[position] += 1
            self.accepted[position] += position < accepted
