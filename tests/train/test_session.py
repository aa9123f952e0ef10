"""A run from configuration to folder: resumed is never interrupted, and no failure loses what was there."""

import errno
import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from byrote.checkpoint import local
from byrote.checkpoint.runs import latest, step_folder
from byrote.data.config import SourceConfig
from byrote.errors import CapacityError, CheckpointError, ConfigError, DataError, TrainingError
from byrote.train import session
from byrote.train.loop import Trainer
from byrote.train.metrics import Metrics
from byrote.train.run import OptimConfig, TrainConfig
from byrote.train.session import Run, train
from tests.train.tiny_runs import files_of, rows_of, tiny_run, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Path:
    """Eight steps, never interrupted."""
    out = tmp_path_factory.mktemp("finished")
    train(tiny_run(corpus), out)
    return out


def interrupt_after(step: int):
    """A hook that presses Ctrl-C during a step."""
    return lambda done, run: signal.raise_signal(signal.SIGINT) if done == step else None


def assert_same_run(got: Path, want: Path) -> None:
    """Weights, rows, optimizer state, place in the data, metrics."""
    assert latest(got).name == latest(want).name
    ours, theirs = files_of(latest(got)), files_of(latest(want))
    assert ours.keys() == theirs.keys()
    for name, content in theirs.items():
        assert ours[name] == content, f"{name} differs"
    assert rows_of(got) == rows_of(want)


