"""Facts written into a model's memory and taken back: only rows of the fact's own n-grams move, nothing else of the model.

    prompt  The capital of Aruba is          answer   Oranjestad

The answer is predicted from the last token of the prompt on, so the rows that carry it best are those read there: by the n-grams that end
in "Aruba is", "of Aruba is", and inside the answer. Where these are not enough (a name whose end other names share), rows of the whole line
are freed too: attention can bring on what they say. Gradient descent moves these rows until every token of the answer is the most
probable one, by a margin; what is stored is then checked once more, in the table's own dtype.

What other text feels. A row may be read by other n-grams too (the same words elsewhere; a collision). Rows are therefore freed in steps,
by how often text held back reads them: 0 times, at most 1, 4, 16, any number. In the first step that text feels exactly nothing. In
each later one its bits per byte are measured with the fact in place, and a fact that costs more than the bound is not written.
Facts that were written earlier count as held-out text, and none that is recalled may be lost by writing another: those that read a freed
row are lines of the same descent, which keeps their answers in the lead.

Taking back is exact: every fact keeps the bits that its rows had. Facts that share rows lie on one another like layers; one below others
can only be taken out with those above it (`forget` with `rewrite` writes these again).

What cannot be expected: a paraphrase reads other n-grams and finds nothing. Measure it (`facts.recall`).

Shapes: B = 1 line, T tokens, U rows the line reads, W rows that may move, E numbers in a row.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byrote.errors import ConfigError
from byrote.eval.bits import cut_windows, window_nats
from byrote.graft.facts import Fact, fact_line
from byrote.graft.grafted import said, token_losses
from byrote.memory.conditional import Memory, Rows
from byrote.memory.table import Slab

FREED = ((False, 0), (True, 0), (False, 1), (True, 1), (True, 4), (True, 16), (True, None))  # (of the whole line, reads by other text)
_CONTEXT, _STRIDE = 256, 128  # tokens of a window of held-out text
_LOOK = 10  # steps over which progress is seen


@dataclass(frozen=True, kw_only=True, slots=True)
class EditConfig:
    steps: int = 120  # of gradient descent, at most, for each step of freeing rows
    lr: float = 0.05
    margin: float = 1.0  # nats by which each token of the answer shall lead
    max_bits: float = 1e-3  # bits per byte that held-out text may lose

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "margin", "max_bits"):
            value = getattr(self, name)
            if not (0 <= value < math.inf and (value > 0 or name in ("margin", "max_bits"))):
                raise ConfigError(f"{name} is {value}; it must be {'0 or more' if name in ('margin', 'max_bits') else 'positive'}")


class Entry(NamedTuple):
    """One fact as it was written."""

    prompt: str
    answer: str
    felt_bits: float  # per byte of held-out text, when it was written
    rows_W: Tensor  # global ids, ascending
    before_WE: Tensor
    after_WE: Tensor


class Attempt(NamedTuple):
    """What came of writing one fact. `entry` None: not within the bound, and nothing was changed."""

    entry: Entry | None
    nats_before: float  # per token of the answer
    nats_after: float
    felt_bits: float  # of the last attempt
    reads: int | None  # of held-out text that a moved row was allowed


class HeldOut:
    """Text that shall feel nothing: which rows it reads how often, and its bits per byte.

    It is scored in windows (`eval/bits.py`). A window's bits follow from the rows it reads, for nothing else of the model changes; so they
    are kept beside a digest of these rows, and only windows whose rows have moved are read again.
    """

    def __init__(self, model: Any, text: Any, texts: Sequence[tuple[str, str]]) -> None:
        self._model, self._pad = model, text.pad_id
        self.num_bytes = sum(len(part.encode()) for _, part in texts)
        self._lines = [torch.tensor([text.begin_id, *ids]) for ids in text.encode_batch([part for _, part in texts])]
        self._windows = cut_windows([len(line) for line in self._lines], _CONTEXT, _STRIDE)
        self._of_window = [self._rows(self._lines[window.text][window.start : window.end]).unique() for window in self._windows]
        whole = torch.cat([self._rows(line) for line in self._lines])
        begins = torch.cat(self._of_window).unique()  # a window that begins amid a text reads other n-grams there
        self.rows_U, self.times_U = torch.unique(torch.cat((whole, begins[~torch.isin(begins, whole)])), return_counts=True)
        self._known: dict[tuple[int, bytes], float] = {}

    def _rows(self, line_T: Tensor) -> Tensor:
        rows_N: Tensor = self._model.memory.global_rows(line_T[None]).flatten()
        return rows_N

    def reads(self, rows_W: Tensor) -> Tensor:
        """How often each row is read."""
        place_W = torch.searchsorted(self.rows_U, rows_W).clamp_max(len(self.rows_U) - 1)
        return self.times_U[place_W].where(self.rows_U[place_W] == rows_W, 0)

    def bits(self, rows_W: Tensor | None = None) -> float:
        """Bits in all windows that read any of these rows (None: in all); the others cannot feel a change of them."""
        some = [number for number, rows in enumerate(self._of_window) if rows_W is None or bool(torch.isin(rows, rows_W).any())]
        keys = [(number, self._digest(self._of_window[number])) for number in some]
        new = [key for key in keys if key not in self._known]
        windows = [self._windows[number] for number, _ in new]
        with torch.no_grad():
            nats_W = window_nats(self._model, self._lines, windows, self._pad, batch_windows=8, device=torch.device("cpu"))
        self._known.update(zip(new, (nats_W / math.log(2)).tolist(), strict=True))
        return sum(self._known[key] for key in keys)

    def _digest(self, rows_U: Tensor) -> bytes:
        return hashlib.blake2b(self._model.memory.store.read(rows_U).view(torch.uint8).numpy().tobytes(), digest_size=16).digest()


class _Earlier:
    """Facts that are in the table already, and which rows each of them reads."""

    def __init__(self, model: Any, text: Any, entries: Sequence[Entry]) -> None:
        self._model, self._pad = model, text.pad_id
        self._lines = [fact_line(text, entry.prompt, entry.answer) for entry in entries]
        self._rows = [torch.unique(model.memory.global_rows(torch.tensor([line]))) for line, _ in self._lines]

    def reads(self, rows_W: Tensor) -> Tensor:
        """By how many facts each row is read."""
        return sum((torch.isin(rows_W, rows).long() for rows in self._rows), torch.zeros_like(rows_W))

    def recalled(self, rows_W: Tensor) -> list[int]:
        """Numbers of the facts that read any of these rows, and are said."""
        some = [number for number, rows in enumerate(self._rows) if bool(torch.isin(rows, rows_W).any())]
        return list(itertools.compress(some, said(self._model, [self._lines[number] for number in some], self._pad) if some else ()))

    def among(self, known: Sequence[int], rows_W: Tensor) -> list[tuple[list[int], int]]:
        """Lines and prompts of those facts, of the `known`, that read any of these rows; the others cannot feel a change of them."""
        return [self._lines[number] for number in known if bool(torch.isin(self._rows[number], rows_W).any())]


def write_fact(model: Any, text: Any, fact: Fact, held: HeldOut, config: EditConfig, earlier: Sequence[Entry] = ()) -> Attempt:
    """Write one fact into the model's table, beside the `earlier` ones. `text` is its tokenizer. ConfigError: no memory to write into."""
    memory = editable_memory(model)
    line, prompt = fact_line(text, fact.prompt, fact.answer)
    tokens_BT = torch.tensor([line])
    with torch.no_grad():
        rows = memory.fetch(tokens_BT)
    places = {False: _read_at(rows, range(prompt - 1, len(line) - 1)), True: _read_at(rows, range(1, len(line) - 1))}
    first = last = _nats(model, tokens_BT, rows, prompt)
    others = _Earlier(model, text, [entry for entry in earlier if entry.prompt != fact.prompt])
    reads_U, felt, tried = held.reads(rows.rows_U) + others.reads(rows.rows_U), 0.0, -1
    known = others.recalled(rows.rows_U[places[True]])
    for whole, limit in FREED:
        free_U = places[whole] if limit is None else places[whole] & (reads_U <= limit)
        if int(free_U.sum()) == tried:
            continue  # no more rows than in the step before
        tried, free_W = int(free_U.sum()), rows.rows_U[free_U]
        together = [(line, prompt), *others.among(known, free_W)]
        before = held.bits(free_W) if limit != 0 else 0.0
        entry = _store(memory, free_W, _descend(model, together, text.pad_id, free_W, config), fact)
        last = _nats(model, tokens_BT, memory_rows(memory, tokens_BT), prompt)
        if all(said(model, together, text.pad_id)):
            felt = (held.bits(free_W) - before) / held.num_bytes if limit != 0 else 0.0
            if felt <= config.max_bits:
                return Attempt(entry._replace(felt_bits=felt), first, last, felt, limit)
        put_back(memory, entry)
    return Attempt(None, first, last, felt, None)


