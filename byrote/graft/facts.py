"""A catalogue as facts: each a prompt, an answer, and other ways to ask for it.

A table (.csv with a header, or .jsonl) gives one fact for every filled cell. The first column names the thing, a column's name is
the relation:

    country,capital             prompt      "The capital of Aruba is"
    Aruba,Oranjestad      →     answer      " Oranjestad"
                                otherwise   "Aruba's capital is", "Question: What is the capital of Aruba? Answer:"

A table with the columns `prompt` and `answer` (and any number whose names begin with `paraphrase`) is taken as it is. Lists are joined by
commas; numbers are written as they are; empty cells and true/false are no facts.

A fact is recalled if the model's most probable continuation of the prompt is the answer, token for token.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from byrote.config import nearest
from byrote.data.sources import Document
from byrote.errors import DataError
from byrote.graft.grafted import said

BATCH = 32  # prompts in one forward pass


class Fact(NamedTuple):
    prompt: str
    answer: str  # begins with the space that parts it from the prompt
    paraphrases: tuple[str, ...] = ()  # other prompts


class Recall(NamedTuple):
    """Shares, of all facts, that are recalled."""

    facts: int
    as_written: float
    paraphrased: tuple[float, ...]  # by the first paraphrase, by the second …


def read_facts(path: str | Path, columns: Sequence[str] = ()) -> list[Fact]:
    """The facts of a table; `columns`: only these relations. Raises DataError."""
    path = Path(path).expanduser()
    rows = _rows(path)
    if not rows:
        raise DataError(f"{path} has no rows; a table of facts has a header and at least one row")
    names = list(rows[0])
    unknown = [name for name in columns if name not in names]
    if unknown:
        raise DataError(f"{path} has no column {unknown[0]!r}; nearest: {nearest(unknown[0], names)}")
    facts = list(_asked(rows)) if {"prompt", "answer"} <= set(names) else list(_stated(rows, columns or names[1:]))
    if not facts:
        raise DataError(f"{path} states no fact: give a column of names and at least one more, or the columns prompt and answer")
    return facts


def fact_documents(facts: Sequence[Fact]) -> list[Document]:
    """The facts as text to train on, one sentence a document; paraphrases are not among them."""
    return [Document(f"fact-{number}", f"{fact.prompt}{fact.answer}.") for number, fact in enumerate(facts)]


def fact_line(text: Any, prompt: str, answer: str) -> tuple[list[int], int]:
    """(ids of begin, prompt and answer; how many of them are prompt). Raises DataError for an answer without tokens."""
    before, after = text.encode_batch([prompt, answer])
    if not after:
        raise DataError(f"the answer to {prompt!r} is empty; give at least one character")
    return [text.begin_id, *before, *after], 1 + len(before)


def recall(model: Any, text: Any, facts: Sequence[Fact]) -> Recall:
    """`model` is called as `Grafted` is; `text` is its tokenizer."""
    ways = [[fact.prompt for fact in facts]]
    ways += [[fact.paraphrases[way] for fact in facts] for way in range(min(len(fact.paraphrases) for fact in facts))]
    shares = [_share(model, text, prompts, [fact.answer for fact in facts]) for prompts in ways]
    return Recall(len(facts), shares[0], tuple(shares[1:]))


def _share(model: Any, text: Any, prompts: Sequence[str], answers: Sequence[str]) -> float:
    pairs = [fact_line(text, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    right = 0
    for first in range(0, len(pairs), BATCH):
        right += sum(said(model, pairs[first : first + BATCH], text.pad_id))
    return right / len(pairs)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        raw = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in raw.splitlines() if line.strip()]
        return list(csv.DictReader(raw.splitlines(keepends=True), strict=True, restval=""))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a table of facts: {error}. Give a UTF-8 .csv with a header, or .jsonl") from error


def _asked(rows: Sequence[dict[str, Any]]) -> Iterator[Fact]:
    for row in rows:
        others = (str(row[name]).strip() for name in row if str(name).startswith("paraphrase") and row[name])
        yield Fact(str(row["prompt"]).rstrip(), _answer(row["answer"]), tuple(others))


def _stated(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> Iterator[Fact]:
    for row in rows:
        thing = str(next(iter(row.values())))
        for column in columns:
            value = row.get(column)
            if value in (None, "", []) or isinstance(value, bool):
                continue
            name = column.replace("_", " ")
            others = f"{thing}'s {name} is", f"Question: What is the {name} of {thing}? Answer:"
            yield Fact(f"The {name} of {thing} is", _answer(value), others)


def _answer(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f" {text.strip()}"
