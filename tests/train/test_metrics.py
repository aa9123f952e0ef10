"""Rows of metrics, and their way to TensorBoard."""

import sys
import types

import pytest

from byrote.errors import ConfigError
from byrote.train.metrics import Metrics
from byrote.train.session import train
from tests.train.tiny_runs import rows_of, tiny_run, write_corpus


class Board:
    """Stands in for torch.utils.tensorboard.SummaryWriter."""

    made: list["Board"]

    def __init__(self, log_dir: str, purge_step: int) -> None:
        self.log_dir, self.purge_step, self.scalars = log_dir, purge_step, []
        self.flushed = 0
        Board.made.append(self)

    def add_scalar(self, name: str, number: float, step: int) -> None:
        self.scalars.append((name, number, step))

    def flush(self) -> None:
        self.flushed = len(self.scalars)

    def close(self) -> None:
        self.flush()


@pytest.fixture
def board(monkeypatch):
    Board.made = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Board))
    return Board


def test_a_row_becomes_scalars_named_by_kind_and_key(board, tmp_path):
    metrics = Metrics(tmp_path, tensorboard=True)
    assert not board.made, "nothing is written before there is something to show"
    metrics.write({"kind": "train", "step": 20, "loss": 2.5, "grad_norm": None, "expert_load_max": {"blocks.1.ffn": 1.5}, "name": "x"})
    metrics.write({"kind": "validation", "step": 20, "bits_per_byte": 1.25})
    (writer,) = board.made
    assert writer.log_dir == str(tmp_path / "tensorboard") and writer.purge_step == 20
    assert writer.scalars == [
        ("train/loss", 2.5, 20),
        ("train/expert_load_max/blocks.1.ffn", 1.5, 20),
        ("validation/bits_per_byte", 1.25, 20),
    ]
    assert writer.flushed == 3
    metrics.close()


def test_a_run_shows_what_it_writes_down(board, tmp_path):
    train(tiny_run(write_corpus(tmp_path / "texts"), steps=4, tensorboard=True), tmp_path / "run")
    losses = [(step, number) for name, number, step in board.made[0].scalars if name == "train/loss"]
    assert losses == [(row["step"], row["loss"]) for row in rows_of(tmp_path / "run")]


def test_without_the_option_there_is_no_board(board, tmp_path):
    Metrics(tmp_path, tensorboard=False).write({"kind": "train", "step": 1, "loss": 1.0})
    assert not board.made and not (tmp_path / "tensorboard").exists()


def test_without_the_package_the_install_line_comes_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r'pip install "byrote\[tensorboard\]"'):
        train(tiny_run(write_corpus(tmp_path / "texts"), tensorboard=True), tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()


def test_the_newest_row_of_a_kind_and_step_is_found(tmp_path):
    metrics = Metrics(tmp_path, tensorboard=False)
    rows = [
        {"kind": "train", "step": 1, "loss": 3.0},
        {"kind": "validation", "step": 1, "bits": 1.0},
        {"kind": "train", "step": 2, "loss": 2.0},
    ]
    for row in rows:
        metrics.write(row)
    assert metrics.last("train", 1) == rows[0]
    assert metrics.last("validation", 1) == rows[1]
    assert metrics.last("validation", 2) is None
    metrics.truncate_after(1)
    assert metrics.last("train", 2) is None
