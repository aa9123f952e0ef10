"""The README's commands and code, executed: in its order, in a folder where the quickstart has run (on a tiny recipe)."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import byrote
from byrote.cli.main import main
from byrote.model.config import ResidualConfig
from tests.train.tiny_runs import tiny_run, write_corpus

README = Path(__file__).parents[1] / "README.md"
SHORTER = {"--train.seconds 60": "--train.seconds 0.5"}  # the one thing that is not done word by word


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("byrote ")]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a reader has when he comes to the commands: a finished quickstart, the README, a model in Hugging Face form."""
    monkeypatch.chdir(tmp_path)
    recipe = tiny_run(write_corpus(tmp_path / "corpus", files=12), steps=4)
    monkeypatch.setattr("byrote.recipes.tiny_cpu.tiny_cpu", lambda: recipe)
    assert main(["quickstart"]) == 0
    _, tokenizer = byrote.load("runs/quickstart")
    plain = replace(recipe.model, vocab_size=tokenizer.vocab_size, engram=None, residual=ResidualConfig(kind="plain"))
    byrote.save(byrote.Model(plain), "plain", tokenizer=tokenizer)
    assert main(["export", "plain", "HF_FOLDER"]) == 0
    (tmp_path / "README.md").write_bytes(README.read_bytes())
    return tmp_path


def test_every_command_of_the_readme_works_as_it_stands(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    found = commands()
    assert len(found) >= 8, "the pattern no longer finds the README's commands"
    for line in found:
        for long, short in SHORTER.items():
            line = line.replace(long, short)
        assert main(shlex.split(line)[1:]) == 0, f"{line}\n{capsys.readouterr()}"


def test_the_python_of_the_readme_runs(workplace: Path) -> None:
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
