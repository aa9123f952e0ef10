"""`byrote memory`: a run trained by the test, its memory as a pack, and everything done with packs from the command line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import byrote
from byrote.checkpoint.packs import open_pack_files
from byrote.cli.main import main
from byrote.memory.config import TableConfig
from byrote.train.session import train
from tests.tolerances import assert_bitwise
from tests.train.tiny_runs import tiny_run, write_corpus


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run` (with memory), `plain` (without) and `pack` (of run)."""
    place = tmp_path_factory.mktemp("memory")
    config = tiny_run(write_corpus(place / "corpus"))
    train(config, place / "run")
    train(replace(config, model=replace(config.model, engram=None)), place / "plain")
    assert main(["memory", "pack", str(place / "run"), str(place / "pack"), "--licence", "CC0-1.0", "--top", "7"]) == 0
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    import shutil

    shutil.copytree(trained, tmp_path / "all")
    return tmp_path / "all"


def done(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    """What `byrote memory … --json` printed."""
    capsys.readouterr()
    assert main(["memory", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert main(["memory", *map(str, argv)]) == 2
    return capsys.readouterr().err


@torch.no_grad()
def answer(run: Path) -> torch.Tensor:
    return byrote.load(run).model(torch.arange(40).view(2, 20)).logits


def test_a_pack_of_a_run_holds_its_rows_visits_map_and_most_visited_ngrams(trained: Path) -> None:
    model, tokenizer = byrote.load(trained / "run")
    files = open_pack_files(trained / "pack")
    slab = files.table.gather(torch.arange(files.table.num_rows))
    assert_bitwise(slab.vectors_UE, model.memory.store.vectors_NE)
    assert_bitwise(files.canonical_V, model.memory.canonical_V)
    assert 0 < int((slab.visits_U > 0).sum()) <= files.table.num_rows and int(slab.visits_U.max()) == 8, "eight steps visit a row at most"
    assert files.manifest.tokenizer == tokenizer.fingerprint() and files.manifest.licence == "CC0-1.0"
    assert "8 steps" in files.manifest.provenance and str(trained) not in files.manifest.provenance
    assert len(files.top) == 7 and files.top[0].times >= files.top[6].times > 0
    assert files.top[0].text in (trained / "pack" / "CARD.md").read_text()


def test_no_text_leaves_no_ngram_in_the_pack(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    done(capsys, "pack", place / "run", place / "silent", "--no-text")
    assert not (place / "silent" / "top.json").exists() and "--no-text" in (place / "silent" / "CARD.md").read_text()
    assert "lists no n-grams" in refused(capsys, "top", place / "silent")


def test_inspect_and_verify_show_a_whole_pack_and_refuse_a_damaged_one(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    shown = done(capsys, "inspect", place / "pack")
    assert (shown["format"], shown["layers"], shown["licence"], shown["top"]) == (1, [1], "CC0-1.0", 7)
    assert done(capsys, "verify", place / "pack")["ok"] is True
    main(["memory", "inspect", str(place / "pack")])
    assert shown["digest"] in capsys.readouterr().out
    data = bytearray((place / "pack" / "table.bin").read_bytes())
    data[100] ^= 1
    (place / "pack" / "table.bin").write_bytes(data)
    assert done(capsys, "inspect", place / "pack")["digest"] == shown["digest"], "rows are checked when they are read"
    assert "table.bin was altered" in refused(capsys, "verify", place / "pack")


def test_own_memory_off_and_its_pack_on_is_the_run_bitwise(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    run, before = place / "run", answer(place / "run")
    assert done(capsys, "detach", run, "own")["own"] is False
    silent = answer(run)
    assert not torch.allclose(silent, before)
    assert [entry["name"] for entry in done(capsys, "attach", run, place / "pack")["packs"]] == ["run"]
    assert_bitwise(answer(run), before)
    done(capsys, "detach", run, "run")
    assert_bitwise(answer(run), silent)
    done(capsys, "attach", run, "own")
    assert_bitwise(answer(run), before)
    assert done(capsys, "swap", run, "own", place / "pack", "--name", "copy")["own"] is False
    assert_bitwise(answer(run), before)


def test_packs_stack_and_are_swapped_in_their_place(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    run, pack = place / "run", place / "pack"
    done(capsys, "attach", run, pack, "--name", "a")
    done(capsys, "attach", run, pack, "--name", "b")
    assert [entry["name"] for entry in done(capsys, "swap", run, "a", pack, "--name", "c")["packs"]] == ["c", "b"]
    shown = done(capsys, "inspect", run)
    assert shown["own"] and [entry["path"] for entry in shown["packs"]] == ["../pack", "../pack"]
    assert main(["generate", str(run), "abc", "--max-tokens", "3"]) == 0
    assert done(capsys, "detach", run, "c", "b")["packs"] == []


def test_what_does_not_fit_is_refused_and_nothing_is_noted(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    run, pack = place / "run", place / "pack"
    assert "made for base" in refused(capsys, "attach", place / "plain", pack)
    assert "no memory of its own" in refused(capsys, "detach", place / "plain", "own")
    assert "no pack named 'x' is attached" in refused(capsys, "detach", run, "x")
    assert "no pack named 'x' is attached" in refused(capsys, "swap", run, "x", pack)
    assert "a pack named 'run' is attached already" in refused(capsys, "attach", run, pack, pack)
    assert "--name names one pack, and 2 are given" in refused(capsys, "attach", run, pack, pack, "--name", "a")
    assert "Give the folder of a pack" in refused(capsys, "attach", run, place / "nothing")
    assert not (run / "packs.json").exists() and not (place / "plain" / "packs.json").exists()
    assert done(capsys, "attach", place / "plain", pack, "--any-base")["packs"][0]["any_base"] is True


def test_top_of_a_run_is_that_of_its_pack(capsys: pytest.CaptureFixture[str], trained: Path) -> None:
    of_run, of_pack = done(capsys, "top", trained / "run", "-n", 5), done(capsys, "top", trained / "pack", "-n", 5)
    assert of_run["top"] == of_pack["top"] and len(of_run["top"]) == 5 and of_run["at_most_missed"] == 0
    assert "kept no sketch" in refused(capsys, "top", trained / "plain")


def test_quantize_reports_what_is_lost_and_the_result_still_attaches(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    result = done(capsys, "quantize", place / "pack", place / "small")
    assert 0 < result["relative_error"] < 2**-4 and result["table_bytes"] < result["table_bytes_before"]
    card = (place / "small" / "CARD.md").read_text()
    assert "## Quantized" in card and f"{result['relative_error']:.4g}" in card
    assert "table.dtype is fp8 already" in refused(capsys, "quantize", place / "small", place / "smaller")
    before = answer(place / "run")
    done(capsys, "swap", place / "run", "own", place / "small")
    now = answer(place / "run")
    assert not torch.equal(now, before) and float((now - before).norm() / before.norm()) < 0.05


def test_merge_counts_rows_and_refuses_what_is_not_alike(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    result = done(capsys, "merge", place / "pack", place / "pack", place / "twice")
    rows = open_pack_files(place / "pack").table.num_rows
    assert result["both"] + result["neither"] == rows and result["conflicts"] == 0
    found = done(capsys, "diff", place / "pack", place / "twice")
    assert found["rows"] == 0 and set(found["fields"]) == {"provenance"}
    assert "## Merged" in (place / "twice" / "CARD.md").read_text()
    done(capsys, "quantize", place / "pack", place / "small")
    message = refused(capsys, "merge", place / "pack", place / "small", place / "x")
    assert "table.dtype" in message and "Stacked, both speak" in message and not (place / "x").exists()


def test_tables_for_people_are_printed_too(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    pack = str(place / "pack")
    for argv in (
        ["top", pack],
        ["top", str(place / "run")],
        ["verify", pack],
        ["diff", pack, pack],
        ["quantize", pack, str(place / "q")],
        ["merge", pack, pack, str(place / "m")],
        ["attach", str(place / "run"), pack],
        ["inspect", str(place / "run")],
    ):
        assert main(["memory", *argv]) == 0
    out = capsys.readouterr().out
    for text in ("n-gram", "all as written", "the same", "error", "conflicts", "trained with the run"):
        assert text in out


@pytest.mark.parametrize(
    ("argv", "expected"), [(["atach"], "attach"), (["attach", "r", "p", "--nme", "x"], "nearest: --name"), ([], "ACTION")]
)
def test_misspelt_actions_and_options_are_named(capsys: pytest.CaptureFixture[str], argv: list[str], expected: str) -> None:
    assert expected in refused(capsys, *argv)


def test_every_action_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    from byrote.cli.memory import ACTIONS

    for name, action in ACTIONS.items():
        assert main(["memory", name, "--help"]) == 0
        assert action.help in " ".join(capsys.readouterr().out.split())


def test_a_pack_of_a_run_whose_table_is_on_disk_is_that_of_the_run_in_memory(trained: Path, tmp_path: Path) -> None:
    config = tiny_run(trained / "corpus")
    train(replace(config, table=TableConfig(store="disk", cache_bytes=1 << 16)), tmp_path / "run")
    assert main(["memory", "pack", str(tmp_path / "run"), str(tmp_path / "pack"), "--licence", "CC0-1.0", "--top", "7"]) == 0
    for name in ("table.bin", "layers.safetensors", "canonical.safetensors", "top.json"):
        assert (tmp_path / "pack" / name).read_bytes() == (trained / "pack" / name).read_bytes()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("attach", "plain", "run"), "is a run or a checkpoint, and no pack. Its memory becomes one by: byrote memory pack"),
        (("verify", "run"), "is a run or a checkpoint, and no pack"),
        (("attach", "pack", "pack"), "is a pack; give the folder of a run"),
        (("attach", "run", "nothing"), "nothing does not exist. Give the folder of a pack"),
        (("attach", "run", "pack/CARD.md"), "CARD.md is a file. Give the folder of a pack"),
        (("attach", "run", "pack", "--name", "own"), "'own' is the memory a run was trained with"),
        (("top", "pack", "-n", "-3"), "'-3' is no number of n-grams; give 1 or more"),
    ],
)
def test_mixed_up_folders_and_names_are_told_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trained: Path, argv: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(trained)
    assert said in refused(capsys, *argv)


def test_inspecting_a_run_without_memory_of_its_own_shows_none(capsys: pytest.CaptureFixture[str], trained: Path) -> None:
    assert done(capsys, "inspect", trained / "plain") == {"run": str(trained / "plain"), "own": False, "packs": []}


def test_probe_looks_into_packs_too(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    (place / "t.txt").write_text("ab cab\nfa gab")
    own = done(capsys, "probe", place / "run", place / "t.txt")
    assert "has no memory to look into" in refused(capsys, "probe", place / "plain", place / "t.txt")
    done(capsys, "detach", place / "run", "own")
    done(capsys, "attach", place / "run", place / "pack", "--name", "law")
    assert done(capsys, "probe", place / "run", place / "t.txt") == own
