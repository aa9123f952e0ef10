"""`byrote memory write | forget | facts | damage | probe`: what a run's memory says, changed one fact at a time and looked at."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byrote.console import Progress, print_table
from byrote.errors import ConfigError, DataError

if TYPE_CHECKING:
    from byrote.graft.edit import Attempt, EditConfig, HeldOut
    from byrote.graft.journal import EditableRun

HELD_BYTES = 32 * 1024


# --- write and forget -------------------------------------------------------------------------------------------------


def _add_write(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("prompt", metavar="PROMPT", help='what comes before the answer: "The capital of Aruba is"')
    parser.add_argument("answer", metavar="ANSWER", help='what shall follow, with the space before it: " Oranjestad"')
    _add_bound(parser)


def _write(args: argparse.Namespace) -> int:
    from byrote.graft.edit import write_fact
    from byrote.graft.facts import Fact

    config = _config(args)
    with Progress("write") as live:
        run, held = _open(args, live)
        live.update("moving the rows of its n-grams")
        attempt = write_fact(run.model, run.tokenizer, Fact(args.prompt, args.answer), held, config, run.entries)
        if attempt.entry is None:
            raise ConfigError(_not_written(args.answer, config, attempt))
        moved = int((attempt.entry.before_WE != attempt.entry.after_WE).any(1).sum())
        if moved:
            live.update("saving")
            run.save([*run.entries, attempt.entry])
        live.close(f"fact {len(run.entries)} is written" if moved else "the model says so already; nothing was changed")
    result = {
        "fact": len(run.entries) if moved else None,
        "rows": moved,
        "nats_before": attempt.nats_before,
        "nats_after": attempt.nats_after,
        "felt_bits_per_byte": attempt.felt_bits,
        "held_bytes": held.num_bytes,
    }
    _show(
        args, result, [("rows changed", f"{result['rows']}"), *_nats(attempt), ("held-out text", f"{attempt.felt_bits:+.2g} bits per byte")]
    )
    return 0


def _not_written(answer: str, config: "EditConfig", attempt: "Attempt") -> str:
    return (
        f"{answer!r} cannot be made the most probable answer within {config.max_bits:g} bits per byte of held-out text, and without losing "
        f"a fact that was written before; the last attempt cost {attempt.felt_bits:.2g} and brought a token of it from "
        f"{attempt.nats_before:.2f} to {attempt.nats_after:.2f} nats. Nothing was changed. Raise --max-bits, or give a more telling prompt"
    )


def _nats(attempt: "Attempt") -> list[tuple[str, str]]:
    return [("nats per token of the answer", f"{attempt.nats_before:.2f} before, {attempt.nats_after:.2f} after")]


def _add_forget(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("fact", metavar="FACT", help="number of the fact (byrote memory facts RUN), or its prompt")
    parser.add_argument("--rewrite", action="store_true", help="where later facts share its rows: take them out too, and write them again")
    _add_bound(parser)


def _forget(args: argparse.Namespace) -> int:
    from byrote.graft.edit import forget_fact

    config = _config(args)
    with Progress("forget") as live:
        live.update("loading")
        run, held = _open(args, live) if args.rewrite else (_loaded(args.run), None)
        number = _find(run, args.fact)
        gone = run.entries[number]
        left = forget_fact(run.model, run.tokenizer, run.entries, number, rewrite=args.rewrite, held=held, config=config)
        live.update("saving")
        run.save(left)
        live.close(f"forgotten: {gone.prompt}{gone.answer}")
    _show(args, {"forgotten": gone.prompt + gone.answer, "rows": len(gone.rows_W), "facts": len(left)}, [("facts left", f"{len(left)}")])
    return 0


def _find(run: "EditableRun", wanted: str) -> int:
    places = [place for place, entry in enumerate(run.entries) if wanted in (str(place + 1), entry.prompt)]
    if not places:
        raise ConfigError(f"no fact {wanted!r} in {run.journal}, which has {len(run.entries)}; `byrote memory facts RUN` lists them")
    return places[-1]


# --- facts and damage -------------------------------------------------------------------------------------------------


def _facts(args: argparse.Namespace) -> int:
    run = _loaded(args.run)
    rows = [(place + 1, entry.prompt, entry.answer.strip(), len(entry.rows_W)) for place, entry in enumerate(run.entries)]
    if args.json:
        print(json.dumps([dict(zip(("fact", "prompt", "answer", "rows"), row, strict=True)) for row in rows], ensure_ascii=False))
    elif rows:
        print_table(rows, ("fact", "prompt", "answer", "rows"))
    else:
        print("no facts were written")
    return 0


def _add_damage(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--neighbours", metavar="TABLE", help="other facts to compare (.csv or .jsonl); default: those of the journal")
    _add_held(parser)
    parser.add_argument("--json", action="store_true", help="print the result on stdout as JSON")


def _damage(args: argparse.Namespace) -> int:
    from byrote.graft.edit import editable_memory, put_again, put_back
    from byrote.graft.facts import Fact, read_facts, recall

    with Progress("damage") as live:
        run, held = _open(args, live)
        facts = read_facts(args.neighbours) if args.neighbours else [Fact(entry.prompt, entry.answer) for entry in run.entries]
        if not run.entries:
            raise ConfigError(f"{args.run} has no facts; write one first (byrote memory write)")
        live.update("with the facts")
        after, known = held.bits() / held.num_bytes, recall(run.model, run.tokenizer, facts)
        memory = editable_memory(run.model)
        for entry in reversed(run.entries):
            put_back(memory, entry)
        live.update("without them")
        before, knew = held.bits() / held.num_bytes, recall(run.model, run.tokenizer, facts)
        for entry in run.entries:
            put_again(memory, entry)
    result = {
        "facts": len(run.entries),
        "held_bytes": held.num_bytes,
        "bits_per_byte": {"before": before, "after": after},
        "neighbours": len(facts),
        "recalled": {"before": knew.as_written, "after": known.as_written},
        "paraphrased": {"before": knew.paraphrased, "after": known.paraphrased},
    }
    rows = [
        ("bits per byte of held-out text", f"{before:.6f}", f"{after:.6f}", f"{after - before:+.2g}"),
        (f"recalled, of facts: {len(facts)}", f"{knew.as_written:.1%}", f"{known.as_written:.1%}", ""),
    ]
    _show(args, result, rows, ("", "before", "after", "change"))
    return 0


# --- probe ------------------------------------------------------------------------------------------------------------


def _add_probe(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("files", metavar="FILE", nargs="+", help="UTF-8 text; each file is a task")
    parser.add_argument("--html", metavar="OUT", help="also write the coloured texts as a page")
    parser.add_argument("--no-color", action="store_true", help="numbers only")
    parser.add_argument("--json", action="store_true", help="print numbers, token by token, on stdout as JSON")


def _probe(args: argparse.Namespace) -> int:
    from byrote.checkpoint.atomic import replace_file
    from byrote.cli.eval import read_texts
    from byrote.cli.loading import load_for_text
    from byrote.eval.memory_text import as_html, as_terminal, heard, knock_out

    texts = read_texts(args.files)
    model, tokenizer = load_for_text(args.run, "cpu")
    if model.memory is None and not model.packs:
        raise ConfigError(f"{args.run} has no memory to look into. Put a pack on it: byrote memory attach {args.run} PACK")
    visits_N = _saved_visits(args.run)
    pages = [(name, heard(model, tokenizer, content, visits_N)) for name, content in texts]
    tasks = knock_out(model, tokenizer, texts)
    if args.html:
        replace_file(Path(args.html), as_html(pages, tasks).encode())
    if args.json:
        tokens = {name: [one._asdict() for one in page] for name, page in pages}
        print(json.dumps({"tasks": [task._asdict() for task in tasks], "tokens": tokens}, ensure_ascii=False))
        return 0
    for name, page in pages if not args.no_color and sys.stdout.isatty() else []:
        print(f"{name}\n{as_terminal(page)}\n")
    rows = [
        (
            task.name,
            f"{task.with_memory:.4f}",
            f"{task.without:.4f}",
            f"{sum(one.gate for one in page) / max(len(page), 1):.2f}",
            f"{sum(one.visits for one in page) / max(len(page), 1):.1f}",
        )
        for task, (_, page) in zip(tasks, pages, strict=True)
    ]
    print_table(rows, ("task", "bits per byte", "memory zeroed", "mean gate", "mean visits"))
    return 0


def _saved_visits(path: str) -> Any:
    """Visits are part of the training state, which loading leaves out."""
    from byrote.checkpoint.runs import find_checkpoint
    from byrote.checkpoint.tables import TABLE_STATE
    from byrote.checkpoint.tensors import read_tensors

    state = find_checkpoint(path) / TABLE_STATE
    return read_tensors(state)["visits_N"] if state.is_file() else None


# --- what they share --------------------------------------------------------------------------------------------------


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of a checkpoint")


def _add_list(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--json", action="store_true", help="print the result on stdout as JSON")


def _add_held(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--held",
        metavar="FILE",
        nargs="+",
        help=f"text that shall feel nothing (default: {HELD_BYTES // 1024} KB of RUN's own validation texts)",
    )


def _add_bound(parser: argparse.ArgumentParser) -> None:
    from byrote.graft.edit import EditConfig

    for name, kind, what in (
        ("max_bits", float, "bits per byte that held-out text may lose"),
        ("steps", int, "steps of gradient descent at most"),
        ("lr", float, "their size"),
        ("margin", float, "nats by which each token of the answer shall lead"),
    ):
        default = EditConfig.__dataclass_fields__[name].default
        parser.add_argument(
            f"--{name.replace('_', '-')}", dest=name, type=kind, metavar="N", default=default, help=f"{what} (default: %(default)s)"
        )
    _add_held(parser)
    parser.add_argument("--json", action="store_true", help="print the result on stdout as JSON")


def _config(args: argparse.Namespace) -> "EditConfig":
    from byrote.graft.edit import EditConfig

    return EditConfig(**{field.name: getattr(args, field.name) for field in fields(EditConfig)})


def _loaded(path: str) -> "EditableRun":
    from byrote.graft.journal import EditableRun

    return EditableRun(path)


def _open(args: argparse.Namespace, live: Progress) -> tuple["EditableRun", "HeldOut"]:
    from byrote.graft.edit import HeldOut

    live.update(f"loading {args.run}")
    run = _loaded(args.run)
    live.update("reading held-out text")
    return run, HeldOut(run.model, run.tokenizer, held_texts(args.run, args.held))


def held_texts(run: str, files: list[str] | None) -> list[tuple[str, str]]:
    if files:
        from byrote.cli.eval import read_texts

        return read_texts(files)
    path = Path(run) / "data" / "validation.jsonl"
    if not path.is_file():
        raise DataError(f"{run} holds no validation texts ({path}); name text that shall feel nothing with --held FILE…")
    texts, left = list[tuple[str, str]](), HELD_BYTES
    for line in path.read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        part = document["text"].encode()[:left].decode("utf-8", "ignore")
        if part:
            texts.append((document["name"], part))
        left -= len(part.encode())
        if left <= 0:
            break
    return texts


def _show(args: argparse.Namespace, result: dict[str, Any], rows: Sequence[Sequence[str]], header: tuple[str, ...] = ()) -> None:
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        print_table(rows, header)


EDIT_VERBS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "write": ("write a fact into a run's memory, and nothing else", _add_write, _write),
    "forget": ("take a fact back, bitwise", _add_forget, _forget),
    "facts": ("list the facts that were written", _add_list, _facts),
    "damage": ("show what the facts cost held-out text and other facts", _add_damage, _damage),
    "probe": ("show where memory speaks in a text, and what the text costs without it", _add_probe, _probe),
}
