"""`byrote train` around a stand-in for the session: what reaches it, and what is refused before it."""

import json
import math
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest

from byrote.cli import train, training
from byrote.cli.main import main
from byrote.config import apply_overrides, describe, from_dict, to_dict
from byrote.eval.bits import BitsResult
from byrote.model.config import MTPConfig
from byrote.model.presets import load_preset
from byrote.train.run import DataConfig, OptimConfig, RunConfig, SourceConfig, TrainConfig
from byrote.train.session import TrainSummary

RECIPE = RunConfig(
    name="stand-in", model=load_preset("tiny"), data=DataConfig(sources=(SourceConfig(path="notes"),)), train=TrainConfig(steps=7)
)


SUMMARY = TrainSummary(steps=7, tokens=99, seconds=2.5, tokens_per_second=39.6, loss=math.nan, parameters=1234, memory_parameters=0)


@pytest.fixture
def session(monkeypatch, tmp_path):
    """Calls of the session as (config, out, resume), and `result`: what it returns. Works in an empty folder."""
    session = SimpleNamespace(calls=[], result=SUMMARY, bits=BitsResult(1.5, [], 9, 0.1))

    def train_with_progress(config, out, *, resume, progress):
        session.calls.append((config, out, resume))
        return None, session.result, SimpleNamespace(last=None if session.result.interrupted else session.bits)

    monkeypatch.setattr(training, "train_with_progress", train_with_progress)
    monkeypatch.setattr(train, "load_recipe", lambda name: RECIPE)
    monkeypatch.chdir(tmp_path)
    return session


def made_run(folder):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    return folder


def test_without_options_the_recipe_is_trained_as_it_is(session, capsys):
    assert main(["train", "tiny_cpu"]) == 0
    ((config, out, resume),) = session.calls
    assert (config, str(out), resume) == (RECIPE, "runs/stand-in", False)
    assert "byrote generate runs/stand-in" in capsys.readouterr().out


def test_options_change_the_fields_they_name_and_the_name_sets_the_folder(session):
    argv = ["--name", "other", "--optim.lr", "1e-3", "--model.mtp=none", "--data.sources", "a,b", "--train.seed", "-1"]
    assert main(["train", "tiny_cpu", *argv]) == 0
    config, out, _ = session.calls[0]
    expected = replace(
        RECIPE,
        name="other",
        model=replace(RECIPE.model, mtp=None),
        data=replace(RECIPE.data, sources=(SourceConfig(path="a"), SourceConfig(path="b"))),
        optim=replace(RECIPE.optim, lr=1e-3),
        train=replace(RECIPE.train, seed=-1),
    )
    assert config == expected
    assert str(out) == "runs/other"


def test_json_prints_the_summary_alone(session, capsys):
    main(["train", "tiny_cpu", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert (result["run"], result["steps"], result["validation_bits_per_byte"]) == ("runs/stand-in", 7, 1.5)
    assert result["loss"] is None, "JSON has no NaN"


def test_the_result_names_the_score_and_its_seeds(session, capsys):
    main(["train", "tiny_cpu"])
    assert "1.5000 bits per byte (one run, one seed)" in capsys.readouterr().out


def test_an_interrupted_run_says_how_to_go_on_with_the_same_options(session, capsys, tmp_path):
    session.result = replace(SUMMARY, interrupted=True)
    assert main(["train", "tiny_cpu", "--optim.lr", "1e-3", "--data.sources", "my notes", "--out", "here"]) == 130
    command = capsys.readouterr().err.strip().splitlines()[-1]
    made_run(tmp_path / "here")
    session.result = SUMMARY
    assert main(shlex.split(command)[1:]) == 0
    (first, again) = session.calls
    assert again == (first[0], first[1], True)


def test_help_documents_every_field_of_the_configuration(capsys):
    main(["train", "--help"])
    shown = capsys.readouterr().out
    for option in describe(RunConfig):
        assert f"--{option.name} VALUE" in shown
    assert "arXiv 2601.07372" in shown, "the comments of the source"


@pytest.mark.parametrize("extra", [[], ["--model.mtp", "none"]])
def test_a_dry_run_prints_a_configuration_that_can_be_given_back_and_trains_nothing(session, capsys, extra):
    assert main(["train", "tiny_cpu", "--dry-run", *extra]) == 0
    shown = capsys.readouterr().out
    config = replace(RECIPE, model=replace(RECIPE.model, mtp=None)) if extra else RECIPE
    given = dict(line.removeprefix("--").split(maxsplit=1) for line in shown.splitlines() if line.startswith("--"))
    assert ("model.mtp.depth" in given) != bool(extra), "fields of a part that is switched off are not shown"
    assert apply_overrides(config, given) == config
    assert apply_overrides(replace(config, optim=OptimConfig(lr=0.5), name="x"), given) == config
    assert "FLOPs per token" in shown
    assert session.calls == []


def test_a_dry_run_in_json_holds_the_configuration_and_the_plan(session, capsys):
    main(["train", "tiny_cpu", "--dry-run", "--json", "--model.mtp.depth", "2"])
    result = json.loads(capsys.readouterr().out)
    assert from_dict(RunConfig, result["config"]).model == replace(RECIPE.model, mtp=replace(RECIPE.model.mtp or MTPConfig(), depth=2))
    assert result["config"] | {"model": None} == to_dict(RECIPE) | {"model": None}
    assert result["plan"]["flops_per_token"]["sequence"] == RECIPE.data.sequence_length


def test_a_run_is_not_overwritten_but_can_be_resumed(session, capsys, tmp_path):
    out = made_run(tmp_path / "old")
    assert main(["train", "tiny_cpu", "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "already holds a run" in message
    assert "--resume" in message
    assert main(["train", "tiny_cpu", "--out", str(out), "--resume"]) == 0
    assert session.calls == [(RECIPE, out, True)]


def test_an_empty_folder_is_taken_and_what_is_no_run_is_not_resumed(session, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert main(["train", "tiny_cpu", "--out", "empty"]) == 0
    assert main(["train", "tiny_cpu", "--out", "empty", "--resume"]) == 2
    assert "holds no run to resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--model.moe.topk", "4"], "unknown option --model.moe.topk; nearest: --model.moe.top_k"),
        (["--optim.lr", "fast"], "optim.lr is 'fast'; allowed: float"),
        (["--optim.matrix", "sgd"], "optim.matrix is 'sgd'; allowed: muon, adamw"),
        (["--out", "file"], "--out file is a file; name a folder"),
        (["--model.attention.sliding_window", "4"], "unknown option: model.attention.sliding_window"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_session(session, capsys, tmp_path, argv, expected):
    (tmp_path / "file").touch()
    assert main(["train", "tiny_cpu", *argv]) == 2
    assert expected in capsys.readouterr().err
    assert session.calls == []


def test_an_unknown_recipe_names_the_nearest(capsys):
    assert main(["train", "tiny_gpu"]) == 2
    assert "no recipe 'tiny_gpu'; nearest: tiny_cpu" in capsys.readouterr().err
