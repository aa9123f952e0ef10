import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from byrote import console
from byrote.console import JsonLines, Progress, format_bytes, format_count, format_duration, print_table, read_json_lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """What a reader would see: carriage return plus erase empties the last line."""
        return [line.rpartition("\r\x1b[K")[2] for line in self.getvalue().split("\n")]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KB"), (5 * 1024**3, "5.0 GB"), (3 * 1024**4, "3.0 TB"), (-2048, "-2.0 KB")],
)
def test_bytes_are_counted_in_powers_of_1024(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (7, "7"),
        (0.5, "0.5"),
        (999, "999"),
        (1000, "1.00K"),
        (999_949, "1.00M"),
        (1_234_567, "1.23M"),
        (671e9, "671B"),
        (1.6e12, "1.6T"),
    ],
)
def test_counts_keep_three_digits(count: float, text: str) -> None:
    assert format_count(count) == text


def test_a_formatted_count_is_within_one_percent_of_the_number() -> None:
    scale = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    for exponent in range(60):
        number = 1.7**exponent
        digits, unit = re.fullmatch(r"([\d.]+)([KMBT]?)", format_count(number)).groups()
        assert float(digits) * scale[unit] == pytest.approx(number, rel=0.01)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.2s"), (59.4, "59s"), (59.6, "1m00s"), (75, "1m15s"), (3661, "1h01m"), (math.inf, "?"), (math.nan, "?")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_terminal_shows_one_line_that_is_rewritten(clock: list[float]) -> None:
    stream = Terminal()
    with Progress("train", stream=stream) as progress:
        for step in range(5):
            clock[0] += 1
            progress.update(f"step {step}")
            assert stream.screen() == [f"train: step {step}"]
    assert stream.screen() == ["train: step 4", ""]


def test_updates_faster_than_the_eye_are_skipped_and_the_last_one_is_kept(clock: list[float]) -> None:
    stream = Terminal()
    progress = Progress(stream=stream)
    for step in range(1000):
        progress.update(f"step {step}")
    assert stream.screen() == ["step 0"]
    progress.close()
    assert stream.screen() == ["step 999", ""]
    progress.close()
    assert stream.screen() == ["step 999", ""]


def test_a_long_status_never_wraps(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    Progress(stream=stream).update("x" * 50)
    assert len(stream.screen()[-1]) < 20


def test_a_note_stays_above_the_status(clock: list[float]) -> None:
    stream = Terminal()
    progress = Progress(stream=stream)
    progress.update("step 1")
    progress.note("saved")
    assert stream.screen() == ["saved", "step 1"]


def test_without_a_terminal_there_are_few_plain_lines(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        for step in range(120):
            progress.update(f"step {step}")
            clock[0] += 0.1
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 0"
    assert lines[-1] == "step 119"
    assert 3 <= len(lines) <= 5
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_the_last_status_stands_when_an_error_ends_the_work(clock: list[float]) -> None:
    stream = Terminal()

    def work() -> None:
        with Progress(stream=stream) as progress:
            progress.update("step 1")
            progress.update("step 2")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert stream.screen() == ["step 2", ""]


def test_tables_align_words_left_and_numbers_right() -> None:
    out = io.StringIO()
    print_table([("memory", 1.5, None), ("none", 12.25, "3 %")], ("name", "bits", "share"), stream=out)
    assert out.getvalue().splitlines() == ["name     bits  share", "──────  ─────  ─────", "memory    1.5", "none    12.25    3 %"]


def test_an_empty_table_prints_its_header_and_no_table_prints_nothing() -> None:
    out = io.StringIO()
    print_table([], stream=out)
    assert out.getvalue() == ""
    print_table([], ("name",), stream=out)
    assert out.getvalue().splitlines() == ["name", "────"]


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 2.5, "text": "γ\n\u2028"}, {"step": 2, "gates": [0.1, None], "deep": {"a": True}}]
    with JsonLines(tmp_path / "new" / "metrics.jsonl") as log:
        for row in rows:
            log.write(row)
            assert read_json_lines(log.path)[-1] == row, "a row can be read as soon as it is written"
    assert read_json_lines(log.path) == rows


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "m.jsonl") as log:
        log.write({"loss": math.nan, "terms": [math.inf, 1.0], "deep": {"x": -math.inf}})
    assert json.loads(log.path.read_text(), parse_constant=pytest.fail) == {"loss": None, "terms": [None, 1.0], "deep": {"x": None}}


def test_a_line_torn_at_any_byte_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with JsonLines(path) as log:
        log.write({"step": 1, "name": "é"})
        log.write({"step": 2, "name": "ü"})
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        kept = [row for row, end in (({"step": 1, "name": "é"}, first), ({"step": 2, "name": "ü"}, len(whole))) if length >= end]
        assert read_json_lines(path) == kept
        with JsonLines(path) as log:
            log.write({"step": 3})
        assert read_json_lines(path) == [*kept, {"step": 3}]


def test_a_resumed_file_equals_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    def write(path: Path, steps: range) -> None:
        with JsonLines(path) as log:
            log.truncate_after(steps.start - 1)
            for step in steps:
                log.write({"step": step, "loss": 1 / (step + 1)})

    for path in (tmp_path / "once", tmp_path / "twice"):
        with JsonLines(path) as log:
            log.write({"machine": "laptop"})
    write(tmp_path / "once", range(10))
    write(tmp_path / "twice", range(8))  # the last checkpoint was at step 4
    write(tmp_path / "twice", range(5, 10))
    assert (tmp_path / "once").read_bytes() == (tmp_path / "twice").read_bytes()
    assert read_json_lines(tmp_path / "once")[0] == {"machine": "laptop"}
    assert not list(tmp_path.glob("*.new"))


def test_the_console_imports_nothing_slow() -> None:
    code = "import sys, byrote.console; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
