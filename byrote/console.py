"""What byrote says while it works: one live line, short tables, and metrics as JSON lines.

`Progress` rewrites one line on a terminal and prints a plain line now and then elsewhere (a CI log, a file), so that no
caller has to ask where its words go. It writes to stderr; results (`print_table`) go to stdout and can be piped.

`JsonLines` is the metrics file of a run: one JSON object a line, written in one piece and flushed. A process killed in the
middle of a write leaves at most one torn line, which the next opening cuts off; `truncate_after(step)` drops what a resumed
run is about to do again. Together they make the file of a resumed run equal to that of a run never interrupted.
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

PLAIN_INTERVAL_S = 5.0  # between plain lines where there is no terminal
LIVE_INTERVAL_S = 0.1  # between rewrites of the live line


def format_bytes(count: float) -> str:
    """1536 → '1.5 KB'; powers of 1024, as memory and files are counted."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"


def format_count(count: float) -> str:
    """1234567 → '1.23M'; powers of 1000, three digits, for parameters, tokens and FLOPs."""
    if abs(count) < 1000:
        return f"{count:.0f}" if float(count).is_integer() else f"{count:.3g}"
    for unit in ("K", "M", "B"):
        count /= 1000
        if abs(count) < 999.5:
            return f"{count:.{max(0, 2 - int(math.log10(abs(count))))}f}{unit}"
    return f"{count / 1000:.4g}T"


def format_duration(seconds: float) -> str:
    """75 → '1m15s'. Unknown (infinite or not a number) is '?'."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class Progress:
    """A status line that is rewritten in place, or printed every few seconds where there is no terminal.

    `update` says where the work stands and may be called as often as one likes; `note` leaves a line that stays; `close`
    leaves the last status standing. Used as a context manager it closes itself, on an error too.
    """

    def __init__(self, label: str = "", *, stream: TextIO | None = None) -> None:
        self._label = f"{label}: " if label else ""
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._interval_s = LIVE_INTERVAL_S if self._live else PLAIN_INTERVAL_S
        self._next_s = 0.0
        self._pending = ""  # the newest status, where it has not been written yet
        self._shown = ""  # the status standing on the terminal's last line

    def update(self, status: str) -> None:
        """Show `status` now, or remember it until the next time is due."""
        self._pending = status
        now = time.monotonic()
        if now >= self._next_s:
            self._next_s = now + self._interval_s
            self._flush()

    def note(self, line: str) -> None:
        """Leave `line` standing above the status."""
        self._erase()
        self._stream.write(line + "\n")
        self._stream.flush()
        if self._live:
            self._draw(self._shown)

    def close(self, last: str | None = None) -> None:
        """Leave `last` (or the newest status) as a line of its own. Closing twice does nothing more."""
        if last is not None:
            self._pending = last
        self._flush()
        if self._live and self._shown:
            self._stream.write("\n")
        self._shown = ""
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _flush(self) -> None:
        if not self._pending:
            return
        if self._live:
            self._erase()
            self._draw(self._pending)
        else:
            self._stream.write(f"{self._label}{self._pending}\n")
        self._shown, self._pending = self._pending, ""
        self._stream.flush()

    def _draw(self, status: str) -> None:
        if status:
            width = shutil.get_terminal_size().columns - 1  # the last column would wrap on some terminals
            self._stream.write((self._label + status)[:width])
            self._stream.flush()

    def _erase(self) -> None:
        if self._live and self._shown:
            self._stream.write("\r\x1b[K")


def print_table(rows: Iterable[Sequence[object]], header: Sequence[str] = (), *, stream: TextIO | None = None) -> None:
    """Print `rows` in aligned columns; a column of numbers, percentages or blanks is set flush right."""
    body = [[_cell(value) for value in row] for row in rows]
    lines = ([list(header)] if header else []) + body
    if not lines:
        return
    columns = range(len(lines[0]))
    widths = [max(len(line[column]) for line in lines) for column in columns]
    right = [bool(body) and all(_is_number(row[column]) for row in body) for column in columns]
    if header:
        lines.insert(1, ["─" * width for width in widths])
    out = sys.stdout if stream is None else stream
    for line in lines:
        cells = [text.rjust(width) if flush else text.ljust(width) for text, width, flush in zip(line, widths, right, strict=True)]
        out.write("  ".join(cells).rstrip() + "\n")


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text.strip().rstrip("%×x").strip() or "0")
    except ValueError:
        return False
    return True


class JsonLines:
    """Append rows to a file, one JSON object a line. A number that is not finite is written as null (JSON has no NaN)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drop rows whose 'step' is greater than `step`; rows without one stay. The file is replaced in one piece."""
        self._file.close()
        beside = self.path.with_name(self.path.name + ".new")
        kept = [row for row in read_json_lines(self.path) if row.get("step", step) <= step]
        beside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
        beside.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All whole rows of a file written by `JsonLines`; a torn last line (a run that is writing right now) is left out."""
    whole = Path(path).read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines() if line.strip()]


def _cut_torn_line(path: Path) -> None:
    if path.exists():
        whole = path.read_bytes().rfind(b"\n") + 1
        if whole < path.stat().st_size:
            os.truncate(path, whole)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
