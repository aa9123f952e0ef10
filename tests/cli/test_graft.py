"""`byrote graft`: from a folder of text and a model to a pack, or an error that says what to do."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from byrote.cli.main import main
from tests.graft.trained import animal_text, planet_text, train_host, write_folder

DOCS = Path(__file__).parents[2] / "docs" / "graft.md"
SIZES = ["--sequence-length", "32", "--batch-sequences", "2", "--rows-per-order", "101", "--validation-bytes", "1000", "--context", "64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("graft")
    train_host(root / "host", steps=1)
    write_folder(root / "planets", [planet_text(number, sentences=10) for number in range(6)])
    write_folder(root / "animals", [animal_text(number, sentences=10) for number in range(6)])
    return root


def arguments(folder: Path, out: str, *more: str) -> list[str]:
    places = ["--text", str(folder / "planets"), "--outside", str(folder / "animals"), "--out", str(folder / out)]
    return ["graft", str(folder / "host"), *places, *SIZES, *more]


def test_a_pack_is_written_and_its_figures_are_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, "pack", "--layers", "0,2", "--epochs", "0.2", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["pack"] == str(folder / "pack")
    assert [row["kind"] for row in result["results"]] == ["graft"]
    assert result["results"][0]["measured"]["inside"] > 0 < result["before"]["outside"]
    manifest = json.loads((folder / "pack" / "manifest.json").read_text())
    assert manifest["layers"] == [0, 2]
    assert main(["memory", "verify", str(folder / "pack")]) == 0
    (block,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    exec(block.replace("models/qwen", str(folder / "host")).replace("packs/notes", str(folder / "pack")), {})
    capsys.readouterr()
    assert main(arguments(folder, "pack")) == 2
    assert "never overwritten" in capsys.readouterr().err


def test_a_dry_run_says_what_it_would_need_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.iterdir())
    assert main(arguments(folder, "dry", "--dry-run", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["plan"]["tokens"] > 0 and plan["plan"]["disk_bytes"] > plan["plan"]["ram_bytes"] > 0
    assert plan["config"]["controls"] == []
    assert plan["engram"]["layers"] == [1]
    assert sorted(folder.iterdir()) == before


def test_an_interrupted_graft_exits_with_130_and_the_same_command_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def stopped() -> Iterator[threading.Event]:
        stop = threading.Event()
        stop.set()
        yield stop

    with monkeypatch.context() as patch:
        patch.setattr("byrote.train.interrupt.stop_on_interrupt", stopped)
        assert main(arguments(folder, "parts", "--epochs", "0.1")) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (folder / "parts").exists() and (folder / "parts.work").is_dir()
    assert main(arguments(folder, "parts", "--epochs", "0.1")) == 0
    assert (folder / "parts" / "CARD.md").is_file() and not (folder / "parts.work").exists()


def test_a_mistake_found_before_training_leaves_nothing_that_the_corrected_command_would_meet(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, message in (["--layers", "9"], "blocks 0..2"), (["--outside", "/nowhere"], "does not exist"):
        assert main(arguments(folder, "mended", *wrong)) == 2
        assert message in capsys.readouterr().err
        assert not (folder / "mended.work").exists()
    assert main(["graft", "./no-such-host", "--text", "x", "--out", str(folder / "mended")]) == 2
    assert "./no-such-host is no folder" in capsys.readouterr().err


def test_a_catalogue_alone_gets_steps_enough_and_shows_what_its_header_makes_of_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = folder / "planets.csv"
    table.write_text("planet,metal\nZakomir,zinc\nVexshi,tin\n")
    assert main(["graft", str(folder / "host"), "--facts", str(table), "--out", str(folder / "few"), "--dry-run", *SIZES]) == 0
    shown = capsys.readouterr().out
    assert "The metal of Zakomir is zinc" in shown and "400 steps" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --text FOLDER, or --facts TABLE.csv"),
        (["--text", "x", "--controls", "everything"], "allowed: one-row, shuffled, frozen-rows, no-lookup, lora"),
        (["--text", "x", "--laiers", "1"], "nearest: --layers"),
        (["--text", "x", "--lr", "fast"], "lr is 'fast'"),
    ],
)
def test_mistakes_are_named(folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main(["graft", str(folder / "host"), "--out", str(folder / "never"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "never").exists() and not (folder / "never.work").exists()
