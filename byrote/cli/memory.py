"""`byrote memory ACTION …`: a memory as a file. Here what concerns runs; `memory_files.py` has what concerns packs alone."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from byrote.cli import memory_edit, memory_files
from byrote.console import Progress, print_table
from byrote.errors import MemoryPackError
from byrote.memory.config import OWN

if TYPE_CHECKING:
    from byrote.checkpoint.packs import AttachedPacks

HELP = "pack, inspect, verify, attach, detach, swap, compare, merge and edit memories"

EXAMPLES = """
examples:
  byrote memory pack runs/tiny packs/tiny                  the memory of a run as a folder you can give away
  byrote memory inspect packs/tiny                         what it is; byrote memory verify packs/tiny checks every byte
  byrote memory attach runs/base packs/law packs/medicine  from now on byrote generate, chat and eval of this run use them
  byrote memory swap runs/base law packs/law-2             another in its place
  byrote memory detach runs/base law                       the run answers as if it had never been there
  byrote memory detach runs/tiny own                       silence the memory the run was trained with (attach ... own: back)
  byrote memory merge packs/a packs/b packs/ab             one pack of two with equal hash and projections

byrote memory ACTION --help explains one action. Packs hold no code, and opening one runs none.
"""


class Action(NamedTuple):
    help: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    chosen = parser.add_subparsers(metavar="ACTION", required=True, title="actions")
    for name, action in ACTIONS.items():
        sub = chosen.add_parser(name, help=action.help, description=action.help)
        action.add(sub)
        sub.set_defaults(act=action.run)


def run(args: argparse.Namespace) -> int:
    return args.act(args)


# --- pack -------------------------------------------------------------------------------------------------------------


def _add_pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run or checkpoint that was trained with memory")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--name", metavar="NAME", help="what the pack is called (default: the name of RUN)")
    parser.add_argument("--provenance", metavar="TEXT", help="which text it was made from, and how (default: recipe and steps of RUN)")
    parser.add_argument("--licence", metavar="TEXT", default="not stated", help="under which it may be used (default: %(default)s)")
    parser.add_argument(
        "--top", type=memory_files.count, default=200, metavar="N", help="list the N most visited n-grams as text (default: %(default)s)"
    )
    parser.add_argument("--no-text", action="store_true", help="leave that list out, so that no text of the corpus is in the pack")
    memory_files.add_writing(parser)


def _pack(args: argparse.Namespace) -> int:
    from byrote.checkpoint.packs import open_pack_files, save_pack
    from byrote.checkpoint.run_pack import pack_of_run

    with Progress("pack") as live:
        live.update(f"loading {args.run}")
        found = pack_of_run(args.run, name=args.name, provenance=args.provenance, licence=args.licence)
        top = []
        if found.sketch is not None and not args.no_text:
            top = found.sketch.named(args.top, found.pack.memory.canonical_V, found.tokenizer.decode)
        target = save_pack(found.pack, args.out, top=top, overwrite=args.overwrite, report=memory_files.shown(live))
        live.close(f"{target} is written")
    return memory_files.show_pack(open_pack_files(target), args.json)


# --- attach, detach, swap ---------------------------------------------------------------------------------------------


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run or checkpoint")


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", metavar="NAME", help="what the pack is called in this run (default: its own name)")
    parser.add_argument("--any-base", action="store_true", help="take a pack that was trained on another base model of the same shape")
    parser.add_argument("--json", action="store_true", help="print the result on stdout as JSON")


def _add_attach(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("packs", metavar="PACK", nargs="+", help="folder of a pack; several stack. 'own' is what the run was trained with")
    _add_choice(parser)


def _attach(args: argparse.Namespace) -> int:
    from byrote.checkpoint.packs import attached_packs, note_for

    noted = attached_packs(args.run)
    packs = [pack for pack in args.packs if pack != OWN]
    if args.name is not None and len(packs) != 1:
        raise MemoryPackError(f"--name names one pack, and {len(packs)} are given. Attach them one by one")
    entries = tuple(note_for(args.run, pack, args.name, any_base=args.any_base) for pack in packs)
    return _note(args, replace(noted, own=noted.own or OWN in args.packs, packs=noted.packs + entries))


def _add_detach(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("names", metavar="NAME", nargs="+", help="an attached pack. 'own' is the memory the run was trained with")
    parser.add_argument("--json", action="store_true", help="print the result on stdout as JSON")


def _detach(args: argparse.Namespace) -> int:
    from byrote.checkpoint.packs import attached_packs

    noted = attached_packs(args.run)
    for name in args.names:
        _require_attached(noted, name, args.run)
    packs = tuple(entry for entry in noted.packs if entry.name not in args.names)
    return _note(args, replace(noted, own=noted.own and OWN not in args.names, packs=packs))


def _add_swap(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("old", metavar="NAME", help="an attached pack")
    parser.add_argument("pack", metavar="PACK", help="folder of the pack that takes its place")
    _add_choice(parser)


def _swap(args: argparse.Namespace) -> int:
    from byrote.checkpoint.packs import attached_packs, note_for

    noted = attached_packs(args.run)
    _require_attached(noted, args.old, args.run)
    entry = note_for(args.run, args.pack, args.name, any_base=args.any_base)
    if args.old == OWN:
        return _note(args, replace(noted, own=False, packs=(entry, *noted.packs)))
    return _note(args, replace(noted, packs=tuple(entry if other.name == args.old else other for other in noted.packs)))


def _require_attached(noted: "AttachedPacks", name: str, run: str) -> None:
    names = [entry.name for entry in noted.packs] + [OWN] * noted.own
    if name not in names:
        raise MemoryPackError(f"no pack named {name!r} is attached to {run}; attached are: {', '.join(names) or 'none'}")


def _note(args: argparse.Namespace, wanted: "AttachedPacks") -> int:
    """Put all of it on the model, which checks it, and only then write it down."""
    import byrote
    from byrote.checkpoint.packs import attach_noted, note_packs

    with Progress("memory") as live:
        live.update(f"loading {args.run}")
        model, tokenizer = byrote.load(args.run, packs=False)
        has_own = model.memory is not None
        if not (wanted.own or has_own):
            raise MemoryPackError(f"{args.run} has no memory of its own: it was trained with model.engram none")
        attach_noted(model, args.run, wanted, tokenizer=None if tokenizer is None else tokenizer.fingerprint())
        note_packs(args.run, wanted)
        live.close(f"{args.run} is changed")
    print_attached(args.run, wanted, has_own=has_own, as_json=args.json)
    return 0


def print_attached(run: str, noted: "AttachedPacks", *, has_own: bool, as_json: bool) -> None:
    """What speaks in a run, in its order."""
    packs = [{"name": entry.name, "path": entry.path, "digest": entry.digest, "any_base": entry.any_base} for entry in noted.packs]
    own = noted.own and has_own
    if as_json:
        print(json.dumps({"run": run, "own": own, "packs": packs}, indent=2, ensure_ascii=False))
        return
    rows = [(str(entry["name"]), str(entry["path"]), str(entry["digest"])[:12]) for entry in packs]
    print_table(rows + [(OWN, "trained with the run", "")] * own or [("none", "", "")], ("pack", "folder", "digest"))


# --- inspect, top -----------------------------------------------------------------------------------------------------


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", metavar="PACK", help="folder of a pack, or of a run: what is attached to it")
    parser.add_argument("--json", action="store_true", help="print the result on stdout as JSON")


def _inspect(args: argparse.Namespace) -> int:
    from byrote.checkpoint.local import read_config
    from byrote.checkpoint.packs import attached_packs, open_pack_files
    from byrote.checkpoint.runs import find_checkpoint, is_run

    if is_run(args.pack):
        has_own = read_config(find_checkpoint(args.pack)).engram is not None
        print_attached(args.pack, attached_packs(args.pack), has_own=has_own, as_json=args.json)
        return 0
    return memory_files.show_pack(open_pack_files(args.pack), args.json)


def _add_top(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="PACK_OR_RUN", help="folder of a pack with top.json, or of a run that counted n-grams")
    parser.add_argument("-n", type=memory_files.count, default=30, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result on stdout as JSON")


def _top(args: argparse.Namespace) -> int:
    from byrote.checkpoint.runs import is_run

    entries, lost = _top_of_run(args.source, args.n) if is_run(args.source) else (memory_files.top_of_pack(args.source, args.n), None)
    if args.json:
        result: dict[str, Any] = {"source": args.source, "at_most_missed": lost, "top": [entry._asdict() for entry in entries]}
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return 0
    print_table(
        [(json.dumps(entry.text, ensure_ascii=False), entry.order, entry.times) for entry in entries], ("n-gram", "order", "visits")
    )
    if lost:
        print(f"\nEvery count may be up to {lost:,} too low: the sketch is bounded (memory/heavy.py)", file=sys.stderr)
    return 0


def _top_of_run(path: str, count: int) -> tuple[list[Any], int]:
    import byrote
    from byrote.checkpoint.run_pack import read_sketch

    sketch = read_sketch(path)
    if sketch is None:
        raise MemoryPackError(f"{path} kept no sketch of n-grams: it was trained without memory, or with --train.count_ngrams 0")
    model, tokenizer = byrote.load(path, packs=False)
    if model.memory is None or tokenizer is None:
        raise MemoryPackError(f"{path} has no memory, or no tokenizer to write n-grams with")
    return sketch.named(count, model.memory.canonical_V, tokenizer.decode), sketch.lost


ACTIONS = {
    "pack": Action("write the memory of a run as a pack", _add_pack, _pack),
    "inspect": Action("show what a pack is, or what is attached to a run", _add_inspect, _inspect),
    "verify": Action("check every byte of a pack", memory_files.add_verify, memory_files.verify),
    "attach": Action("put packs on a run", _add_attach, _attach),
    "detach": Action("take packs off a run", _add_detach, _detach),
    "swap": Action("put a pack in the place of another", _add_swap, _swap),
    "diff": Action("show where two packs differ", memory_files.add_diff, memory_files.diff),
    "quantize": Action("write a pack with FP8 rows, a quarter of the size", memory_files.add_quantize, memory_files.quantize),
    "top": Action("show the most visited n-grams as text", _add_top, _top),
    "merge": Action("make one pack of two", memory_files.add_merge, memory_files.merge),
    **{name: Action(*verb) for name, verb in memory_edit.EDIT_VERBS.items()},
}
