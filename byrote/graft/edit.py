"""Facts written into a model's memory and taken back: only rows of the fact's own n-grams move, nothing else of the model.

    prompt  The capital of Aruba is          answer   Oranjestad

The answer is predicted from the last token of the prompt on, so the rows that carry it best are those read there: by the n-grams that end
in "Aruba is", "of Aruba is", and inside the answer. Where these are not enough (a name whose end other names share), rows of the whole line
are freed too: attention can bring on what they say. Gradient descent moves these rows until every token of the answer is the most
probable one, by a margin; what is stored is then checked once more, in the table's own dtype.

What other text feels. A row may be read by other n-grams too (the same words elsewhere; a collision). Rows are therefore freed in steps,
by how often text held back reads them: 0 times, at most 1, 4, 16, any number. In the first step that text feels exactly nothing. In
each later one its bits per byte are measured with the fact in place, and a fact that costs more than the bound is not written.
Facts that were written earlier count as held-out text, and none that is recalled may be lost by writing another.

Taking back is exact: every fact keeps the bits that its rows had. Facts that share rows lie on one another like layers; one below others
can only be taken out with those above it (`forget` with `rewrite` writes these again).

What cannot be expected: a paraphrase reads other n-grams and finds nothing. Measure it (`facts.recall`).

Shapes: B = 1 line, T tokens, U rows the line reads, W rows that may move, E numbers in a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byrote.errors import ConfigError
from byrote.eval.bits import bits_per_byte
from byrote.graft.facts import Fact, fact_line
from byrote.graft.grafted import said, token_losses
from byrote.memory.conditional import Memory, Rows
from byrote.memory.table import Slab

FREED = ((False, 0), (True, 0), (False, 1), (True, 1), (True, 4), (True, 16), (True, None))  # (of the whole line, reads by other text)
_CONTEXT, _STRIDE = 256, 128


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
    """Text that shall feel nothing: which rows it reads how often, and its bits per byte."""

    def __init__(self, model: Any, text: Any, texts: Sequence[tuple[str, str]]) -> None:
        self._model, self._text = model, text
        self.texts = list(texts)
        read = [model.memory.global_rows(torch.tensor([line])).flatten() for line in self._lines(self.texts)]
        self.rows_U, self.times_U = torch.unique(torch.cat(read), return_counts=True)
        self._of_text = [torch.unique(rows) for rows in read]
        self._bits: dict[int, float] = {}

    def _lines(self, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        return [[self._text.begin_id, *ids] for ids in self._text.encode_batch([text for _, text in texts])]

    def reads(self, rows_W: Tensor) -> Tensor:
        """How often each row is read."""
        place_W = torch.searchsorted(self.rows_U, rows_W).clamp_max(len(self.rows_U) - 1)
        return self.times_U[place_W].where(self.rows_U[place_W] == rows_W, 0)

    def bits(self, among: Sequence[int] | None = None) -> float:
        """Bits in all of the texts numbered `among` (None: of all)."""
        some = self.texts if among is None else [self.texts[number] for number in among]
        if not some:
            return 0.0
        scored = bits_per_byte(self._model, self._text, some, context=_CONTEXT, stride=_STRIDE)
        return sum(one.bits for one in scored.per_text)

    def reading(self, rows_W: Tensor) -> list[int]:
        """Numbers of the texts that read any of these rows; the others cannot feel a change of them."""
        return [number for number, rows in enumerate(self._of_text) if bool(torch.isin(rows, rows_W).any())]

    @property
    def num_bytes(self) -> int:
        return sum(len(text.encode()) for _, text in self.texts)


class _Earlier:
    """Facts that are in the table already, and which rows each of them reads."""

    def __init__(self, model: Any, text: Any, entries: Sequence[Entry]) -> None:
        self._model, self._pad = model, text.pad_id
        self._lines = [fact_line(text, entry.prompt, entry.answer) for entry in entries]
        self._rows = [torch.unique(model.memory.global_rows(torch.tensor([line]))) for line, _ in self._lines]

    def reads(self, rows_W: Tensor) -> Tensor:
        """By how many facts each row is read."""
        return sum((torch.isin(rows_W, rows).long() for rows in self._rows), torch.zeros_like(rows_W))

    def recalled(self, rows_W: Tensor) -> list[bool]:
        """Of the facts that read any of these rows; the others cannot feel a change of them."""
        some = [line for line, rows in zip(self._lines, self._rows, strict=True) if bool(torch.isin(rows, rows_W).any())]
        return said(self._model, [line for line, _ in some], [prompt for _, prompt in some], self._pad) if some else []


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
    for whole, limit in FREED:
        free_U = places[whole] if limit is None else places[whole] & (reads_U <= limit)
        if int(free_U.sum()) == tried:
            continue  # no more rows than in the step before
        tried, known = int(free_U.sum()), others.recalled(rows.rows_U[free_U])
        moved = _descend(model, tokens_BT, rows, prompt, free_U, config)
        entry = _store(memory, rows.rows_U[free_U], moved.vectors_UE[free_U], fact)
        last = _nats(model, tokens_BT, memory_rows(memory, tokens_BT), prompt)
        felt = _felt(memory, entry, held) if limit != 0 else 0.0
        kept = all(now or not before for now, before in zip(others.recalled(entry.rows_W), known, strict=True))
        if felt <= config.max_bits and kept and said(model, [line], [prompt], text.pad_id)[0]:
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


def _descend(model: Any, tokens_BT: Tensor, rows: Rows, prompt: int, free_U: Tensor, config: EditConfig) -> Rows:
    """Rows, of which the free ones have moved until the answer leads by the margin, or the steps are used up."""
    leaf_WE = rows.vectors_UE[free_U].detach().float().requires_grad_()
    optimizer = torch.optim.Adam([leaf_WE], lr=config.lr)
    places_W = free_U.nonzero()[:, 0]
    answer_N = tokens_BT[0, prompt:]
    for _ in range(config.steps if len(places_W) else 0):
        vectors_UE = rows.vectors_UE.detach().float().index_copy(0, places_W, leaf_WE)
        logits_NV = model(tokens_BT, rows=rows._replace(vectors_UE=vectors_UE)).logits[0, prompt - 1 : -1].float()
        if _lead(logits_NV.detach(), answer_N) >= config.margin:
            break
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits_NV, answer_N).backward(inputs=[leaf_WE])
        optimizer.step()
    return rows._replace(vectors_UE=rows.vectors_UE.detach().index_copy(0, places_W, leaf_WE.detach().to(rows.vectors_UE.dtype)))


def _lead(logits_NV: Tensor, answer_N: Tensor) -> float:
    """Smallest distance of an answer's token from the best other one."""
    right_N = logits_NV.gather(1, answer_N[:, None])[:, 0]
    return float((right_N - logits_NV.scatter(1, answer_N[:, None], -math.inf).amax(1)).min())


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


def _felt(memory: Memory, entry: Entry, held: HeldOut) -> float:
    """Bits per byte that held-out text loses by this fact."""
    texts = held.reading(entry.rows_W)
    now = held.bits(texts)
    put_back(memory, entry)
    before = held.bits(texts)
    put_again(memory, entry)
    return (now - before) / held.num_bytes


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
