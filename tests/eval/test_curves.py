"""The chart is well-formed, every curve stays inside its frame, and nothing is left out unsaid."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from byrote.eval.curves import BOTTOM, LEFT, RIGHT, TOP, Series, short_number, svg_lines

SVG = "{http://www.w3.org/2000/svg}"
WIDTH, HEIGHT = 600, 360


def chart(*series: Series, **options) -> ElementTree.Element:
    return ElementTree.fromstring(svg_lines(series, title="a <title> & more", x_label="tokens", y_label="bits per byte", **options))


def curves(svg: ElementTree.Element) -> list[list[tuple[float, float]]]:
    lines = [line.get("points") for line in svg.iter(f"{SVG}polyline")]
    return [[tuple(map(float, pair.split(","))) for pair in points.split()] for points in lines]


def texts(svg: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in svg.iter(f"{SVG}text")]


FALLING = [(float(n), 3.0 / n) for n in range(1, 258)]


@pytest.mark.parametrize("logs", [{}, {"log_x": True}, {"log_y": True}, {"log_x": True, "log_y": True}])
def test_every_point_lies_in_the_frame_and_order_is_kept(logs):
    (points,) = curves(chart(Series("one", FALLING), **logs))
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in points)
    assert points == sorted(points), "x grows to the right; a falling curve falls, and y grows downward"
    assert points[0] == (LEFT, TOP)
    assert points[-1] == (WIDTH - RIGHT, HEIGHT - BOTTOM)


def test_a_straight_line_stays_straight_and_a_power_is_straight_on_logarithmic_axes():
    for points, logs in (([(0, 1), (1, 2), (2, 3)], {}), ([(1, 1), (10, 100), (100, 10_000)], {"log_x": True, "log_y": True})):
        (drawn,) = curves(chart(Series("one", points), **logs))
        middle = tuple((a + b) / 2 for a, b in zip(drawn[0], drawn[2], strict=True))
        assert drawn[1] == pytest.approx(middle, abs=0.06)


def test_labels_title_and_legend_are_there_and_escaped():
    shown = texts(chart(Series("a < b", FALLING), Series("c", FALLING)))
    assert {"a <title> & more", "tokens", "bits per byte", "a < b", "c"} <= set(shown)


def test_long_curves_are_thinned_without_losing_a_spike():
    noisy = [(n / 7, math.sin(n)) for n in range(20_000)]
    noisy[9_999] = (9_999 / 7, 50.0)
    (points,) = curves(chart(Series("noisy", noisy)))
    assert len(points) <= 4 * WIDTH
    assert min(y for _, y in points) == TOP, "the spike reaches the top"


def test_points_that_cannot_be_drawn_are_counted():
    points = [(1.0, math.nan), (0.0, 2.0), (2.0, 2.0), (3.0, 1.0), (4.0, math.inf)]
    assert "odd (2 points not shown)" in texts(chart(Series("odd", points)))
    assert "odd (3 points not shown)" in texts(chart(Series("odd", points), log_x=True))


@pytest.mark.parametrize("points", [[], [(1.0, math.nan)]])
def test_nothing_to_draw_says_so(points):
    assert "no points to draw" in texts(chart(Series("empty", points)))


def test_no_series_at_all_is_a_chart_without_points():
    assert "no points to draw" in texts(chart())


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0])
def test_one_point_and_a_constant_curve_are_drawn(value):
    svg = chart(Series("point", [(value, value)]), Series("flat", [(value, value), (value + 1, value)]))
    assert len(list(svg.iter(f"{SVG}circle"))) == 1
    ((left, right),) = curves(svg)
    assert left[1] == right[1]


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [
        (0, 1, False),
        (1.234, 1.239, False),
        (-7, 1e6, False),
        (1e-3, 1e9, True),
        (1, 7, True),
        (3, 4, True),
        (0.9, 1100, True),
        (1, 1e40, True),
    ],
)
def test_ticks_are_some_round_and_inside(low, high, log):
    svg = chart(Series("one", [(low, 0.0), (high, 1.0)]), log_x=log)
    at = [float(line.get("x1")) for line in svg.iter(f"{SVG}line") if line.get("class") == "grid" and line.get("x1") == line.get("x2")]
    assert 2 <= len(at) <= 12
    assert at == sorted(set(at))
    assert all(LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1 for x in at)


def test_more_curves_than_colours_still_differ():
    svg = chart(*[Series(f"run {n}", [(0, n), (1, n)]) for n in range(17)])
    looks = [(line.get("stroke"), line.get("stroke-dasharray")) for line in svg.iter(f"{SVG}polyline")]
    assert len(set(looks)) == 17


def test_the_chart_needs_nothing_from_outside_and_follows_dark_and_light():
    text = svg_lines([Series("one", FALLING)], title="t", x_label="x", y_label="y")
    assert "prefers-color-scheme:dark" in text
    assert not re.search(r"href|url\(|@import|<script", text)


def test_numbers_are_short():
    assert [short_number(n) for n in (0, 0.001, 0.30000000000000004, 20_000, 1_500_000, 2e9, -1200)] == [
        "0", "0.001", "0.3", "20k", "1.5M", "2G", "-1.2k"
    ]  # fmt: skip
