"""`byrote compare`: repetitions become one row with their seeds, differences are named, the page holds the curves."""

import json
import re
import statistics
from dataclasses import replace

import pytest

from byrote.cli.compare import Estimate, estimate
from byrote.cli.main import main
from byrote.config import to_dict
from byrote.model.count import count_parameters
from byrote.model.presets import load_preset
from byrote.train.run import DataConfig, RunConfig, SourceConfig, TrainConfig

CONFIG = RunConfig(name="a", model=load_preset("tiny"), data=DataConfig(sources=(SourceConfig(path="notes"),)), train=TrainConfig(steps=30))
PLAIN = replace(CONFIG, model=replace(CONFIG.model, engram=None))


def write_run(folder, config, bits, *, seed=0, speed=100.0, device="cpu"):
    folder.mkdir()
    config = replace(config, name=folder.name, train=replace(config.train, seed=seed))
    at = [{"step": n, "tokens": n * 512, "seconds": float(n)} for n in (10, 20, 30)]
    rows = [{"kind": "train", "loss": 3.0, "bits_per_byte": 4 - row["step"] / 20, "tokens_per_second": speed} | row for row in at]
    rows += [{"kind": "validation", "step": n, "bits_per_byte": bits + 30 - n, "tokens": 7, "seconds": 0.1} for n in (20, 30)]
    (folder / "run.json").write_text(json.dumps({"config": to_dict(config), "total_steps": 30, "device": device}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def compared(capsys, *argv):
    assert main(["compare", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def runs(tmp_path):
    """Three seeds with memory, one of them twice, and one run without."""
    made = [write_run(tmp_path / f"memory{n}", CONFIG, bits, seed=n, speed=100 + n) for n, bits in enumerate((1.2, 1.3, 1.5))]
    again = write_run(tmp_path / "again", CONFIG, 1.4, seed=2, speed=102)
    return [*made, again, write_run(tmp_path / "plain", PLAIN, 1.6, seed=5)]


def test_runs_that_differ_only_in_name_and_seed_are_one_row(capsys, runs):
    memory, plain = compared(capsys, *runs)["rows"]
    assert memory["runs"] == ["memory0", "memory1", "memory2", "again"]
    assert (memory["seeds"], plain["seeds"]) == (3, 1)
    means = [1.2, 1.3, 1.45]  # a seed run twice counts once
    bits = memory["validation_bits_per_byte"]
    assert bits["mean"] == pytest.approx(statistics.fmean(means))
    assert bits["deviation"] == pytest.approx(statistics.stdev(means))
    assert plain["validation_bits_per_byte"] == {"mean": pytest.approx(1.6), "deviation": None}


def test_a_row_carries_sizes_and_what_was_trained(capsys, runs):
    memory, plain = compared(capsys, *runs)["rows"]
    counted = count_parameters(CONFIG.model)
    assert (memory["parameters"], memory["memory"]) == (counted.trained, counted.table)
    assert plain["memory"] == 0
    assert (memory["steps"], memory["tokens"]) == ([30, 30], [30 * 512, 30 * 512])
    assert memory["tokens_per_second"]["mean"] == 101


def test_a_part_switched_off_is_one_difference_not_many(capsys, runs):
    (difference,) = compared(capsys, *runs)["differences"]
    assert difference == 'model.engram: "on" | null'


def test_a_field_that_differs_between_runs_with_the_part_is_named_although_another_run_lacks_the_part(capsys, tmp_path):
    wide = replace(CONFIG, model=replace(CONFIG.model, engram=replace(CONFIG.model.engram, head_dim=99)))
    runs = [write_run(tmp_path / name, config, 1.0) for name, config in (("plain", PLAIN), ("memory", CONFIG), ("wide", wide))]
    assert compared(capsys, *runs)["differences"] == [
        'model.engram: null | "on" | "on"',
        f"model.engram.head_dim: – | {CONFIG.model.engram.head_dim} | 99",
    ]


def test_every_other_difference_is_named(capsys, tmp_path):
    changed = replace(CONFIG, optim=replace(CONFIG.optim, lr=0.5), data=replace(CONFIG.data, sources=(SourceConfig(path="other"),)))
    runs = [write_run(tmp_path / "a", CONFIG, 1.0), write_run(tmp_path / "b", changed, 1.0)]
    names = [line.split(":")[0] for line in compared(capsys, *runs)["differences"]]
    assert names == ["data.sources", "optim.lr"]


def test_the_table_shows_spread_only_where_there_are_seeds_and_says_so(capsys, runs):
    assert main(["compare", *runs]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"memory0, memory1, memory2, again .* 1\.3167 ± 0\.1258 +101 +3\n", shown)
    assert re.search(r"plain .* 1\.6000 +100 +1\n", shown)
    for note in ("sample standard deviation over seeds", "one seed has no spread", "curves: compare.html"):
        assert note in shown


def test_the_page_holds_table_and_curves_and_needs_nothing_else(capsys, runs, tmp_path):
    page = compared(capsys, *runs, "--out", "deep/page.html")["page"]
    text = (tmp_path / page).read_text()
    assert text.count("<svg") == 3
    assert text.count("<polyline") == 3 * len(runs)
    assert "1.3167 ± 0.1258" in text
    assert not re.search(r"<script|<link|src=|@import", text)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["page.html"]


def test_a_name_that_would_break_the_page_is_escaped(tmp_path):
    run = write_run(tmp_path / "a<b>&c", CONFIG, 1.0)
    assert main(["compare", run]) == 0
    text = (tmp_path / "compare.html").read_text()
    assert "a&lt;b&gt;&amp;c" in text
    assert "a<b>" not in text


def test_runs_of_the_same_folder_name_are_told_apart_by_their_path(capsys, tmp_path):
    paths = []
    for parent in ("x", "y"):
        (tmp_path / parent).mkdir()
        paths.append(write_run(tmp_path / parent / "run", CONFIG, 1.0, seed=len(paths)))
    (row,) = compared(capsys, *paths)["rows"]
    assert row["runs"] == paths


def test_a_run_that_has_only_begun_is_shown_with_blanks(capsys, tmp_path):
    run = write_run(tmp_path / "young", CONFIG, 1.0)
    (tmp_path / "young" / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "los')
    assert main(["compare", run]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"young +\S+ +\S+ +– +– +– +– +1\n", shown)
    assert "Not finished, so not comparable with finished runs: young." in shown


def test_runs_with_a_budget_of_seconds_show_how_far_their_steps_lie_apart(capsys, tmp_path):
    runs = [write_run(tmp_path / name, CONFIG, 1.0, seed=seed) for seed, name in enumerate(("slow", "fast"))]
    metrics = tmp_path / "slow" / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines() if '"step": 30' not in line]
    metrics.write_text("\n".join(kept) + "\n")
    saved = json.loads((tmp_path / "slow" / "run.json").read_text())
    (tmp_path / "slow" / "run.json").write_text(json.dumps(saved | {"total_steps": 20}))
    assert main(["compare", *runs]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"slow, fast .* 20–30 .* 2\n", shown)
    assert "Not finished" not in shown


def test_speeds_of_different_devices_are_not_averaged(capsys, tmp_path):
    runs = [write_run(tmp_path / device, CONFIG, 1.0, seed=seed, device=device) for seed, device in enumerate(("cpu", "cuda"))]
    compared_runs = compared(capsys, *runs)
    assert [row["seeds"] for row in compared_runs["rows"]] == [1, 1]
    assert compared_runs["differences"] == ['train.device: "cpu" | "cuda"']


def test_validation_is_drawn_over_the_tokens_trained_until_then(capsys, tmp_path):
    run = write_run(tmp_path / "run", CONFIG, 1.0)
    main(["compare", run])
    (validation, training, _) = re.findall(r'points="([^"]*)"', (tmp_path / "compare.html").read_text())
    assert validation.split()[-1].split(",")[0] == training.split()[-1].split(",")[0], "both end where the run ended"
    assert len(validation.split()) == 2


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda run: (run / "run.json").unlink(), "is no run: run.json is missing"),
        (lambda run: (run / "metrics.jsonl").unlink(), "is no run: metrics.jsonl is missing"),
        (lambda run: (run / "run.json").write_text("{"), "cannot be read"),
        (lambda run: (run / "run.json").write_text("{}"), "cannot be read: 'config'"),
        (lambda run: (run / "run.json").write_text('{"config": {"nam": 1}}'), "nearest: name"),
        (lambda run: (run / "metrics.jsonl").write_text("no json\n"), "cannot be read"),
    ],
)
def test_what_is_no_run_is_named(capsys, tmp_path, break_it, expected):
    write_run(tmp_path / "run", CONFIG, 1.0)
    break_it(tmp_path / "run")
    assert main(["compare", "run"]) == 2
    assert expected in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_an_error_that_says_so(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert main(["compare", write_run(tmp_path / "run", CONFIG, 1.0), "--out", "file/page.html"]) == 2
    assert "--out file/page.html cannot be written" in capsys.readouterr().err


def test_an_estimate_leaves_out_what_is_missing():
    assert estimate([(0, None)]) == Estimate(None, None)
    assert estimate([(0, 1.0), (1, None)]) == Estimate(1.0, None)
    assert estimate([(0, 1.0), (0, 3.0)]) == Estimate(2.0, None), "one seed, run twice, has no spread over seeds"
    assert [str(Estimate(None, None)), str(Estimate(1.0, None)), str(Estimate(1.0, 0.25))] == ["–", "1.0000", "1.0000 ± 0.2500"]
