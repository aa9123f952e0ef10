"""The sketch of n-grams that a run keeps: of every step, across an interruption, and not where it is not wanted."""

import contextlib
from pathlib import Path

import torch

from byrote.checkpoint.run_pack import read_sketch
from byrote.memory.heavy import HeavyHitters
from byrote.train.session import Run, train
from tests.tolerances import assert_bitwise
from tests.train.tiny_runs import tiny_run, write_corpus


def test_the_sketch_counts_the_batches_of_every_step(tmp_path: Path) -> None:
    config, twin = tiny_run(write_corpus(tmp_path / "corpus"), accumulate=2), HeavyHitters(1000, 3, 10**5)

    def count(_: int, run: Run) -> None:
        twin.base = run.ngrams.base
        for batch in run.batches:
            twin.update(run.model.memory.canonical(batch.tokens_BT), batch.document_BT)

    train(config, tmp_path / "run", hooks=[count])
    sketch = read_sketch(tmp_path / "run")
    assert sketch.top(10**5) == twin.top(10**5) and sketch.seen == twin.seen > 500 and sketch.lost == 0


def test_a_resumed_run_has_the_sketch_of_one_never_interrupted(tmp_path: Path) -> None:
    config = tiny_run(write_corpus(tmp_path / "corpus"), count_ngrams=20)
    train(config, tmp_path / "whole")

    def save_and_stop(done: int, run: Run) -> None:
        if done == 3:
            run.save()
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        train(config, tmp_path / "parts", hooks=[save_and_stop])
    train(config, tmp_path / "parts", resume=True)
    whole, parts = (read_sketch(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert int(whole["ngrams.about"][3]) > 0, "something was dropped, so the order mattered"
    for name, tensor in whole.items():
        assert_bitwise(parts[name], tensor)


def test_zero_counters_keep_no_sketch_and_change_no_weight(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    run, _ = train(tiny_run(corpus), tmp_path / "with")
    other, _ = train(tiny_run(corpus, count_ngrams=0), tmp_path / "without")
    assert read_sketch(tmp_path / "without") is None
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), other.model.parameters(), strict=True))
