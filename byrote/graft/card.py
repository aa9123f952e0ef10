"""What a graft's CARD.md says beyond what every pack says: what it brings, what it costs elsewhere, and what its controls came to."""

from collections.abc import Callable, Iterable
from statistics import mean
from typing import TYPE_CHECKING, Any

from byrote.console import format_count

if TYPE_CHECKING:
    from byrote.graft.prepare import GraftConfig
    from byrote.graft.session import Measured, Report, Result

MEANINGS = {
    "host": "as it was",
    "graft": "table, projections, gate and convolution",
    "one-row": "control: a table with a capacity of one",
    "shuffled": "control: rows of another place in the text",
    "frozen-rows": "control: random rows that do not learn",
    "no-lookup": "control: gate and convolution without a table",
    "lora": "control: low-rank adapters instead, about as many weights",
}


def card(config: "GraftConfig", host: str, report: "Report") -> str:
    """Markdown sections."""
    inside, outside = report.held_bytes
    seeds = f"{len(config.seeds)} seed{'s' if len(config.seeds) > 1 else ''} ({', '.join(map(str, config.seeds))})"
    lines = [
        "## What it brings, and what it costs",
        "",
        f"Grafted on `{host}`, frozen: {report.steps:,} steps, "
        f"{format_count(report.tokens)} tokens {report.epochs:.3g} times, {seeds}.",
        f"Bits per byte of text held back from training: {inside:,} bytes in the domain, {outside:,} bytes outside it "
        f"(`{config.outside}`). Less is better. Mean over the seeds, and the range where there are several.",
        "",
        *_markdown(table(report)),
        "",
        "A gain is memory's own only as far as the controls do not show it too." if len(report.results) > len(config.seeds) else
        "No controls were run (`--controls`): how much of the gain is memory's own is not known.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def table(report: "Report") -> list[list[str]]:
    """Header and rows: one for the host, one for the graft and for each control."""
    header = ["", "what learns", "in the domain", "outside"]
    facts = len(report.before.recalled)
    header += ["facts recalled", *(f"… paraphrase {number}" for number in range(1, facts))] if facts else []
    rows = [[*header, "weights"], ["host", MEANINGS["host"], *_cells([report.before]), ""]]
    for kind in dict.fromkeys(result.kind for result in report.results):
        some = [result for result in report.results if result.kind == kind]
        rows.append([kind, MEANINGS[kind], *_cells([result.measured for result in some]), _size(some[0])])
    return rows


def _size(result: "Result") -> str:
    return format_count(result.weights + result.touched)


def _cells(measured: list["Measured"]) -> list[str]:
    cells = [_cell([one.inside for one in measured], "{:.4f}".format), _cell([one.outside for one in measured], "{:.4f}".format)]
    return cells + [_cell(shares, "{:.1%}".format) for shares in zip(*(one.recalled for one in measured), strict=True)]


def _cell(values: Iterable[Any], form: Callable[[float], str]) -> str:
    values = list(values)
    if values[0] is None:
        return "–"
    low, high = form(min(values)), form(max(values))
    return form(mean(values)) + (f" ({low} to {high})" if len(values) > 1 else "")


def _markdown(rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]
