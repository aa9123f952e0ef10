"""`byrote compare RUN RUN…`: one table, one page of overlaid curves, and how many seeds stand behind every number.

Runs whose configurations differ in nothing but name and seeds are one row: mean ± sample standard deviation over seeds
(a seed that was run twice counts once, by its mean). What sets the rows apart is printed below the table.
"""

import argparse
import html
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from byrote.console import format_count, print_table, read_json_lines
from byrote.errors import ConfigError, DataError

HELP = "compare runs: a table with the number of seeds, and overlaid curves"

EXAMPLES = """
examples:
  byrote compare runs/tiny_cpu runs/tiny_cpu-without-memory
  byrote compare runs/memory-seed* runs/plain-seed* --out memory.html --json
"""

SEEDS = ("data.seed", "train.seed")
LOGGING = ("train.save_every", "train.keep_checkpoints", "train.eval_every", "train.log_every", "train.tensorboard")
IRRELEVANT = ("name", *SEEDS, *LOGGING)  # what two runs of one row may differ in
HEADER = ("run", "parameters", "memory", "steps", "tokens", "validation bits/byte", "tokens/s", "seeds")

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark"><title>byrote compare</title>
<style>
body{{font:16px system-ui,sans-serif;max-width:60rem;margin:1rem auto;padding:0 1rem;color:#222;background:#fff}}
.wide{{overflow-x:auto}}
table{{border-collapse:collapse}}
th,td{{padding:.3rem .7rem;border-bottom:1px solid #8884;text-align:right}}
th:first-child,td:first-child{{text-align:left}}
@media(prefers-color-scheme:dark){{body{{color:#ddd;background:#16181d}}}}
</style></head><body><h1>byrote compare</h1>
{body}
</body></html>
"""


class Run(NamedTuple):
    name: str
    config: dict[str, Any]  # flat: dotted name → value
    parameters: int  # of the network, without the table
    memory: int  # numbers in the table
    total_steps: int  # it was to have
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]

    @property
    def seeds(self) -> tuple[Any, ...]:
        return tuple(self.config.get(name) for name in SEEDS)

    @property
    def variant(self) -> str:
        """Equal for runs that are repetitions of one another."""
        return json.dumps({name: value for name, value in self.config.items() if name not in IRRELEVANT}, sort_keys=True)

    def last(self, kind: str, key: str) -> float | None:
        """The newest `key` among rows of `kind` ("train" or "validation")."""
        return next((row[key] for row in reversed(getattr(self, kind)) if row.get(key) is not None), None)

    @property
    def is_finished(self) -> bool:
        return self.last("train", "step") == self.total_steps

    @property
    def tokens_per_step(self) -> float:
        """Of a run that has begun: validation rows know their step, not the tokens trained until then."""
        return (self.last("train", "tokens") or 0) / (self.last("train", "step") or 1)

    @property
    def speed(self) -> float | None:
        speeds = [row["tokens_per_second"] for row in self.train if row.get("tokens_per_second")]
        return statistics.median(speeds) if speeds else None


class Estimate(NamedTuple):
    mean: float | None
    deviation: float | None  # None with a single seed

    def __str__(self) -> str:
        if self.mean is None:
            return "–"
        return f"{self.mean:.4f}" if self.deviation is None else f"{self.mean:.4f} ± {self.deviation:.4f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders made by `byrote train` or `byrote quickstart`")
    parser.add_argument("--out", metavar="FILE", default="compare.html", help="page to write (default: %(default)s)")
    parser.add_argument("--log-x", action="store_true", help="logarithmic axis for tokens and seconds")
    parser.add_argument("--json", action="store_true", help="print the table on stdout as JSON")


def run(args: argparse.Namespace) -> int:
    runs = load_runs([Path(path) for path in args.runs])
    groups = list(grouped(runs))
    rows, differences = [summary(group) for group in groups], _differences(groups)
    _write(Path(args.out), _page(runs, rows, differences, args.log_x))
    if args.json:
        print(json.dumps({"rows": rows, "differences": differences, "page": args.out}, indent=2, ensure_ascii=False))
        return 0
    print_table([_cells(row) for row in rows], HEADER)
    print("\n" + "\n".join([*_notes(rows), *differences, f"curves: {args.out}"]))
    return 0


# --- reading ----------------------------------------------------------------------------------------------------------


def load_runs(paths: list[Path]) -> list[Run]:
    """Runs with names that tell them apart. DataError for a folder that is no run."""
    short = [path.resolve().name for path in paths]
    return [_load(path, name if short.count(name) == 1 else str(path)) for path, name in zip(paths, short, strict=True)]


def _load(path: Path, name: str) -> Run:
    from byrote.config import from_dict
    from byrote.model.count import count_parameters
    from byrote.train.run import RunConfig

    for file in ("run.json", "metrics.jsonl"):
        if not (path / file).is_file():
            raise DataError(f"{path} is no run: {file} is missing. Give folders made by `byrote train` or `byrote quickstart`")
    try:
        saved = json.loads((path / "run.json").read_text(encoding="utf-8"))
        rows = read_json_lines(path / "metrics.jsonl")
        config = from_dict(RunConfig, saved["config"])
    except (ValueError, KeyError, ConfigError) as error:
        raise DataError(f"the run in {path} cannot be read: {error}. Was it written by another version, or changed by hand?") from error
    counted = count_parameters(config.model)
    train, validation = ([row for row in rows if row.get("kind") == kind] for kind in ("train", "validation"))
    values = dict(_flat(saved["config"])) | {"train.device": saved["device"]}  # the one it ran on, not "auto"
    return Run(name, values, counted.trained, counted.table, saved["total_steps"], train, validation)


def _flat(tree: dict[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    """Fields by dotted name; a part that is there also stands for itself as "on", since one that is not is None."""
    for key, value in tree.items():
        yield f"{path}{key}", "on" if isinstance(value, dict) else value
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")


# --- comparing --------------------------------------------------------------------------------------------------------


def grouped(runs: list[Run]) -> Iterable[list[Run]]:
    """Runs that repeat one another, in the order they were given."""
    groups: dict[str, list[Run]] = {}
    for one in runs:
        groups.setdefault(one.variant, []).append(one)
    return groups.values()


def summary(group: list[Run]) -> dict[str, Any]:
    first = group[0]
    bits = estimate([(one.seeds, one.last("validation", "bits_per_byte")) for one in group])
    speed = estimate([(one.seeds, one.speed) for one in group])
    return {
        "runs": [one.name for one in group],
        "parameters": first.parameters,
        "memory": first.memory,
        "steps": _span([one.last("train", "step") for one in group]),
        "tokens": _span([one.last("train", "tokens") for one in group]),
        "validation_bits_per_byte": bits._asdict(),
        "tokens_per_second": speed._asdict(),
        "seeds": len({one.seeds for one in group}),
        "unfinished": [one.name for one in group if not one.is_finished],
    }


def _span(values: list[float | None]) -> tuple[float, float] | None:
    """(least, most): runs with a budget of seconds differ in steps."""
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else None


def estimate(measured: list[tuple[Any, float | None]]) -> Estimate:
    """Mean and sample standard deviation over seeds of (seed, value); values that are missing are left out."""
    by_seed: dict[Any, list[float]] = {}
    for seed, value in measured:
        if value is not None:
            by_seed.setdefault(seed, []).append(value)
    means = [statistics.fmean(values) for values in by_seed.values()]
    if not means:
        return Estimate(None, None)
    return Estimate(statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else None)


def _differences(groups: list[list[Run]]) -> list[str]:
    """One line per configuration field in which the rows differ, values in the order of the rows."""
    if len(groups) < 2:
        return []
    configs = [group[0].config for group in groups]
    lines = []
    for name in dict.fromkeys(name for config in configs for name in config):
        parent = name.rpartition(".")[0]
        values = [json.dumps(config[name], ensure_ascii=False) if name in config else "–" for config in configs]
        # where the part around a field is switched off, the line of that part says so
        told = {value for value, config in zip(values, configs, strict=True) if not parent or config.get(parent) is not None}
        if name not in IRRELEVANT and len(told) > 1:
            lines.append(f"{name}: {' | '.join(values)}")
    return lines


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    notes = []
    if any(row["seeds"] > 1 for row in rows):
        notes.append("± is the sample standard deviation over seeds.")
    if any(row["seeds"] == 1 for row in rows):
        notes.append("A row with one seed has no spread: a small difference from it may be chance.")
    unfinished = [name for row in rows for name in row["unfinished"]]
    if unfinished:
        notes.append(f"Not finished, so not comparable with finished runs: {', '.join(unfinished)}.")
    if len(rows) > 1:
        notes.append("Where the rows differ, from the first to the last:")
    return notes


# --- showing ----------------------------------------------------------------------------------------------------------


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    bits, speed = Estimate(**row["validation_bits_per_byte"]), row["tokens_per_second"]["mean"]
    sizes = [format_count(row["parameters"]), format_count(row["memory"]), _span_text(row["steps"]), _span_text(row["tokens"])]
    return (", ".join(row["runs"]), *sizes, str(bits), "–" if speed is None else f"{speed:.0f}", str(row["seeds"]))


def _span_text(span: tuple[float, float] | None) -> str:
    return "–" if span is None else "–".join(dict.fromkeys(map(format_count, span)))


def _page(runs: list[Run], rows: list[dict[str, Any]], differences: list[str], log_x: bool) -> str:
    table = _html_row(HEADER, "th") + "".join(_html_row(_cells(row), "td") for row in rows)
    notes = "".join(f"<p>{html.escape(line)}</p>" for line in [*_notes(rows), *differences])
    return PAGE.format(body=f'<div class="wide"><table>{table}</table></div>{notes}{"".join(_charts(runs, log_x))}')


def _html_row(cells: Iterable[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"


def _charts(runs: list[Run], log_x: bool) -> Iterable[str]:
    from byrote.eval.curves import Series, svg_lines

    for title, x_label, points in (
        ("Validation", "tokens trained", _validation_points),
        ("Training", "tokens trained", lambda one: _training_points(one, "tokens")),
        ("Training by the clock", "seconds", lambda one: _training_points(one, "seconds")),
    ):
        yield svg_lines([Series(one.name, points(one)) for one in runs], title=title, x_label=x_label, y_label="bits per byte", log_x=log_x)


def _validation_points(one: Run) -> list[tuple[float, float]]:
    by_step = {row["step"]: row["bits_per_byte"] for row in one.validation if row["bits_per_byte"] is not None}  # the newest of each step
    return [(step * one.tokens_per_step, bits) for step, bits in sorted(by_step.items())]


def _training_points(one: Run, x: str) -> list[tuple[float, float]]:
    return [(row[x], row["bits_per_byte"]) for row in one.train if row["bits_per_byte"] is not None]


def _write(path: Path, text: str) -> None:
    from byrote.checkpoint.atomic import replace_file

    try:
        replace_file(path, text.encode("utf-8"))
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error}. Choose another file") from error