# --- stopped and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [(1,), (4,), (2, 3, 7)])
def test_stopped_and_resumed_is_never_stopped(corpus, finished, tmp_path, stops):
    for stop in stops:
        run, summary = train(tiny_run(corpus), tmp_path, resume=True, hooks=[interrupt_after(stop)])
        assert summary.interrupted and (run.done, summary.steps) == (stop, stop)
        assert latest(tmp_path) == step_folder(tmp_path, stop)
    _, summary = train(tiny_run(corpus), tmp_path, resume=True)
    assert not summary.interrupted and summary.steps == 8
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize(
    "options", [{"accumulate": 2}, {"optim": OptimConfig(matrix="adamw", table_rule="adam", schedule="cosine")}, {"precision": "fp32"}]
)
def test_it_holds_for_other_optimizers_micro_batches_and_precisions(corpus, tmp_path, options):
    config = tiny_run(corpus, steps=5, **options)
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", hooks=[interrupt_after(2)])
    train(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_run_says_the_same_twice(corpus, finished, tmp_path):
    train(tiny_run(corpus), tmp_path)
    assert_same_run(tmp_path, finished)


def test_another_seed_is_another_run(corpus, finished, tmp_path):
    train(tiny_run(corpus, seed=1), tmp_path)
    assert files_of(latest(tmp_path))["model.safetensors"] != files_of(latest(finished))["model.safetensors"]


def test_a_finished_run_that_is_resumed_stays_as_it_is(corpus, finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    run, summary = train(tiny_run(corpus), finished, resume=True, hooks=[lambda done, run: pytest.fail("a step was done")])
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    saved = json.loads((finished / "run.json").read_text())["summary"]
    assert (summary.steps, summary.loss, summary.interrupted) == (8, saved["loss"], False)
    assert math.isfinite(summary.loss) and run.model.embed.weight.isfinite().all()


def test_old_checkpoints_go_and_the_newest_stay(corpus, tmp_path):
    train(tiny_run(corpus, steps=7, save_every=2, keep_checkpoints=2), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000006", "step-00000007"]


def test_signals_are_given_back(corpus, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(tiny_run(corpus, steps=2), tmp_path, hooks=[interrupt_after(1)])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_interrupt_does_not_wait(corpus, tmp_path):
    def twice(done: int, run: Run) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny_run(corpus), tmp_path, hooks=[twice])


# --- metrics and facts ------------------------------------------------------------------------------------------------


def test_metrics_are_plain_json_numbers_and_each_step_is_there_once(corpus, tmp_path, monkeypatch):
    rows, write = [], Metrics.write
    monkeypatch.setattr(Metrics, "write", lambda self, row: (rows.append(row), write(self, row))[1])
    train(tiny_run(corpus, steps=7), tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 4, 6, 7]

    def check(value: object) -> None:
        assert type(value) in (int, float, str, dict), f"{value!r} is of {type(value)}"
        for part in value.values() if isinstance(value, dict) else ():
            check(part)

    check(dict(enumerate(rows)))
    first = rows[0]
    assert first.keys() >= {"loss", "mtp", "balance", "grad_norm", "lr", "rows_touched", "bits_per_byte", "tokens_per_second"}
    assert first["loss"] == pytest.approx(math.log(300), abs=0.3), "an untrained model knows nothing"
    assert first["tokens"] == 3 * 17
    assert sorted(first["expert_load_max"]) == ["blocks.1.ffn", "mtp.0.block.ffn"]
    assert all(load >= 1 for load in first["expert_load_max"].values())


@pytest.mark.parametrize(("every", "steps"), [(0, [1, 5]), (1, [1, 2, 3, 4, 5]), (3, [1, 3, 5])])
def test_rows_come_as_often_as_asked(corpus, tmp_path, every, steps):
    train(tiny_run(corpus, steps=5, log_every=every), tmp_path)
    assert [row["step"] for row in rows_of(tmp_path)] == steps


def test_the_loss_falls_and_the_summary_says_so(corpus, tmp_path):
    _, summary = train(tiny_run(corpus, steps=25), tmp_path)
    losses = [row["loss"] for row in rows_of(tmp_path)]
    assert losses[-1] < losses[0] - 0.5
    assert summary.loss == losses[-1] and summary.tokens == rows_of(tmp_path)[-1]["tokens"]
    assert summary.parameters > 0 < summary.memory_parameters


def test_run_json_says_what_was_trained_on_what(finished):
    facts = json.loads((finished / "run.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert facts["total_steps"] == 8 and facts["torch"] == torch.__version__ and facts["device"] == "cpu"
    assert facts["config"]["model"]["vocab_size"] == facts["facts"]["tokenizer"]["vocab_size"] <= 300
    assert facts["summary"]["steps"] == 8


def test_a_run_stopped_before_its_first_step_writes_no_nan(corpus, tmp_path, monkeypatch):
    go = Run.go
    monkeypatch.setattr(Run, "go", lambda self, hooks, stop: (stop.set(), go(self, hooks, stop))[1])
    _, summary = train(tiny_run(corpus), tmp_path)
    assert summary.interrupted and math.isnan(summary.loss)
    assert json.loads((tmp_path / "run.json").read_text())["summary"]["loss"] is None


# --- the number of steps ----------------------------------------------------------------------------------------------


@pytest.fixture
def quick_clock(monkeypatch):
    monkeypatch.setattr(session, "_MEASURE_AT_LEAST_S", 0.0)
    monkeypatch.setattr(session, "_MEASURE_SHARE", 0.0)


def test_steps_are_fixed_once_and_never_again_from_a_clock(corpus, tmp_path, quick_clock):
    config = tiny_run(corpus, steps=None, seconds=1.5)
    run, _ = train(config, tmp_path, hooks=[interrupt_after(1)])
    total = json.loads((tmp_path / "run.json").read_text())["total_steps"]
    assert run.total_steps == total > 1
    longer = replace(config, train=replace(config.train, seconds=9999.0))
    resumed, _ = train(longer, tmp_path, resume=True, hooks=[interrupt_after(2)])
    assert resumed.total_steps == total


def test_measuring_leaves_no_trace(corpus, finished, tmp_path, quick_clock, monkeypatch):
    measured = []
    monkeypatch.setattr(
        Run, "_measure_pace", lambda self, budget_s, plain=Run._measure_pace: (measured.append(plain(self, budget_s)), (1.0, 0.0))[1]
    )
    _, summary = train(tiny_run(corpus, steps=None, seconds=8 / session._PACE_MARGIN + 0.1), tmp_path)
    assert summary.steps == 8 and measured[0][0] > 0
    assert files_of(latest(tmp_path))["model.safetensors"] == files_of(latest(finished))["model.safetensors"]
    assert rows_of(tmp_path) == rows_of(finished)


def test_without_steps_and_seconds_there_is_no_run(corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.steps or train\.seconds"):
        train(tiny_run(corpus, steps=None), tmp_path)


# --- numbers that are not finite --------------------------------------------------------------------------------------


def spoil(run: Run) -> None:
    run.model.embed.weight.data[:] = torch.nan


def test_a_nan_stops_the_run_saves_its_state_and_keeps_the_earlier_one(corpus, finished, tmp_path):
    config = tiny_run(corpus, save_every=2, keep_checkpoints=1)
    with pytest.raises(TrainingError, match=r"step 5: the parameter embed\.weight.*step-00000005; delete it to resume from an earlier one"):
        train(config, tmp_path, hooks=[lambda done, run: spoil(run) if done == 5 else None])
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000005"]
    shutil.rmtree(step_folder(tmp_path, 5))
    train(config, tmp_path, resume=True)
    assert_same_run(tmp_path, finished)


def test_a_step_that_failed_is_tried_again_with_the_same_data(corpus, finished, tmp_path, monkeypatch):
    step = Trainer.step

    def fails_once(self, index, batches, pending):
        if index == 5:
            monkeypatch.setattr(Trainer, "step", step)
            raise TrainingError("step 5: a cosmic ray")
        return step(self, index, batches, pending)

    monkeypatch.setattr(Trainer, "step", fails_once)
    with pytest.raises(TrainingError, match="cosmic ray"):
        train(tiny_run(corpus), tmp_path)
    train(tiny_run(corpus), tmp_path, resume=True)
    assert_same_run(tmp_path, finished)


def test_a_failure_right_after_a_checkpoint_leaves_it_alone(corpus, tmp_path, monkeypatch):
    config, step = tiny_run(corpus, save_every=3), Trainer.step

    def fails(self, index, batches, pending):
        if index == 3:
            self.model.embed.weight.data[:] = 7.0
            raise TrainingError("step 3")
        return step(self, index, batches, pending)

    monkeypatch.setattr(Trainer, "step", fails)
    with pytest.raises(TrainingError):
        train(config, tmp_path)
    monkeypatch.setattr(Trainer, "step", step)
    run, _ = train(config, tmp_path, resume=True)
    assert run.done == 8 and not (run.model.embed.weight == 7.0).any()


# --- disks, folders, configurations -----------------------------------------------------------------------------------


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_with_metrics_says_so_and_loses_nothing(corpus, finished, tmp_path, monkeypatch):
    config = tiny_run(corpus, save_every=2)

    def fill(done: int, run: Run) -> None:
        if done == 5:
            monkeypatch.setattr(Metrics, "write", full_disk)

    with pytest.raises(CapacityError, match="Free some space and resume"):
        train(config, tmp_path, hooks=[fill])
    monkeypatch.undo()
    train(config, tmp_path, resume=True)
    assert_same_run(tmp_path, finished)


def test_a_disk_too_full_for_a_checkpoint_keeps_the_one_before(corpus, finished, tmp_path, monkeypatch):
    config = tiny_run(corpus, save_every=2)

    def fill(done: int, run: Run) -> None:
        if done == 4:
            monkeypatch.setattr(local, "write_new", full_disk)

    with pytest.raises(CapacityError, match=r"step-00000002 is intact"):
        train(config, tmp_path, hooks=[fill])
    monkeypatch.undo()
    train(config, tmp_path, resume=True)
    assert_same_run(tmp_path, finished)


def test_a_source_that_is_missing_is_named_before_anything_is_made(corpus, tmp_path):
    config = tiny_run(corpus)
    lost = replace(config, data=replace(config.data, sources=(SourceConfig(path=str(tmp_path / "nowhere")),)))
    with pytest.raises(DataError, match="nowhere"):
        train(lost, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    train(config, tmp_path / "run", hooks=[interrupt_after(1)])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: replace(c, optim=replace(c.optim, lr=0.5)), r"optim\.lr was 0\.01, now 0\.5"),
        (lambda c: replace(c, train=replace(c.train, steps=9)), r"train\.steps was 8, now 9"),
        (lambda c: replace(c, model=replace(c.model, dim=32)), r"model\.dim was 16, now 32"),
        (lambda c: replace(c, model=replace(c.model, engram=None)), r"model\.engram was \{.*now None"),
        (lambda c: replace(c, data=replace(c.data, seed=3)), r"data\.seed was 0, now 3"),
    ],
)
def test_another_configuration_is_refused_and_the_first_difference_named(corpus, finished, change, named):
    with pytest.raises(ConfigError, match=named):
        train(change(tiny_run(corpus)), finished, resume=True)


def test_what_may_change_between_sittings_does_not_stop_a_run(corpus, tmp_path):
    train(tiny_run(corpus), tmp_path, hooks=[interrupt_after(3)])
    run, _ = train(tiny_run(corpus, seconds=5.0, save_every=3, keep_checkpoints=5, eval_every=2, log_every=1), tmp_path, resume=True)
    assert run.done == 8


@pytest.mark.parametrize(("content", "message"), [("{", "damaged"), ("{}", "lacks config, total_steps")])
def test_a_damaged_run_json_says_what_to_do(corpus, tmp_path, content, message):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"{message}.*another folder"):
        train(tiny_run(corpus), tmp_path, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_checkpoints_of_another_run_are_never_mixed_with_a_new_one(corpus, finished, tmp_path, resume):
    shutil.copytree(latest(finished), step_folder(tmp_path, 8))
    with pytest.raises(ConfigError, match="checkpoints of another run, up to step-00000008"):
        train(tiny_run(corpus), tmp_path, resume=resume)


def test_a_run_killed_before_its_first_checkpoint_starts_over(corpus, finished, tmp_path):
    def die(done: int, run: Run) -> None:
        if done == 3:
            raise MemoryError

    with pytest.raises(MemoryError):
        train(tiny_run(corpus), tmp_path, hooks=[die])
    assert latest(tmp_path) is None and len(rows_of(tmp_path)) == 2
    train(tiny_run(corpus), tmp_path, resume=True)
    assert_same_run(tmp_path, finished)


def test_more_memory_than_there_is_is_refused_before_reading(corpus, tmp_path, monkeypatch):
    config = tiny_run(corpus)
    huge = replace(config.model, engram=replace(config.model.engram, rows_per_order=10**11))
    with pytest.raises(CapacityError, match="memory table needs"):
        train(replace(config, model=huge), tmp_path)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"seconds": 0.0}, "positive number"),
        ({"seconds": math.nan}, "positive number"),
        ({"save_every": -1}, "not be negative"),
        ({"keep_checkpoints": 0}, "newest one stays"),
        ({"eval_stride": 2048}, r"1\.\.1024"),
        ({"precision": "fp16"}, "bf16, fp32"),
    ],
)
def test_impossible_training_is_refused_before_it_begins(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes)


def test_step_points_and_scales_go_in_pairs():
    with pytest.raises(ConfigError, match="go in pairs"):
        OptimConfig(step_points=(0.5,))
