"""The metrics of a run: rows of metrics.jsonl, and the same numbers for TensorBoard where `train.tensorboard` asks for them.

A row has a `kind` ("train", "validation", …), a `step`, and numbers or dictionaries of numbers. In TensorBoard a number is the
scalar kind/name, or kind/name/key. A resumed run drops the rows of the steps it is about to do again, in both places.
"""

from pathlib import Path
from typing import Any

from byrote.console import JsonLines, read_json_lines
from byrote.errors import ConfigError

FILE, BOARD = "metrics.jsonl", "tensorboard"


class Metrics:
    """Raises ConfigError at once where TensorBoard is asked for and not installed."""

    def __init__(self, run: Path, *, tensorboard: bool) -> None:
        self._lines = JsonLines(run / FILE)
        self._board_folder = run / BOARD
        self._make_writer: Any = _summary_writer() if tensorboard else None
        self._writer: Any = None

    def write(self, row: dict[str, Any]) -> None:
        self._lines.write(row)
        if self._make_writer is not None:
            self._show(row)

    def last(self, kind: str, step: int) -> dict[str, Any] | None:
        """The newest row of `kind` written after `step` steps."""
        rows = (row for row in reversed(read_json_lines(self._lines.path)) if row.get("kind") == kind and row.get("step") == step)
        return next(rows, None)

    def truncate_after(self, step: int) -> None:
        self._lines.truncate_after(step)

    def close(self) -> None:
        self._lines.close()
        if self._writer is not None:
            self._writer.close()

    def _show(self, row: dict[str, Any]) -> None:
        if self._writer is None:  # what an earlier sitting wrote for this step and later ones is purged
            self._writer = self._make_writer(log_dir=str(self._board_folder), purge_step=row["step"])
        for name, value in row.items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            for key, number in parts:
                if isinstance(number, int | float) and name != "step":
                    self._writer.add_scalar("/".join(filter(None, (row["kind"], name, key))), number, row["step"])
        self._writer.flush()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError('train.tensorboard needs the package tensorboard: pip install "byrote[tensorboard]"') from None
    return SummaryWriter
