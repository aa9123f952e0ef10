"""Processes that end at the worst moment; what they leave goes on as if nothing had happened."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from byrote.checkpoint.runs import latest
from byrote.config import format_value
from byrote.train.session import train
from tests.train.tiny_runs import files_of, rows_of, tiny_run, write_corpus

ROOT = Path(__file__).parents[2]
DIES = """
import os, signal, sys
from pathlib import Path
from byrote.train.session import train
from tests.train.tiny_runs import tiny_run
corpus, out, at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
hook = lambda done, run: os.kill(os.getpid(), signal.SIGKILL) if done == at else None
train(tiny_run(corpus, save_every=3, log_every=1), out, resume=True, hooks=[hook])
"""


def dies_at(step: int, corpus: Path, out: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", DIES, str(corpus), str(out), str(step)], cwd=ROOT, capture_output=True, timeout=120, check=False
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()


def test_killed_between_checkpoints_and_resumed_is_never_killed(tmp_path):
    corpus = write_corpus(tmp_path / "texts")
    config = tiny_run(corpus, save_every=3, log_every=1)
    train(config, tmp_path / "whole")
    dies_at(5, corpus, tmp_path / "killed")
    assert latest(tmp_path / "killed").name == "step-00000003"
    assert [row["step"] for row in rows_of(tmp_path / "killed")] == [1, 2, 3, 4, 5]
    dies_at(6, corpus, tmp_path / "killed")  # in a resumed run, before its next checkpoint is written
    assert latest(tmp_path / "killed").name == "step-00000003"
    train(config, tmp_path / "killed", resume=True)
    assert files_of(latest(tmp_path / "killed")) == files_of(latest(tmp_path / "whole"))
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")


def options() -> list[str]:
    """A small model for the command line."""
    values = {
        "model.dim": 16, "model.num_layers": 2, "model.ffn_hidden": 24, "model.engram.layers": (1,), "model.engram.rows_per_order": 53,
        "model.attention.num_heads": 2, "data.vocab_size": 300, "data.sequence_length": 16, "data.batch_sequences": 2,
        "data.validation_bytes": 200, "train.steps": 100_000, "train.log_every": 1,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", format_value(value))]


def test_ctrl_c_saves_says_how_to_go_on_and_exits_with_130(tmp_path):
    corpus, out = write_corpus(tmp_path / "texts"), tmp_path / "run"
    command = [sys.executable, "-m", "byrote", "train", "tiny_cpu", *options(), "--data.sources", str(corpus), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until, metrics = time.monotonic() + 100, out / "metrics.jsonl"
        while process.poll() is None and time.monotonic() < until and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "stopped after step" in said and "--resume" in said
    assert latest(out) is not None and latest(out).name == f"step-{rows_of(out)[-1]['step']:08d}"
