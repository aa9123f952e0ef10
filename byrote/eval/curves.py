"""Line charts as inline SVG text: no dependency, one string, readable on a phone, in light and dark.

    points (x, y) ──scale──▶ pixels of the frame ──▶ <polyline>        ticks at 1·2·5 × 10ⁿ, labelled 20k, 1.5M, 0.001

Colours of text and grid follow `prefers-color-scheme`; a page that sets `--ink` and `--paper` decides itself. A curve longer
than the frame is wide is thinned to the lowest and highest point per pixel column, so no spike is lost. Points that cannot
be drawn (not finite, or not positive on a logarithmic axis) are counted in the legend.
"""

import html
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Point = tuple[float, float]

# eight colours that stay apart for colour-blind readers and on both backgrounds; further curves repeat them dashed
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8a6fd1", "#7f7f7f")
DASHES = ("none", "7 4", "2 3")

STYLE = """
.byrote-curves{--c-ink:var(--ink,#222);--c-paper:var(--paper,#fff);--c-grid:#8884;width:100%;height:auto;display:block;
background:var(--c-paper);font:14px system-ui,sans-serif}
.byrote-curves text{fill:var(--c-ink)}
.byrote-curves .grid{stroke:var(--c-grid)}
.byrote-curves .frame{fill:none;stroke:var(--c-ink)}
.byrote-curves .line{fill:none;stroke-width:2;stroke-linejoin:round}
.byrote-curves .title{font-weight:600}
@media(prefers-color-scheme:dark){.byrote-curves{--c-ink:var(--ink,#ddd);--c-paper:var(--paper,#16181d)}}
"""

LEFT, RIGHT, TOP, BOTTOM, LEGEND_ROW = 62, 16, 30, 44, 20  # pixels around the frame, and per legend entry


class Series(NamedTuple):
    """One curve."""

    name: str
    points: Sequence[Point]


class Axis(NamedTuple):
    """Maps values in [low, high] to pixels [start, end], linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def pixel(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def svg_lines(
    series: Iterable[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    width: int = 600,
    height: int = 360,
) -> str:
    """An `<svg>` element with all curves over common axes, their legend below. `height` is that of the chart without legend."""
    given = [Series(*one) for one in series]
    drawn = [Series(one.name, _drawable(one.points, log_x, log_y)) for one in given]
    points = [point for one in drawn for point in one.points]
    total = height + LEGEND_ROW * len(given) + 6
    parts = [
        f'<svg class="byrote-curves" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" role="img">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>",
        _text(LEFT, 19, title, "title"),
    ]
    if points:
        x_axis = Axis(*_limits([x for x, _ in points], log_x), LEFT, width - RIGHT, log_x)
        y_axis = Axis(*_limits([y for _, y in points], log_y), height - BOTTOM, TOP, log_y)
        parts += _grid(x_axis, y_axis)
        parts += [_line(one, number, x_axis, y_axis) for number, one in enumerate(drawn)]
    else:
        parts.append(_text((LEFT + width - RIGHT) / 2, height / 2, "no points to draw", anchor="middle"))
    parts += _labels(x_label, y_label, width, height)
    lost = [len(before.points) - len(after.points) for before, after in zip(given, drawn, strict=True)]
    parts += [_legend(one.name, number, lost[number], height) for number, one in enumerate(drawn)]
    return "\n".join([*parts, "</svg>"])


def short_number(value: float) -> str:
    """1500000 → 1.5M, 20000 → 20k, 0.001 → 0.001; at most four digits that matter."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def _drawable(points: Sequence[Point], log_x: bool, log_y: bool) -> list[Point]:
    def fits(value: float, log: bool) -> bool:
        return math.isfinite(value) and (value > 0 or not log)

    return [(x, y) for x, y in points if fits(x, log_x) and fits(y, log_y)]


def _limits(values: list[float], log: bool) -> tuple[float, float]:
    """Range of the axis: that of the values, opened when they are all the same."""
    low, high = min(values), max(values)
    if low < high:
        return low, high
    return (low / 2, high * 2) if log else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)


def _linear_ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    raw = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.999)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = math.log10(high / low)
    if decades < 0.7:  # too few powers of ten in between: round numbers read better
        return _linear_ticks(low, high)
    factors = (1, 2, 5) if decades < 3 else (1,)
    stride = max(1, round(decades / 8))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1, stride)
    return [factor * 10.0**power for power in powers for factor in factors if low * 0.999 <= factor * 10.0**power <= high * 1.001]


def _grid(x_axis: Axis, y_axis: Axis) -> list[str]:
    left, right, bottom, top = x_axis.start, x_axis.end, y_axis.start, y_axis.end
    parts = []
    for value in x_axis.ticks():
        at = x_axis.pixel(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(_text(at, bottom + 17, short_number(value), anchor="middle"))
    for value in y_axis.ticks():
        at = y_axis.pixel(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(left - 6, at + 5, short_number(value), anchor="end"))
    return [*parts, f'<rect class="frame" x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"/>']


def _line(series: Series, number: int, x_axis: Axis, y_axis: Axis) -> str:
    points = _thin([(x_axis.pixel(x), y_axis.pixel(y)) for x, y in series.points])
    if len(points) == 1:
        return f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="4" fill="{_colour(number)}"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="line" {_stroke(number)} points="{path}"/>'


def _thin(points: list[Point]) -> list[Point]:
    """At most the first, lowest, highest and last point of every pixel column, in their order."""
    kept = []
    for _, column in itertools.groupby(points, key=lambda point: math.floor(point[0])):
        run = list(column)
        by_height = sorted(range(len(run)), key=lambda index: run[index][1])
        kept += [run[index] for index in sorted({0, by_height[0], by_height[-1], len(run) - 1})]
    return kept


def _labels(x_label: str, y_label: str, width: int, height: int) -> list[str]:
    across, up = (LEFT + width - RIGHT) / 2, (TOP + height - BOTTOM) / 2
    return [
        _text(across, height - 8, x_label, anchor="middle"),
        f'<g transform="translate(16 {up}) rotate(-90)">{_text(0, 0, y_label, anchor="middle")}</g>',
    ]


def _legend(name: str, number: int, lost: int, height: int) -> str:
    at = height + LEGEND_ROW * number + 10
    label = f"{name} ({lost} points not shown)" if lost else name
    return f'<line class="line" {_stroke(number)} x1="{LEFT}" x2="{LEFT + 28}" y1="{at}" y2="{at}"/>{_text(LEFT + 36, at + 5, label)}'


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _stroke(number: int) -> str:
    return f'stroke="{_colour(number)}" stroke-dasharray="{DASHES[number // len(COLOURS) % len(DASHES)]}"'


def _text(x: float, y: float, content: str, style: str = "", anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(content)}</text>'
