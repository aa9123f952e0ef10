"""Rows that grow with the steps, runs that start from the weights of others, and runs on synthetic recall."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import byrote
from byrote.checkpoint.runs import latest, step_folder
from byrote.data.config import RecallConfig, SourceConfig
from byrote.errors import CheckpointError, ConfigError
from byrote.recipes.extend import extended
from byrote.train.loop import Trainer
from byrote.train.session import train
from tests.train.tiny_runs import files_of, tiny_run, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    train(tiny_run(corpus, steps=3), out)
    return out


def growing(corpus: Path, steps: int = 8):
    config = tiny_run(corpus, steps=steps)
    return replace(config, data=replace(config.data, sequence_length=32, length_start=8, length_warmup_fraction=0.5))


@pytest.fixture
def shapes(monkeypatch) -> list[tuple[int, ...]]:
    """Of the batches of every step."""
    seen: list[tuple[int, ...]] = []
    step = Trainer.step

    def watched(self, index, batches, *others):
        seen.extend(tuple(batch.tokens_BT.shape) for batch in batches)
        return step(self, index, batches, *others)

    monkeypatch.setattr(Trainer, "step", watched)
    return seen


def stop_after(step: int):
    return lambda done, run: signal.raise_signal(signal.SIGINT) if done == step else None


@pytest.mark.parametrize("stops", [(1,), (2, 5)])
def test_rows_grow_by_the_step_and_a_resumed_run_is_bitwise_the_whole_one(corpus, tmp_path, shapes, stops):
    config = growing(corpus)
    train(config, tmp_path / "whole")
    assert shapes == [(12, 8)] * 2 + [(6, 16)] * 2 + [(3, 32)] * 4
    shapes.clear()
    for stop in stops:
        train(config, tmp_path / "parts", resume=True, hooks=[stop_after(stop)])
    train(config, tmp_path / "parts", resume=True)
    assert shapes == [(12, 8)] * 2 + [(6, 16)] * 2 + [(3, 32)] * 4
    assert files_of(latest(tmp_path / "parts")) == files_of(latest(tmp_path / "whole"))


def test_the_pace_is_measured_at_full_length(corpus, tmp_path, shapes):
    config = growing(corpus)
    train(replace(config, train=replace(config.train, steps=None, seconds=1.0)), tmp_path, hooks=[stop_after(1)])
    assert set(shapes[:6]) == {(3, 32)}


def test_a_length_that_does_not_double_to_the_full_one_is_refused(corpus):
    data = growing(corpus).data
    for start, full in ((12, 32), (64, 32), (0, 32), (8, 24)):
        with pytest.raises(ConfigError, match=rf"data.length_start is {start}; sequence_length {full} must be that times a power of two"):
            replace(data, length_start=start, sequence_length=full)
    with pytest.raises(ConfigError, match=r"data\.length_warmup_fraction is 2"):
        replace(data, length_warmup_fraction=2.0)
    with pytest.raises(ConfigError, match=r"data\.packing is 'tight'; allowed: cut, whole"):
        replace(data, packing="tight")


# --- starting from another run ----------------------------------------------------------------------------------------


def test_a_run_starts_with_the_weights_and_rows_of_another(corpus, trained, tmp_path):
    config, first = tiny_run(corpus, steps=1, start_from=str(trained), seed=5), []
    run, _ = train(config, tmp_path, hooks=[lambda done, run: first.append(run.last.losses["next_token"].item())])
    batch, other = run.prepared.train_loader().next_batch(), byrote.load(trained).model.train()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        loss = other(batch.tokens_BT, targets_BT=batch.targets_BT, document_BT=batch.document_BT).losses["next_token"]
    assert first == [loss.item()]


def test_a_resumed_run_does_not_need_the_run_it_started_from(corpus, trained, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(trained, start)
    config = tiny_run(corpus, steps=4, start_from=str(start))
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", hooks=[stop_after(2)])
    shutil.rmtree(start)
    train(config, tmp_path / "parts", resume=True)
    assert files_of(latest(tmp_path / "parts")) == files_of(latest(tmp_path / "whole"))


def test_weights_of_other_shapes_are_refused_by_name(corpus, trained, tmp_path):
    config = tiny_run(corpus, steps=2, start_from=str(trained))
    with pytest.raises(CheckpointError, match=r"ffn|shape"):
        train(replace(config, model=replace(config.model, ffn_hidden=32)), tmp_path)
    assert not step_folder(tmp_path, 1).exists()


# --- context extension ------------------------------------------------------------------------------------------------


def test_an_extended_run_is_the_old_one_with_longer_rows_and_stretched_positions(corpus, trained, tmp_path):
    config = tiny_run(corpus, steps=3)
    long = extended(config, str(trained), 4, 5)
    assert (long.data.sequence_length, long.data.batch_sequences, long.data.packing) == (68, 1, "whole")
    yarn = long.model.attention.rope.yarn
    assert (yarn.factor, yarn.original_positions) == (4, 17)
    twice = extended(long, "x", 2, 5).model.attention.rope.yarn
    assert (twice.factor, twice.original_positions) == (8, 17), "stretched again from the length it first had"
    run, summary = train(long, tmp_path)
    assert summary.steps == 5 and run.model.config.attention.rope.yarn == yarn
    assert byrote.load(tmp_path).tokenizer.fingerprint() == byrote.load(trained).tokenizer.fingerprint()
    with pytest.raises(ConfigError, match="the factor is 3; give a power of two"):
        extended(config, str(trained), 3, 5)


# --- recall -----------------------------------------------------------------------------------------------------------


def test_a_run_on_recall_alone_trains_resumes_and_learns_answers_only(corpus, tmp_path):
    config = tiny_run(corpus, steps=4)
    recall = RecallConfig(shortest=16, pair_every=8, num_keys=32)
    sources = (SourceConfig(path="recall", recall=recall),)
    config = replace(config, data=replace(config.data, sources=sources, vocab_size=259, sequence_length=32))
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", hooks=[stop_after(1)])
    run, summary = train(config, tmp_path / "parts", resume=True)
    assert files_of(latest(tmp_path / "parts")) == files_of(latest(tmp_path / "whole"))
    scored = (run.prepared.train_loader().next_batch().targets_BT != -100).sum().item()
    assert summary.tokens == 4 * 3 * 32 and scored == 3 * 4, "a question for every eight tokens"
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["facts"]["training"]["tokens"] == 0
