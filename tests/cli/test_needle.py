"""`byrote eval --needle` from folders to table, heat maps and a file of cells: runs on text, runs on recall, models of transformers."""

import json
from pathlib import Path

import pytest
import torch

import byrote
from byrote.cli.main import main
from byrote.config import to_dict
from byrote.data.config import DataConfig, RecallConfig, SourceConfig
from byrote.eval.harness import ByroteLM, TransformersLM
from byrote.tokenizer.bpe import train_bpe
from byrote.train.run import RunConfig
from tests.eval.needle_models import make_hay, word_tokenizer
from tests.model.tiny_models import bare, build

RECALL = RecallConfig(shortest=16, pair_every=8, num_keys=32, num_values=9, num_hay=20)


def make_run(folder, data, tokenizer, *, validation: str | None = None):
    model = build(bare(vocab_size=tokenizer.vocab_size, num_layers=1))
    byrote.save(model, folder / "checkpoints" / "step-00000001", tokenizer=tokenizer)
    config = RunConfig(name="made", model=model.config, data=data)
    (folder / "run.json").write_text(json.dumps({"config": to_dict(config)}))
    (folder / "data").mkdir()
    if validation is not None:
        (folder / "data" / "validation.jsonl").write_text(json.dumps({"name": "a", "text": validation}) + "\n")
    return str(folder)


@pytest.fixture
def text_run(tmp_path):
    (tmp_path / "run").mkdir()
    return make_run(tmp_path / "run", DataConfig(sources=(SourceConfig(path="x"),)), word_tokenizer(), validation=make_hay())


@pytest.fixture
def recall_run(tmp_path):
    (tmp_path / "run").mkdir()
    sources = (SourceConfig(path="recall", recall=RECALL),)
    return make_run(tmp_path / "run", DataConfig(sources=sources, vocab_size=259), train_bpe([], 259))


@pytest.fixture
def asked(monkeypatch):
    """Shapes of all texts that were put to a model; every answer is right in the first row of a batch only."""
    shapes = []

    def greedy(self, tokens_BT, last):
        shapes.append(tuple(tokens_BT.shape))
        said = tokens_BT[:, -last:].clone()
        said[1:] += 1
        return said

    monkeypatch.setattr(ByroteLM, "greedy", greedy)
    monkeypatch.setattr(TransformersLM, "greedy", greedy)
    return shapes


def test_a_run_is_judged_on_its_own_unseen_corpus(capsys, text_run, asked):
    argv = ["eval", text_run, "--needle", "--kinds", "single,distractor", "--lengths", "300,400", "--depths", "3", "--samples", "4"]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["seed"] == 0 and result["hay"].startswith("corpus, SHA-256 ")
    assert [(cell["kind"], cell["length"], cell["depth"]) for cell in result["cells"]] == [
        (kind, length, depth) for kind in ("single", "distractor") for length in (300, 400) for depth in (0.0, 0.5, 1.0)
    ]
    assert {(cell["hits"], cell["samples"], cell["share"]) for cell in result["cells"]} == {(1, 4, 0.25)}
    assert asked == [(4, length) for _ in range(2) for length in (300, 400) for _ in range(3)]
    page, picture = (Path(file).read_bytes() for file in result["files"])
    assert b"distractor" in page and b"25 %" in page and b"<script" not in page and b"http" not in page
    assert picture.startswith(b"\x89PNG")


def test_the_table_shows_every_depth_the_whole_kind_intervals_and_the_seed(capsys, recall_run, asked):
    assert main(["eval", recall_run, "--needle", "--lengths", "64", "--depths", "2", "--samples", "4", "--seed", "7"]) == 0
    shown = capsys.readouterr().out
    for text in ("single", "multi-key", "multi-query", "0 %", "100 %", "all", "25 (5–70)", "25 (7–59)", "seed 7", "Wilson", "needle.html"):
        assert text in shown
    assert "distractor" not in shown, "the synthetic task has no such kind"


def test_a_half_finished_evaluation_goes_on_behind_its_last_cell(capsys, recall_run, asked, monkeypatch):
    argv = ["eval", recall_run, "--needle", "--kinds", "single", "--lengths", "32,64", "--depths", "2", "--samples", "3", "--json"]
    original, calls = ByroteLM.greedy, []

    def breaks(self, tokens_BT, last):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, tokens_BT, last)

    monkeypatch.setattr(ByroteLM, "greedy", breaks)
    assert main(argv) == 130
    monkeypatch.setattr(ByroteLM, "greedy", original)
    asked.clear()
    capsys.readouterr()
    assert main(argv) == 0
    assert asked == [(3, 64)] * 2, "two cells were finished before"
    assert len(json.loads(capsys.readouterr().out)["cells"]) == 4
    for change in (["--seed", "1"], ["--samples", "2"]):
        asked.clear()
        main([*argv, *change])
        assert len(asked) == 4, "other settings share no cells"


def test_a_model_of_transformers_is_judged_on_a_text(capsys, tmp_path, asked, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=500, **shape)).save_pretrained(tmp_path / "hf")
    word_tokenizer().save(tmp_path / "hf")
    (tmp_path / "hay.txt").write_text(make_hay())
    monkeypatch.chdir(tmp_path)
    argv = [
        "eval",
        "--hf",
        "hf",
        "--needle",
        "--hay",
        "hay.txt",
        "--kinds",
        "variable",
        "--lengths",
        "300",
        "--depths",
        "1",
        "--samples",
        "2",
    ]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["model"], result["cells"][0]["hits"]) == ("hf", 1)
    assert (tmp_path / "needle-hf" / "needle.html").is_file()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "give one model"),
        (["RUN", "--hf", "x"], "give one model"),
        (["--hf", "x"], "--hf needs a text to hide needles in: --hay FILE"),
        (
            ["RUN", "--kinds", "singel"],
            "needle kind 'singel' is unknown for this hay; nearest: single; all: single, multi-key, multi-query",
        ),
        (["RUN", "--lengths", "many"], "--lengths is 'many'; give whole numbers"),
        (["RUN", "--depths", "0"], "--depths is 0"),
        (["RUN", "--samples", "0"], "--samples is 0"),
        (["RUN", "--hay", "corpus"], "keeps no validation texts"),
        (["RUN", "--hay", "nothing.txt"], "nothing.txt cannot be read"),
    ],
)
def test_what_cannot_be_asked_is_refused(capsys, recall_run, options, expected):
    argv = [recall_run if option == "RUN" else option for option in options]
    assert main(["eval", "--needle", *argv]) == 2
    assert expected in capsys.readouterr().err


def test_bits_are_of_runs_alone_and_one_test_is_asked_for_at_a_time(capsys):
    assert main(["eval", "--hf", "x", "--bits", "y"]) == 2
    assert main(["eval", "x"]) == 2
    assert main(["eval", "x", "--bits", "y", "--needle"]) == 2
    shown = capsys.readouterr().err
    assert "--bits needs a run" in shown and "one of the arguments --bits --needle is required" in shown and "not allowed with" in shown
