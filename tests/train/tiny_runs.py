"""A run small enough for tests: a folder of invented text, a model with every part in it, a few steps."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from byrote.data.config import DataConfig, SourceConfig
from byrote.model.config import MTPConfig
from byrote.train.run import OptimConfig, RunConfig, TrainConfig
from tests.model.tiny_models import ENGRAM, whole

CLOCK = ("seconds", "tokens_per_second")  # the only numbers of a run that may differ from sitting to sitting


def write_corpus(folder: Path, *, files: int = 9, seed: int = 0) -> Path:
    """Files of words drawn from a small vocabulary."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(40)]
    folder.mkdir()
    for number in range(files):
        lines = [" ".join(rng.choices(words, k=7)) for _ in range(rng.randint(3, 12))]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


def tiny_run(corpus: Path, *, optim: OptimConfig | None = None, accumulate: int = 1, **train: Any) -> RunConfig:
    model = whole(num_layers=2, engram=replace(ENGRAM, layers=(1,), table_std=0.02), mtp=MTPConfig(), init_std=0.02)
    return RunConfig(
        name="tiny",
        model=model,
        data=DataConfig(
            sources=(SourceConfig(path=str(corpus)),),
            vocab_size=300,
            sequence_length=17,
            batch_sequences=3,
            accumulate=accumulate,
            validation_bytes=200,
        ),
        optim=optim or OptimConfig(lr=0.01, adam_lr=0.01, warmup_fraction=0.1),
        train=TrainConfig(**({"steps": 8, "device": "cpu", "log_every": 2, "eval_context": 32, "eval_stride": 16} | train)),
    )


def rows_of(run: Path, *, clock: bool = False) -> list[dict[str, Any]]:
    """The metrics; without what only a clock knows."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return rows if clock else [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def files_of(checkpoint: Path) -> dict[str, Any]:
    """Name → content of all that a checkpoint holds, without the clock, how often it was saved, and the manifest's checksums of these."""
    contents: dict[str, Any] = {path.name: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    del contents["manifest.json"]
    trainer = json.loads(contents["trainer.json"])
    del trainer["loop"]["seconds"]
    for habit in ("save_every", "keep_checkpoints"):
        del trainer["loop"]["run"]["train"][habit]
    return contents | {"trainer.json": trainer}