def editable_memory(model: Any) -> Memory:
    memory: Memory | None = model.memory
    if memory is None:
        raise ConfigError("this model has no memory of its own to write into: train one with model.engram, or write before detaching it")
    return memory


@torch.no_grad()
def memory_rows(memory: Memory, tokens_BT: Tensor) -> Rows:
    return memory.fetch(tokens_BT)


def _read_at(rows: Rows, positions: range) -> Tensor:
    """bool [U]: rows that the tokens at these positions read."""
    mask_U = torch.zeros(len(rows.rows_U), dtype=torch.bool)
    mask_U[rows.inverse_BTLN[:, positions.start : positions.stop].flatten()] = True
    return mask_U


def _descend(model: Any, lines: Sequence[tuple[list[int], int]], pad: int, free_W: Tensor, config: EditConfig) -> Tensor:
    """[W, E]: the free rows, moved until the answer of every line leads by the margin, or the steps are used up or would not be enough."""
    length = max(len(line) for line, _ in lines)
    tokens_BT = torch.tensor([line + [pad] * (length - len(line)) for line, _ in lines])
    places = [(row, place) for row, (line, prompt) in enumerate(lines) for place in range(prompt, len(line))]
    row_N, place_N = torch.tensor(places).T
    answer_N, rows = tokens_BT[row_N, place_N], memory_rows(model.memory, tokens_BT)
    free_U = torch.searchsorted(rows.rows_U, free_W)
    leaf_WE = rows.vectors_UE[free_U].float().requires_grad_()
    optimizer, lacking = torch.optim.Adam([leaf_WE], lr=config.lr), list[float]()
    for step in range(config.steps if len(free_W) else 0):
        vectors_UE = rows.vectors_UE.float().index_copy(0, free_U, leaf_WE)
        logits_NV = model(tokens_BT, rows=rows._replace(vectors_UE=vectors_UE)).logits[row_N, place_N - 1].float()
        lacks_N = (config.margin - _leads(logits_NV.detach(), answer_N)).relu()
        lacking.append(float(lacks_N.sum()))
        if lacking[-1] == 0 or _is_hopeless(lacking, config.steps - step):
            break
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits_NV[lacks_N > 0], answer_N[lacks_N > 0]).backward(inputs=[leaf_WE])
        optimizer.step()
    return leaf_WE.detach()


