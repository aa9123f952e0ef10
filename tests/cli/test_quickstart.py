"""`byrote quickstart` from end to end, on a tiny recipe and a tiny text."""

import json
import re
import signal
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

import byrote.cli.training as shared
import byrote.device
import byrote.recipes
from byrote.cli.main import main
from byrote.train import session
from tests.eval.test_report import SECTIONS, check_self_contained
from tests.train.tiny_runs import rows_of, tiny_run, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts", files=12)


@pytest.fixture
def recipe(corpus, monkeypatch, tmp_path):
    """The recipe that quickstart finds; tests may change it. Works in an empty folder."""
    found = Namespace(config=tiny_run(corpus, steps=6, log_every=1, eval_every=4))
    monkeypatch.setattr(byrote.recipes, "load_recipe", lambda name: found.config)
    monkeypatch.setattr(byrote.device, "matmul_peak", lambda device, dtype: 1e11)
    monkeypatch.setattr("byrote.cli.quickstart._SAMPLE_TOKENS", 5)
    monkeypatch.chdir(tmp_path)
    return found


def quickstart(*options: str) -> int:
    return main(["quickstart", *options])


def test_it_trains_reports_and_says_what_to_do_next(recipe, capsys):
    assert quickstart() == 0
    said = capsys.readouterr()
    assert {path.name for path in Path("runs/quickstart").iterdir()} == {"checkpoints", "data", "metrics.jsonl", "report.html", "run.json"}
    for command in ("open runs/quickstart/report.html", "byrote generate runs/quickstart", "byrote eval runs/quickstart --bits"):
        assert command in said.out
    assert "training: 6 steps on cpu" in said.err
    assert "× of it" in said.out


def test_the_live_line_tells_loss_speed_and_time_left(recipe, monkeypatch, capsys):
    monkeypatch.setattr("byrote.console.PLAIN_INTERVAL_S", 0.0)
    quickstart()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 6
    for step, line in enumerate(lines, 1):
        pattern = rf"step {step}/6  loss \d\.\d+  \d\.\d+ bits/byte  [\d,]+ tokens/s  \d+ % of peak  ETA [\d.]+s"
        assert re.fullmatch(pattern, line), line


def test_the_report_has_every_section_and_needs_no_network(recipe):
    quickstart()
    parsed = check_self_contained(Path("runs/quickstart/report.html").read_text())
    for heading in SECTIONS.values():
        assert heading in parsed.text
    for fact in ("corpus", "parameters", "bits per byte", "memory zeroed", "xz -9", "One run, one seed", "never trained on"):
        assert fact in parsed.text


def test_json_gives_the_numbers_alone(recipe, capsys):
    assert quickstart("--json", "--out", "elsewhere") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["run"], result["steps"]) == ("elsewhere", 6)
    assert result["bits_per_byte"].keys() == {"model", "without_memory", "xz"}
    assert result["ratio_to_xz"] == pytest.approx(result["bits_per_byte"]["model"] / result["bits_per_byte"]["xz"])


def test_a_python_without_lzma_costs_the_comparison_and_not_the_run(recipe, monkeypatch, capsys):
    monkeypatch.setattr("byrote.cli.quickstart.find_spec", lambda name: None if name == "_lzma" else pytest.fail(name))
    assert quickstart() == 0
    assert "not measured: this Python was built without lzma" in capsys.readouterr().out
    assert "this model" in Path("runs/quickstart/report.html").read_text()


def test_validations_are_recorded_once_however_often_it_is_called(recipe, monkeypatch, capsys):
    quickstart("--json")
    rows, first = rows_of(Path("runs/quickstart")), json.loads(capsys.readouterr().out)
    kinds = [(row["kind"], row["step"]) for row in rows if row["kind"] != "train"]
    assert kinds == [("validation", 4), ("validation", 6), ("validation_without_memory", 6)]
    monkeypatch.setattr(session.Trainer, "step", lambda *_: pytest.fail("a finished run trains no more"))
    monkeypatch.setattr(shared.Validator, "_compute", lambda *_: pytest.fail("what was scored is not scored again"))
    Path("runs/quickstart/report.html").unlink()
    quickstart("--json")
    assert rows_of(Path("runs/quickstart")) == rows
    assert json.loads(capsys.readouterr().out) == first
    assert Path("runs/quickstart/report.html").exists()


def test_stopped_it_says_how_to_go_on_and_the_same_command_does(recipe, monkeypatch, capsys):
    step = shared.LiveLine.step

    def interrupts(self, done, run):
        step(self, done, run)
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(shared.LiveLine, "step", interrupts)
    assert quickstart("--out", "r") == 130
    assert "byrote quickstart --out r" in capsys.readouterr().out
    assert not Path("r/report.html").exists()
    assert quickstart("--out", "r") == 0
    assert [row["step"] for row in rows_of(Path("r")) if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_a_model_without_memory_experts_or_mtp_leaves_their_sections_out(recipe):
    plain = replace(recipe.config.model, engram=None, moe=None, mtp=None, residual=replace(recipe.config.model.residual, kind="plain"))
    recipe.config = replace(recipe.config, model=plain)
    assert quickstart() == 0
    text = check_self_contained(Path("runs/quickstart/report.html").read_text()).text
    assert {name for name, heading in SECTIONS.items() if heading in text} == {"train", "bits", "samples"}


@pytest.mark.parametrize("seconds", ["0", "-3", "nan", "inf"])
def test_seconds_that_are_none_are_refused(recipe, capsys, seconds):
    assert quickstart(f"--seconds={seconds}") == 2
    assert "give a positive number" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_options_reach_the_run(recipe):
    quickstart("--seed", "7", "--device", "cpu", "--seconds", "50")
    config = json.loads(Path("runs/quickstart/run.json").read_text())["config"]
    assert (config["train"]["seed"], config["data"]["seed"], config["train"]["seconds"], config["train"]["device"]) == (7, 7, 50.0, "cpu")


def test_another_seed_in_the_same_folder_is_refused(recipe, capsys):
    quickstart()
    assert quickstart("--seed", "1") == 2
    assert "data.seed was 0, now 1" in capsys.readouterr().err


def test_training_without_held_out_text_ends_without_a_score(recipe, capsys):
    recipe.config = replace(recipe.config, data=replace(recipe.config.data, validation_bytes=0))
    run, summary, validator = shared.train_with_progress(recipe.config, Path("r"), resume=False, progress=shared.Progress())
    assert validator.last is None and summary.steps == 6 and not run.prepared.validation
