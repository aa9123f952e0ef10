"""`byrote train RECIPE --section.key value …`: the options are the fields of `RunConfig`; nothing is listed twice."""

import argparse
import json
import math
import shlex
import sys
from dataclasses import is_dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from byrote.config import REQUIRED, Option, apply_overrides, describe, format_value, to_dict
from byrote.console import Progress, format_count, format_duration, print_table
from byrote.errors import ConfigError
from byrote.recipes import RECIPES, load_recipe

if TYPE_CHECKING:
    from byrote.train.run import RunConfig
    from byrote.train.session import TrainSummary

HELP = "train a recipe; every field of its configuration is an option"

EXAMPLES = """
examples:
  byrote train tiny_cpu --train.seconds 120 --data.sources notes/,code/
  byrote train small --model.engram none --train.seed 1 --out runs/small-without-memory
  byrote train tiny_cpu --dry-run                          the full configuration and what it will cost
  byrote train tiny_cpu --out runs/tiny_cpu --resume       continue a run that was stopped

Values: true or false, none, 1e-3, and 1,4 for several. `none` switches a part of the model off (--model.mtp none); giving
one of its fields switches it on. Defaults below are those of the dataclasses; a recipe sets many of them: see --dry-run.
"""

INTERRUPTED = 130  # exit status, as of any program that Ctrl-C ends


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} RECIPE [--section.key VALUE …] [--out DIR] [--resume] [--dry-run] [--json]"
    parser.epilog = EXAMPLES
    parser.add_argument("recipe", metavar="RECIPE", help=f"one of: {', '.join(RECIPES)}")
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and the plan, train nothing")
    parser.add_argument("--json", action="store_true", help="print the result on stdout as JSON")
    for section, options in groupby(_options(), key=lambda option: option.name.rpartition(".")[0]):
        group = parser.add_argument_group(section or "run")
        for option in options:
            group.add_argument(f"--{option.name}", dest=option.name, metavar="VALUE", default=argparse.SUPPRESS, help=_help(option))


def run(args: argparse.Namespace) -> int:
    names = {option.name for option in _options()}
    overrides = {name: text for name, text in vars(args).items() if name in names}
    config = apply_overrides(load_recipe(args.recipe), overrides)
    if args.dry_run:
        return _dry_run(config, args.json)
    out = Path(args.out or f"runs/{config.name}")
    check_folder(out, args.resume)
    from byrote.cli.training import train_with_progress

    with Progress() as progress:
        _, summary, validator = train_with_progress(config, out, resume=args.resume, progress=progress)
    bits = None if validator.last is None else validator.last.bits_per_byte
    _print_result(out, summary, bits, args.json)
    if not summary.interrupted:
        return 0
    print(f"Saved. To go on:\n  {_resume_command(args.recipe, overrides, out)}", file=sys.stderr)
    return INTERRUPTED


def _print_result(out: Path, summary: "TrainSummary", bits: float | None, as_json: bool) -> None:
    if as_json:
        loss = summary.loss if math.isfinite(summary.loss) else None  # of a finished run that was resumed there is none
        print(json.dumps(to_dict(summary) | {"run": str(out), "loss": loss, "validation_bits_per_byte": bits}, ensure_ascii=False))
        return
    rows = [
        ("parameters", f"{format_count(summary.parameters)}, and {format_count(summary.memory_parameters)} in the memory table"),
        ("trained", f"{summary.steps:,} steps, {format_count(summary.tokens)} tokens in {format_duration(summary.seconds)}"),
        ("speed", f"{summary.tokens_per_second:,.0f} tokens/s"),
    ]
    if bits is not None:
        rows.append(("validation", f"{bits:.4f} bits per byte (one run, one seed)"))
    print_table(rows)
    if not summary.interrupted:
        print(f'\nNext:\n  byrote generate {out} "Once"\n  byrote eval {out} --bits FILE…   (or --needle)\n  byrote compare {out} RUN…')


def _resume_command(recipe: str, overrides: dict[str, str], out: Path) -> str:
    options = [word for name, text in overrides.items() for word in (f"--{name}", text)]
    return shlex.join(["byrote", "train", recipe, *options, "--out", str(out), "--resume"])


def _options() -> list[Option]:
    from byrote.train.run import RunConfig

    return describe(RunConfig)


def _help(option: Option) -> str:
    default = "set by the recipe" if option.default is REQUIRED else f"default: {format_value(option.default)}"
    return f"{option.doc.rstrip('.')} ({option.type}; {default})".lstrip().replace("%", "%%")


def _dry_run(config: "RunConfig", as_json: bool) -> int:
    from byrote.cli.plan import print_plan
    from byrote.model.plan import model_plan

    plan = model_plan(
        config.name,
        config.model,
        sequence=config.data.sequence_length,
        matrix_rule=config.optim.matrix,
        table_rule=config.optim.table_rule,
        table=config.table,
    )
    if as_json:
        print(json.dumps({"config": to_dict(config), "plan": plan}, indent=2, ensure_ascii=False))
        return 0
    for option in _set_fields(config):
        print(f"--{option.name:<38} {format_value(option.default)}")
    print()
    print_plan(plan)
    return 0


def _set_fields(config: "RunConfig") -> list[Option]:
    """The fields of all parts that are switched on, and of a part that is not, the part itself."""
    options = describe(config)
    off = tuple(f"{option.name}." for option in options if option.default is None)
    return [option for option in options if not is_dataclass(option.default) and not option.name.startswith(off)]


def check_folder(out: Path, resume: bool) -> None:
    """A run is never overwritten, and never resumed where there is none."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder")
    has_run = (out / "run.json").exists()
    if has_run and not resume:
        raise ConfigError(f"{out} already holds a run. Add --resume to continue it, or give another folder with --out")
    if resume and not has_run:
        raise ConfigError(
            f"{out} holds no run to resume (no run.json). Leave --resume out to start one, or name the folder of the run with --out"
        )