def _is_hopeless(lacking: Sequence[float], left: int) -> bool:
    """Whether the steps that are left, each as good as the last ten were on average, would not be enough."""
    return len(lacking) > 2 * _LOOK and (lacking[-1 - _LOOK] - lacking[-1]) / _LOOK * left < lacking[-1]


def _leads(logits_NV: Tensor, answer_N: Tensor) -> Tensor:
    """[N]: distance of an answer's token from the best other one."""
    return logits_NV.gather(1, answer_N[:, None])[:, 0] - logits_NV.scatter(1, answer_N[:, None], -math.inf).amax(1)


@torch.no_grad()
def _nats(model: Any, tokens_BT: Tensor, rows: Rows, prompt: int) -> float:
    logits_BTV = model(tokens_BT, rows=rows).logits[:, prompt - 1 : -1]
    return float(token_losses(logits_BTV, tokens_BT[:, prompt:]).mean())


def _store(memory: Memory, rows_W: Tensor, vectors_WE: Tensor, fact: Fact) -> Entry:
    before = memory.store.gather(rows_W)
    kept_WE = before.vectors_UE.clone()
    memory.store.put(rows_W, Slab(vectors_WE.to(memory.store.dtype), *before[1:]))
    return Entry(fact.prompt, fact.answer, 0.0, rows_W, kept_WE, memory.store.gather(rows_W).vectors_UE)


def put_back(memory: Memory, entry: Entry) -> None:
    """The rows as they were before this fact, bitwise."""
    slab = memory.store.gather(entry.rows_W)
    memory.store.put(entry.rows_W, slab._replace(vectors_UE=entry.before_WE.clone()))


def put_again(memory: Memory, entry: Entry) -> None:
    """The rows as this fact left them."""
    slab = memory.store.gather(entry.rows_W)
    memory.store.put(entry.rows_W, slab._replace(vectors_UE=entry.after_WE.clone()))


# --- taking back ------------------------------------------------------------------------------------------------------


def resting_on(entries: Sequence[Entry], number: int) -> list[int]:
    """Later facts that share rows with this one, or with one of those."""
    rows_W, above = entries[number].rows_W, list[int]()
    for later in range(number + 1, len(entries)):
        if bool(torch.isin(entries[later].rows_W, rows_W).any()):
            above.append(later)
            rows_W = torch.cat((rows_W, entries[later].rows_W))
    return above


def forget_fact(
    model: Any,
    text: Any,
    entries: Sequence[Entry],
    number: int,
    *,
    rewrite: bool,
    held: HeldOut | None = None,
    config: EditConfig | None = None,
) -> list[Entry]:
    """Take fact `number` out of the table, bitwise; returns the facts that stay.

    Raises ConfigError, and changes nothing, where later facts share its rows; with `rewrite` these are taken out too and written
    again (they need `held` and `config`), or, if one cannot be, everything is as before.
    """
    memory, above = editable_memory(model), resting_on(entries, number)
    if above and not rewrite:
        shown = "; ".join(f"{later + 1}: {entries[later].prompt}{entries[later].answer}" for later in above[:5])
        raise ConfigError(
            f"{len(above)} later facts share rows with this one ({shown}). Forget them first, or add --rewrite to write them again"
        )
    leaving = [number, *above]
    for place in reversed(leaving):
        put_back(memory, entries[place])
    staying = [entry for place, entry in enumerate(entries) if place not in leaving]
    again = list[Entry]()
    for place in above:
        assert held is not None and config is not None, "writing again needs text held back"
        fact = Fact(entries[place].prompt, entries[place].answer)
        entry = write_fact(model, text, fact, held, config, staying + again).entry
        if entry is None:
            for undone in reversed(again):
                put_back(memory, undone)
            for place_again in leaving:
                put_again(memory, entries[place_again])
            raise ConfigError(
                f"{entries[place].prompt}{entries[place].answer} cannot be written again within {config.max_bits:g} bits per byte. "
                "Nothing was changed; raise --max-bits"
            )
        again.append(entry)
    return staying + again
