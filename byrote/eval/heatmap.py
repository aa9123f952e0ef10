"""Heat maps of needle tests, depth down and length across: one self-contained page, and a picture where matplotlib is installed."""

import html
import io
from collections.abc import Mapping, Sequence

from byrote.errors import ConfigError
from byrote.eval.needle import Cell, Score

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title>
<style>
:root{{--ink:#222;--paper:#fff;--soft:#667}}
@media(prefers-color-scheme:dark){{:root{{--ink:#ddd;--paper:#16181d;--soft:#99a}}}}
body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:1rem auto;padding:0 1rem;color:var(--ink);background:var(--paper)}}
h1{{font-size:1.4rem}} h2{{font-size:1.1rem;margin-top:1.6rem}} p{{color:var(--soft);font-size:.9rem}}
.wide{{overflow-x:auto}} table{{border-collapse:separate;border-spacing:2px}}
th{{font-weight:500;padding:.2rem .6rem;text-align:right}} td{{padding:.3rem .6rem;text-align:center;border-radius:.25rem;color:#111}}
td small{{display:block;font-size:.7rem;opacity:.75}}
</style></head><body><h1>{title}</h1>{notes}
{maps}
</body></html>
"""


def page(title: str, notes: Sequence[str], scores: Mapping[Cell, Score]) -> str:
    """The whole page as text."""
    maps = "".join(f'<h2>{html.escape(kind)}</h2><div class="wide">{_table(kind, scores)}</div>' for kind in kinds_of(scores))
    return _PAGE.format(title=html.escape(title), notes="".join(f"<p>{html.escape(note)}</p>" for note in notes), maps=maps)


def kinds_of(scores: Mapping[Cell, Score]) -> list[str]:
    return list(dict.fromkeys(cell.kind for cell in scores))


def axes(scores: Mapping[Cell, Score]) -> tuple[list[int], list[float]]:
    """(lengths, depths), ascending."""
    return sorted({cell.length for cell in scores}), sorted({cell.depth for cell in scores})


def _table(kind: str, scores: Mapping[Cell, Score]) -> str:
    lengths, depths = axes(scores)
    head = "<tr><th>depth</th>" + "".join(f"<th>{length:,}</th>" for length in lengths) + "</tr>"
    rows = "".join(
        f"<tr><th>{100 * depth:.0f} %</th>" + "".join(_cell(scores.get(Cell(kind, length, depth))) for length in lengths) + "</tr>"
        for depth in depths
    )
    return f"<table>{head}{rows}</table>"


def _cell(score: Score | None) -> str:
    if score is None:
        return "<td></td>"
    low, high = score.interval
    title = f"{score.hits} of {score.samples}"
    figure = f"{100 * score.share:.0f} %<small>{100 * low:.0f}–{100 * high:.0f}</small>"
    return f'<td style="background:hsl({120 * score.share:.0f} 55% 68%)" title="{title}">{figure}</td>'


def picture(title: str, scores: Mapping[Cell, Score]) -> bytes:
    """The same as PNG. ConfigError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('the picture needs matplotlib: pip install "byrote[plots]"') from None
    kinds, (lengths, depths) = kinds_of(scores), axes(scores)
    figure = Figure(figsize=(1.5 + 1.1 * len(lengths), 0.8 + (1.0 + 0.42 * len(depths)) * len(kinds)), layout="constrained")
    figure.suptitle(title)
    for axis, kind in zip(figure.subplots(len(kinds), squeeze=False)[:, 0], kinds, strict=True):
        shares = [[_share(scores.get(Cell(kind, length, depth))) for length in lengths] for depth in depths]
        axis.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_title(kind, loc="left")
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        for row, values in enumerate(shares):
            for column, share in enumerate(values):
                axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _share(score: Score | None) -> float:
    return float("nan") if score is None else score.share
