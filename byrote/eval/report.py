"""report.html: one self-contained file that shows what a run learnt. No script, no network; readable on a phone, light and dark.

Every section is a function from facts to HTML and is left out when its facts are absent (a model without memory has no gates).
"""

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

from byrote.eval.curves import Series, svg_lines
from byrote.eval.probes import Gain

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title>
<style>
:root{{--ink:#222;--paper:#fff;--soft:#667;--line:#8884;--spoke:0,114,178}}
@media(prefers-color-scheme:dark){{:root{{--ink:#ddd;--paper:#16181d;--soft:#99a;--spoke:86,180,233}}}}
body{{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:1rem auto;padding:0 1rem;color:var(--ink);background:var(--paper)}}
h1{{font-size:1.5rem}} h2{{font-size:1.15rem;margin-top:2.2rem;border-top:1px solid var(--line);padding-top:1rem}}
p.note{{color:var(--soft);font-size:.9rem}}
.wide{{overflow-x:auto}}
table{{border-collapse:collapse}} th,td{{padding:.25rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}}
th:first-child,td:first-child{{text-align:left}}
.facts td{{white-space:normal;text-align:left;vertical-align:top}}
pre{{overflow-x:auto;font:13px/1.55 ui-monospace,monospace;border:1px solid var(--line);padding:.7rem;border-radius:.4rem}}
.bar{{display:grid;grid-template-columns:minmax(9rem,15rem) 1fr 4.5rem;gap:.6rem;align-items:center;margin:.3rem 0}}
.bar i{{display:block;height:1rem;background:rgb(var(--spoke));border-radius:.2rem;min-width:2px}}
.bar b{{font-weight:600;text-align:right}}
.loads{{display:flex;align-items:flex-end;gap:2px;height:4rem;border-bottom:1px solid var(--line)}}
.loads i{{flex:1;background:rgb(var(--spoke));min-height:1px}}
.given{{color:var(--soft)}}
</style></head><body>
{body}
</body></html>
"""


class Bar(NamedTuple):
    label: str
    value: float


class GatedText(NamedTuple):
    """A text cut into tokens, with the mean gate of each."""

    name: str
    pieces: Sequence[str]
    gates: Sequence[float]


class Sample(NamedTuple):
    prompt: str
    text: str


class Report(NamedTuple):
    title: str
    facts: Sequence[tuple[str, str]]  # the short table on top
    train: Sequence[dict[str, Any]]  # rows of metrics.jsonl
    validation: Sequence[dict[str, Any]]
    bits: Sequence[Bar]  # bits per byte: model, model without memory, xz …
    bits_note: str
    gated: Sequence[GatedText] = ()
    gains: Sequence[Gain] = ()
    loads: dict[str, list[float]] = {}  # noqa: RUF012  (a default that is only read)
    acceptance: Sequence[float] = ()
    samples: Sequence[Sample] = ()


def render(report: Report) -> str:
    """The whole page."""
    sections = (
        _facts(report),
        _curve(report),
        _bits(report),
        _gates(report),
        _gain(report),
        _loads(report),
        _acceptance(report),
        _samples(report),
    )
    return _PAGE.format(title=html.escape(report.title), body="\n".join(part for part in sections if part))


def _facts(report: Report) -> str:
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in report.facts)
    return f'<h1>{html.escape(report.title)}</h1><table class="facts">{rows}</table>'


def _curve(report: Report) -> str:
    if not report.train:
        return ""
    series = [_bits_series("training", report.train)]
    if report.validation:
        series.append(_bits_series("validation", report.validation))
    chart = svg_lines(series, title="Loss", x_label="optimizer step", y_label="bits per byte")
    return f"<h2>Learning curve</h2>{chart}"


def _bits_series(name: str, rows: Sequence[dict[str, Any]]) -> Series:
    """A number that was not finite is null in metrics.jsonl, and a gap here."""
    return Series(f"{name}, bits per byte", [(row["step"], row["bits_per_byte"]) for row in rows if row["bits_per_byte"] is not None])


def _bits(report: Report) -> str:
    if not report.bits:
        return ""
    most = max(bar.value for bar in report.bits)
    bars = "".join(_bar(bar.label, bar.value / most, f"{bar.value:.3f}") for bar in report.bits)
    return f'<h2>Bits per byte of unseen files (less is better)</h2>{bars}<p class="note">{html.escape(report.bits_note)}</p>'


def _bar(label: str, share: float, figure: str) -> str:
    return f'<div class="bar"><span>{html.escape(label)}</span><i style="width:{100 * share:.1f}%"></i><b>{figure}</b></div>'


def _gates(report: Report) -> str:
    if not report.gated:
        return ""
    blocks = "".join(f"<h3>{html.escape(text.name)}</h3><pre>{_shaded(text)}</pre>" for text in report.gated)
    return (
        "<h2>Where memory speaks</h2>"
        '<p class="note">Unseen source text. The darker a token, the wider its memory gate stands open (mean over streams and layers, '
        "scaled from the lowest to the highest of the text; the numbers are in each token's tooltip).</p>" + blocks
    )


def _shaded(text: GatedText) -> str:
    low, high = min(text.gates), max(text.gates)
    spread = max(high - low, 1e-9)
    spans = []
    for piece, gate in zip(text.pieces, text.gates, strict=True):
        shade = 0.75 * (gate - low) / spread
        spans.append(f'<span style="background:rgba(var(--spoke),{shade:.2f})" title="gate {gate:.3f}">{html.escape(piece)}</span>')
    return "".join(spans)


def _gain(report: Report) -> str:
    if not report.gains:
        return ""
    series = [
        Series("forward (largest row sum)", [(gain.sites, gain.forward) for gain in report.gains]),
        Series("backward (largest column sum)", [(gain.sites, gain.backward) for gain in report.gains]),
    ]
    chart = svg_lines(series, title="Composite gain of the residual mixing", x_label="sites passed", y_label="gain")
    note = (
        "1 means that no stream is amplified over depth. "
        "The paper saw about 3000 for unconstrained HC and at most 1.6 for mHC (27B, 60 sites)."
    )
    return f'<h2>mHC: composite gain over depth</h2>{chart}<p class="note">{note}</p>'


def _loads(report: Report) -> str:
    if not report.loads:
        return ""
    parts = []
    for name, shares in report.loads.items():
        most = max(*shares, 1e-9)
        bars = "".join(
            f'<i style="height:{100 * share / most:.0f}%" title="expert {index}: {share:.2f}"></i>' for index, share in enumerate(shares)
        )
        parts.append(
            f'<p>{html.escape(name)}: busiest {most:.2f}, idlest {min(shares):.2f} times the mean</p><div class="loads">{bars}</div>'
        )
    note = "Validation text, one bar an expert; balanced by a bias, without an auxiliary loss in the gate."
    return f'<h2>Expert load per layer</h2>{"".join(parts)}<p class="note">{note}</p>'


def _acceptance(report: Report) -> str:
    if not report.acceptance:
        return ""
    bars = "".join(
        _bar(f"{depth} token{'s' if depth > 1 else ''} further on", share, f"{100 * share:.1f} %")
        for depth, share in enumerate(report.acceptance, 1)
    )
    note = "How often the greedy guess of the MTP head is what the model itself says one step later, along validation text."
    return f'<h2>Multi-token prediction: acceptance</h2>{bars}<p class="note">{note}</p>'


def _samples(report: Report) -> str:
    if not report.samples:
        return ""
    blocks = "".join(
        f'<pre><span class="given">{html.escape(sample.prompt)}</span>{html.escape(sample.text)}</pre>' for sample in report.samples
    )
    return f'<h2>Samples</h2><p class="note">Prompts in grey; temperature 0.7.</p>{blocks}'
