"""`kill -9` at any moment leaves a checkpoint that loads, and is one of those that were saved.

This file is also the program that is killed: it imports torch once, and forks a saver whenever it is told to. A saver writes one
number into every weight and row, so that a mixture of two checkpoints would show.
"""

import itertools
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from byrote.checkpoint.atomic import ASIDE, TEMPORARY
from byrote.checkpoint.local import TrainingState, load, load_training, save
from byrote.checkpoint.runs import prune, step_folder
from byrote.model.config import EngramConfig, MLAConfig, ModelConfig, ResidualConfig
from byrote.model.transformer import Model
from tests.killing import Program, kill_at_call, program_of, serve

ROOT = Path(__file__).parents[2]
CALLS = ("fsync", "rename", "mkdir", "rmdir", "unlink")  # and so before and after each file was written
CONFIG = ModelConfig(
    vocab_size=7,
    dim=4,
    num_layers=1,
    ffn_hidden=4,
    max_positions=16,
    attention=MLAConfig(num_heads=1, kv_lora_rank=2, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=2),
    residual=ResidualConfig(kind="plain"),
    moe=None,
    engram=EngramConfig(layers=(0,), rows_per_order=11, head_dim=2, num_heads=1, max_order=2),
    mtp=None,
)


def numbered(number: int) -> tuple[Model, TrainingState]:
    """A model and a training state that say `number` everywhere."""
    model = Model(CONFIG)
    for param in model.parameters():
        param.data.fill_(number)
    model.memory.store.vectors_NE.fill_(number)
    model.memory.store.state_NS.fill_(number)
    return model, TrainingState(step=number, optimizer={"m": torch.full((3,), number)}, optimizer_meta={}, loop={"number": number})


def save_step(folder: Path, number: int) -> None:
    """A step of a run, and a model that is saved to the same place again and again."""
    model, training = numbered(number)
    save(model, step_folder(folder / "run", number), training=training)
    prune(folder / "run", 2)
    save(model, folder / "model", training=training)


def found(path: Path) -> int:
    """The number that everything in the checkpoint says."""
    model = Model(CONFIG, seed=1)
    training = load_training(path, model)
    store = model.memory.store
    tensors = [*model.parameters(), store.vectors_NE, store.state_NS, *training.optimizer.values()]
    numbers = {value for tensor in tensors for value in tensor.unique().tolist()} | {training.step, training.loop["number"]}
    assert len(numbers) == 1, f"{path} is a mixture of {numbers}"
    assert all(bool((param == training.step).all()) for param in load(path).model.parameters())
    return training.step


# --- the program that is killed ---------------------------------------------------------------------------------------


def saver(folder: Path, first: int, last_call: int = 0) -> None:
    """Saves step after step; with `last_call`, one model only, up to that call."""
    if last_call:
        model, training = numbered(first)
        kill_at_call(last_call, CALLS)
        save(model, folder / "model", training=training)
    else:
        for number in itertools.count(first):
            save_step(folder, number)


if __name__ == "__main__":
    serve(saver)


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    with program_of(__file__) as running:
        yield running


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith((TEMPORARY, ASIDE))]


def test_killed_at_a_random_moment_a_checkpoint_loads(program: Program, tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    moments, of_run, of_model = random.Random(0), 1, 1
    for _ in range(20):
        run_before, model_before = of_run, of_model
        pid = program.start(tmp_path, of_run + 1)
        time.sleep(moments.uniform(0.0, 0.15))
        os.kill(pid, signal.SIGKILL)
        assert program.signal() == signal.SIGKILL
        of_run, of_model = found(tmp_path / "run"), found(tmp_path / "model")
        assert run_before <= of_run and model_before <= of_model <= of_run
    save_step(tmp_path, of_run + 1)
    assert not leftovers(tmp_path)


def test_killed_at_every_call_a_checkpoint_loads(program: Program, tmp_path: Path) -> None:
    model, training = numbered(1)
    save(model, tmp_path / "model", training=training)
    killed = 0
    program.start(tmp_path, 2, killed + 1)
    while program.signal() == signal.SIGKILL:
        killed += 1
        assert found(tmp_path / "model") in (killed, killed + 1)
        if found(tmp_path / "model") == killed:  # killed too early to be replaced
            model, training = numbered(killed + 1)
            save(model, tmp_path / "model", training=training)
        program.start(tmp_path, killed + 2, killed + 1)
    assert killed > 20
    assert found(tmp_path / "model") == killed + 2 and not leftovers(tmp_path)
