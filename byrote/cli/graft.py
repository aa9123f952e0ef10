"""`byrote graft MODEL --text FOLDER --layers 1,14 --out PACK`: memory for a Hugging Face model, and what it is worth, in one command."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byrote.config import Option, apply_overrides, describe, format_value, to_dict
from byrote.console import Progress, format_bytes, format_count, print_table
from byrote.errors import ConfigError

if TYPE_CHECKING:
    from byrote.graft.prepare import GraftConfig
    from byrote.graft.session import Report

HELP = "train a memory for any Hugging Face causal LM, from outside"

EXAMPLES = """
examples:
  byrote graft models/qwen --text notes/ --layers 1,14 --out packs/notes
  byrote graft models/qwen --facts catalogue.csv --out packs/catalogue       a header, and a row for each thing
  byrote graft models/qwen --text notes/ --out packs/notes --controls        also train the negative controls
  byrote graft models/qwen --text law/ --like packs/notes --out packs/law    so that the two can be merged
  byrote graft models/qwen --text notes/ --out packs/notes --dry-run         sizes, and whether they fit

The model is never changed. MODEL is a folder with weights in safetensors, or a name on the hub; code that comes with it is not run.
Stopped (Ctrl-C), the same command goes on. Then, in Python: byrote.graft.attach(model, "packs/notes") … byrote.graft.detach(model)
"""

INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} MODEL --text FOLDER | --facts TABLE --out PACK [--layers 1,14] [--controls [NAMES]] [--option VALUE …]"
    parser.epilog = EXAMPLES
    parser.add_argument("model", metavar="MODEL", help="a transformers model: folder, or name on the hub")
    parser.add_argument("--out", metavar="PACK", required=True, help="folder of the pack to write; PACK.work is used meanwhile")
    parser.add_argument("--dry-run", action="store_true", help="read the text, print sizes and configuration, train nothing")
    parser.add_argument(
        "--no-text", action="store_true", help="leave the most visited n-grams, which are text of the corpus, out of the pack"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="load the model's weights in this dtype (default: as saved)")
    parser.add_argument("--json", action="store_true", help="print the result on stdout as JSON")
    for option in _options():
        optional: dict[str, Any] = {"nargs": "?", "const": "all"} if option.name == "controls" else {}
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            dest=option.name,
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=_help(option),
            **optional,
        )


def run(args: argparse.Namespace) -> int:
    config, out = _config(args), Path(args.out)
    import torch

    from byrote.device import pick_device
    from byrote.graft.host import load_host
    from byrote.graft.session import run_graft
    from byrote.train.interrupt import stop_on_interrupt

    with Progress("graft") as live:
        live.update(f"loading {args.model}" if Path(args.model).is_dir() else f"{args.model} is no folder here; asking the hub")
        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        model, text = load_host(args.model, device=pick_device(args.device), dtype=dtype)
        if args.dry_run:
            return _dry_run(config, model, text, out, live, args.json)
        with stop_on_interrupt() as stop:
            report = run_graft(config, args.model, model, text, out, progress=live.update, stop=stop, with_text=not args.no_text)
        live.close("stopped; the same command goes on" if report.pack is None else f"{report.pack} is written")
    _print(report, args.json)
    return INTERRUPTED if report.pack is None else 0


def _config(args: argparse.Namespace) -> "GraftConfig":
    from byrote.graft.controls import CONTROLS
    from byrote.graft.prepare import GraftConfig

    given = {name: value for name, value in vars(args).items() if name in {option.name for option in _options()}}
    if given.get("controls") == "all":
        given["controls"] = ",".join(CONTROLS)
    if not {"text", "facts"} & set(given):
        raise ConfigError("there is nothing to learn: give --text FOLDER, or --facts TABLE.csv")
    return apply_overrides(GraftConfig(text=("python-stdlib",)), {"text": ""} | given)


def _options() -> list[Option]:
    from byrote.graft.prepare import GraftConfig

    return describe(GraftConfig)


def _help(option: Option) -> str:
    return f"{option.doc.rstrip('.')} ({option.type}; default: {format_value(option.default)})".replace("%", "%%")


def _dry_run(config: "GraftConfig", model: Any, text: Any, out: Path, live: Progress, as_json: bool) -> int:
    import tempfile

    from byrote.graft.host import find_host
    from byrote.graft.prepare import check_fits_machine, engram_config, graft_bytes, prepare_data, training_steps, window

    window(config, model)
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_data(config, text, Path(folder), live.update)
        engram = engram_config(config, find_host(model), text, data.tokens)
    check_fits_machine(engram, model, out.absolute().parent)
    held = {part: sum(len(one.text.encode()) for one in getattr(data, part)) for part in ("inside", "outside")}
    size = graft_bytes(engram, model)
    plan = {"tokens": data.tokens, "facts": len(data.facts), "held_bytes": held, "ram_bytes": size.ram, "disk_bytes": size.disk}
    live.close("nothing was trained")
    if as_json:
        print(json.dumps({"config": to_dict(config), "engram": to_dict(engram), "plan": plan}, indent=2, ensure_ascii=False))
        return 0
    blocks = ", ".join(map(str, engram.layers))
    print_table(
        [
            ("text to learn", f"{format_count(data.tokens)} tokens, read in {training_steps(config, data.tokens)[0]:,} steps"),
            *([("facts", f"{len(data.facts)}, such as: {data.facts[0].prompt}{data.facts[0].answer}")] if data.facts else []),
            ("text held back", f"{format_bytes(held['inside'])} in the domain, {format_bytes(held['outside'])} outside"),
            ("memory", f"blocks {blocks}, {engram.heads_per_layer} × {engram.rows_per_order} rows of {engram.head_dim} in each"),
            ("needs", f"{format_bytes(size.ram)} of RAM beside the model, {format_bytes(size.disk)} of disk: both are free"),
        ]
    )
    return 0


def _print(report: "Report", as_json: bool) -> None:
    from byrote.graft.card import table

    if as_json:
        results = [result._asdict() | {"measured": result.measured._asdict()} for result in report.results]
        facts = report._asdict() | {"before": report.before._asdict(), "results": results}
        print(json.dumps(facts | {"pack": None if report.pack is None else str(report.pack)}, ensure_ascii=False))
        return
    header, *rows = table(report)
    print_table(rows, header)
    if report.pack is not None:
        print(f'\nNext:\n  byrote memory inspect {report.pack}\n  python: byrote.graft.attach(model, "{report.pack}")', file=sys.stdout)
