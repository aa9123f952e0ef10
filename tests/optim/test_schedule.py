"""Properties of the schedules, over runs of odd lengths."""

from dataclasses import dataclass
from itertools import pairwise

import pytest

from byrote.optim.schedule import lr_scale, mtp_weight, row_length


@dataclass(frozen=True)
class Settings:
    schedule: str = "wsd"
    warmup_fraction: float = 0.1
    decay_fraction: float = 0.3
    final_scale: float = 0.0
    step_points: tuple[float, ...] = (0.8, 0.9)
    step_scales: tuple[float, ...] = (0.316, 0.1)


@dataclass(frozen=True)
class Lengths:
    sequence_length: int
    length_start: int | None
    length_warmup_fraction: float


SCHEDULES = ("wsd", "cosine", "step")


def _curve(total: int, settings: Settings) -> list[float]:
    return [lr_scale(step, total, settings) for step in range(total)]


@pytest.mark.parametrize("total", [1, 7, 100, 257])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_learns_and_none_exceeds_the_peak(schedule, total):
    curve = _curve(total, Settings(schedule=schedule))
    assert all(0 < scale <= 1 for scale in curve)


@pytest.mark.parametrize("total", [7, 100, 257])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_rises_then_never_rises_again(schedule, total):
    curve = _curve(total, Settings(schedule=schedule))
    peak = curve.index(max(curve))
    assert curve[peak] == 1
    assert peak <= round(0.1 * total)
    assert curve[: peak + 1] == sorted(curve[: peak + 1])
    assert curve[peak:] == sorted(curve[peak:], reverse=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_is_a_straight_line_to_the_peak(schedule):
    assert _curve(100, Settings(schedule=schedule))[:10] == pytest.approx([0.1 * n for n in range(1, 11)])


def test_wsd_is_constant_then_a_straight_line():
    curve = _curve(100, Settings())
    assert curve[9:71] == [1.0] * 62
    falls = [before - after for before, after in pairwise(curve[70:])]
    assert falls == pytest.approx([1 / 30] * 29)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_the_final_scale_is_reached_after_the_last_step_and_kept(schedule, final):
    settings = Settings(schedule=schedule, final_scale=final)
    assert lr_scale(99, 100, settings) > final
    assert lr_scale(100, 100, settings) == pytest.approx(final) == lr_scale(10_000, 100, settings)


def test_cosine_is_halfway_at_half_time():
    assert lr_scale(55, 100, Settings(schedule="cosine", final_scale=0.2)) == pytest.approx(0.6)


def test_step_jumps_at_its_points():
    curve = _curve(100, Settings(schedule="step"))
    assert curve[10:] == [1.0] * 70 + [0.316] * 10 + [0.1] * 10


def test_without_warmup_and_decay_the_rate_is_constant():
    assert _curve(7, Settings(warmup_fraction=0.0, decay_fraction=0.0)) == [1.0] * 7


def test_overlapping_warmup_and_decay_take_the_smaller():
    curve = _curve(100, Settings(warmup_fraction=0.8, decay_fraction=0.8))
    assert curve == pytest.approx([min((n + 1) / 80, 1 - max(0, n - 20) / 80) for n in range(100)])


@pytest.mark.parametrize(("schedule", "corner"), [("wsd", 70), ("cosine", 67), ("step", 80)])
def test_the_mtp_weight_falls_when_the_rate_starts_to_decay(schedule, corner):
    settings = Settings(schedule=schedule)
    weights = [mtp_weight(step, 100, 0.3, 0.1, settings) for step in range(100)]
    assert weights == [0.3] * corner + [0.1] * (100 - corner)
    assert lr_scale(corner + 1, 100, settings) < 1
    assert schedule == "cosine" or lr_scale(corner - 1, 100, settings) == 1


def test_rows_double_in_equal_stages_and_then_stay_full():
    data = Lengths(512, 128, 0.3)
    assert [row_length(step, 100, data) for step in range(100)] == [128] * 15 + [256] * 15 + [512] * 70


@pytest.mark.parametrize("total", [1, 2, 7, 100, 257])
@pytest.mark.parametrize("start", [8, 64, 512, None])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_row_lengths_never_fall_and_divide_the_full_one(total, start, fraction):
    found = [row_length(step, total, Lengths(512, start, fraction)) for step in range(total)]
    assert found == sorted(found)
    assert all(512 % length == 0 and length >= (start or 512) for length in found)
    assert row_length(total, total, Lengths(512, start, fraction)) == 512
