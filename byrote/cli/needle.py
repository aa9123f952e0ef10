"""`byrote eval RUN --needle`: needle tests as a table, a heat map, and a file of cells that an interrupted evaluation goes on from."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from byrote.console import JsonLines, Progress, print_table, read_json_lines
from byrote.errors import ConfigError, DataError

if TYPE_CHECKING:
    from byrote.eval.harness import LanguageModel
    from byrote.eval.needle import Cell, NeedleSource, Score

CORPUS, RECALL = "corpus", "recall"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("needle tests")
    group.add_argument("--kinds", metavar="K,…", help="single, multi-key, multi-value, multi-query, distractor, variable (default: all)")
    group.add_argument("--lengths", default="512,1024,2048", metavar="TOKENS,…", help="lengths of the texts (default: %(default)s)")
    group.add_argument(
        "--depths", type=int, default=5, metavar="N", help="depths, from the first sentence to the last (default: %(default)s)"
    )
    group.add_argument("--samples", type=int, metavar="N", help="texts a cell (default: 200 up to 2,048 tokens, 50 above)")
    group.add_argument(
        "--hay", metavar="FILE", help="text to hide needles in, 'corpus' (the run's validation texts) or 'recall' (its synthetic task)"
    )
    group.add_argument("--seed", type=int, default=0, help="decides every text (default: %(default)s)")
    group.add_argument("--hf", metavar="FOLDER", help="judge a causal model in Hugging Face's layout instead of a run")
    group.add_argument("--out", metavar="DIR", help="where cells and heat maps go (default: RUN/needle)")


class Subject(NamedTuple):
    """What is judged, on what."""

    lm: "LanguageModel"
    source: "NeedleSource"
    hay: str  # in words
    fingerprint: str  # changes when the model's files do
    out: Path


def run(args: argparse.Namespace) -> int:
    from byrote.eval.needle import even_depths, grid, score_cells

    lengths, depths = _whole_numbers(args.lengths), even_depths(args.depths)
    if args.samples is not None and args.samples < 1:
        raise ConfigError(f"--samples is {args.samples}; give at least 1")
    with Progress("needles") as live:
        live.update("loading")
        subject = _hugging_face(args) if args.hf else _run(args)
        cells = grid(_kinds(args.kinds, subject.source), lengths, depths)
        settings = {"model": subject.fingerprint, "hay": subject.hay, "samples": args.samples, "seed": args.seed}
        scores, rows = _finished(subject.out, settings, cells)
        left = [cell for cell in cells if cell not in scores]
        with rows:
            for cell, score in score_cells(
                subject.lm, subject.source, left, samples=args.samples, seed=args.seed,
                done=lambda done, total: live.update(f"{done:,} of {total:,} texts, {100 * done / total:.0f} %"),
            ):  # fmt: skip
                scores[cell] = score
                rows.write(_row(cell, score) | {"settings": settings})
    _report(args, subject, {cell: scores[cell] for cell in cells})
    return 0


# --- what is judged ---------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> Subject:
    from byrote.checkpoint.runs import find_checkpoint
    from byrote.cli.loading import load_for_text
    from byrote.data.config import RecallConfig
    from byrote.data.synthetic import alphabet
    from byrote.eval.harness import ByroteLM
    from byrote.eval.haystack import TextNeedles
    from byrote.eval.needle import RecallNeedles

    folder, recall = Path(args.run), _recall_of(Path(args.run))
    hay = args.hay or (CORPUS if recall is None else RECALL)
    text = None if hay == RECALL else _corpus(folder) if hay == CORPUS else _text(hay)  # before the model: it may be missing
    model, tokenizer = load_for_text(args.run, args.device, args.weights)
    lm = ByroteLM(args.run, model, tokenizer)
    checkpoint = find_checkpoint(args.run)
    out = Path(args.out or folder / "needle")
    if text is not None:
        return Subject(lm, TextNeedles(lm, text), _named(hay, text), _fingerprint(checkpoint), out)
    sizes = recall or RecallConfig()
    return Subject(lm, RecallNeedles(sizes, alphabet(sizes, tokenizer)), f"recall {sizes}", _fingerprint(checkpoint), out)


def _hugging_face(args: argparse.Namespace) -> Subject:
    from byrote.eval.harness import load_transformers
    from byrote.eval.haystack import TextNeedles

    if args.hay in (None, CORPUS, RECALL):
        raise ConfigError("--hf needs a text to hide needles in: --hay FILE")
    text = _text(args.hay)
    lm = load_transformers(args.hf, args.device)
    out = Path(args.out or f"needle-{Path(args.hf).resolve().name}")
    return Subject(lm, TextNeedles(lm, text), _named(args.hay, text), _fingerprint(Path(args.hf)), out)


def _recall_of(folder: Path) -> Any:
    """The sizes of the synthetic task, if the run in `folder` was trained on nothing else; None otherwise."""
    from byrote.config import from_dict
    from byrote.data.config import RecallConfig
    from byrote.train.run import RunConfig

    try:
        saved = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        data = from_dict(RunConfig, saved["config"]).data
    except (OSError, ValueError, KeyError, ConfigError):  # a bare checkpoint, or no run at all: loading it will say so
        return None
    return None if data.texts else data.sources[0].recall or RecallConfig()


def _corpus(folder: Path) -> str:
    """The validation texts of a run: prose or code that it knows the manner of, and has not seen."""
    file = folder / "data" / "validation.jsonl"
    if not file.is_file():
        raise DataError(f"{folder} keeps no validation texts ({file} is missing); give hay with --hay FILE")
    return "\n".join(row["text"] for row in read_json_lines(file))


def _text(path: str) -> str:
    from byrote.cli.eval import read_texts

    return read_texts([path])[0][1]


def _named(hay: str, text: str) -> str:
    return f"{hay}, SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _fingerprint(folder: Path) -> str:
    facts = sorted(
        (str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()
    )
    return hashlib.sha256(json.dumps([str(folder.resolve()), facts]).encode()).hexdigest()[:16]


def _kinds(text: str | None, source: "NeedleSource") -> list[str]:
    from byrote.config import nearest

    kinds = list(source.kinds) if text is None else text.split(",")
    for kind in kinds:
        if kind not in source.kinds:
            raise ConfigError(
                f"needle kind {kind!r} is unknown for this hay; nearest: {nearest(kind, source.kinds)}; all: {', '.join(source.kinds)}"
            )
    return kinds


def _whole_numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--lengths is {text!r}; give whole numbers of tokens, such as 512,1024")
    return numbers


# --- what is written --------------------------------------------------------------------------------------------------


def _finished(out: Path, settings: dict[str, Any], cells: list["Cell"]) -> tuple[dict["Cell", "Score"], JsonLines]:
    """Cells of an earlier sitting with the same settings, and the file to go on with."""
    from byrote.eval.needle import Cell, Score

    try:
        rows = JsonLines(out / "cells.jsonl")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}. Choose another folder with --out") from error
    known = [row for row in read_json_lines(rows.path) if row.get("settings") == settings]
    found = {Cell(row["kind"], row["length"], row["depth"]): Score(hits=row["hits"], samples=row["samples"]) for row in known}
    return {cell: score for cell, score in found.items() if cell in cells}, rows


def _row(cell: "Cell", score: "Score") -> dict[str, Any]:
    return cell._asdict() | {"hits": score.hits, "samples": score.samples, "share": score.share, "interval": list(score.interval)}


def _report(args: argparse.Namespace, subject: Subject, scores: dict["Cell", "Score"]) -> None:
    from byrote.checkpoint.atomic import replace_file
    from byrote.eval import heatmap

    title = f"Needles: {subject.lm.name}"
    note = f"Right answers in per cent, with 95 % Wilson intervals; hay {subject.hay}; seed {args.seed} (one)."
    replace_file(subject.out / "needle.html", heatmap.page(title, [note], scores).encode())
    written = [str(subject.out / "needle.html")]
    try:
        replace_file(subject.out / "needle.png", heatmap.picture(title, scores))
        written.append(str(subject.out / "needle.png"))
    except ConfigError as error:
        note += f" No PNG: {error}."
    if args.json:
        rows = [_row(*item) for item in scores.items()]
        print(
            json.dumps(
                {"model": subject.lm.name, "hay": subject.hay, "seed": args.seed, "cells": rows, "files": written}, ensure_ascii=False
            )
        )
        return
    _print(scores)
    print(f"\n{note}\nheat map: {', '.join(written)}")


def _print(scores: dict["Cell", "Score"]) -> None:
    """One table: depths below each other for every kind, and all depths of a kind together."""
    from byrote.eval.heatmap import axes, kinds_of
    from byrote.eval.needle import Cell, pooled

    lengths, depths = axes(scores)
    rows = []
    for kind in kinds_of(scores):
        rows += [(kind, f"{100 * depth:.0f} %", *(scores[Cell(kind, length, depth)] for length in lengths)) for depth in depths]
        rows.append((kind, "all", *(pooled(scores, kind=kind, length=length) for length in lengths)))
    print_table(rows, ("kind", "depth", *(f"{length:,}" for length in lengths)))
