"""`byrote extend`: from a trained run to a longer one, judged by position before and after."""

import json
from dataclasses import replace

import pytest

from byrote.cli.main import main
from byrote.data.config import RecallConfig, SourceConfig
from byrote.train.session import train
from tests.train.tiny_runs import tiny_run, write_corpus


@pytest.fixture(scope="module")
def texts_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "corpus").mkdir()
    for number in range(9):
        (folder / "corpus" / f"{number}.txt").write_text(f"text number {number} is as long as the others. " * 20)
    config = tiny_run(folder / "corpus", steps=2)
    config = replace(config, model=replace(config.model, mtp=None))
    config = replace(config, data=replace(config.data, sequence_length=16, vocab_size=262, validation_bytes=1000))
    train(config, folder / "run")
    return folder / "run"


def test_a_run_on_text_is_judged_by_octaves(capsys, texts_run, tmp_path):
    argv = ["extend", str(texts_run), "--factor", "4", "--steps", "2", "--out", str(tmp_path / "long")]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["run"], result["steps"]) == (str(tmp_path / "long"), 2)
    assert [line["at"] for line in result["lines"]] == ["1–63", "64–64"]
    assert all(1 < line[name] < 9 for line in result["lines"] for name in ("before", "after"))
    saved = json.loads((tmp_path / "long" / "run.json").read_text())["config"]
    assert saved["model"]["attention"]["rope"]["yarn"]["factor"] == 4 and saved["data"]["sequence_length"] == 64
    assert main(argv) == 2
    assert "already holds a run. Add --resume" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0
    shown = capsys.readouterr().out
    assert "positions" in shown and "nats a token; one run, one seed" in shown


def test_a_run_on_recall_is_judged_by_length(capsys, tmp_path):
    config = tiny_run(write_corpus(tmp_path / "corpus"), steps=1)
    sources = (SourceConfig(path="recall", recall=RecallConfig(shortest=16, pair_every=8, num_keys=32)),)
    train(replace(config, data=replace(config.data, sources=sources, vocab_size=259, sequence_length=16)), tmp_path / "run")
    assert main(["extend", str(tmp_path / "run"), "--factor", "2", "--steps", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["run"] == f"{tmp_path / 'run'}-x2"
    assert [(line["at"], line["n"]) for line in result["lines"]] == [("16", 100), ("32", 100)]
    assert all(0 <= line[name] <= 100 for line in result["lines"] for name in ("before", "after"))


def test_the_control_trains_as_long_with_the_frequencies_as_they_were(texts_run, tmp_path):
    assert main(["extend", str(texts_run), "--steps", "1", "--control", "--out", str(tmp_path / "long")]) == 0
    saved = json.loads((tmp_path / "long" / "run.json").read_text())["config"]
    assert saved["name"].endswith("-x4-control") and saved["data"]["sequence_length"] == 64
    assert saved["model"]["attention"]["rope"]["yarn"] is None


def test_what_is_no_run_is_refused(capsys, tmp_path):
    assert main(["extend", str(tmp_path)]) == 2
    assert "is no run: run.json cannot be read" in capsys.readouterr().err


def test_that_no_text_is_long_enough_is_said_before_anything_is_trained(capsys, texts_run, tmp_path):
    assert main(["extend", str(texts_run), "--factor", "4096", "--out", str(tmp_path / "long")]) == 2
    assert "no text has 65536 tokens" in capsys.readouterr().err
    assert not (tmp_path / "long").exists()
