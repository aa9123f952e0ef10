"""`byrote generate` around a stand-in model that always says the same sentence."""

import io
import json
from types import SimpleNamespace

import pytest
import torch

import byrote
from byrote.cli.generate import Counter
from byrote.cli.main import main

SENTENCE = " a café, END."
BEGIN, END = 256, 257


class Speaker:
    config = SimpleNamespace(max_positions=64)

    def __init__(self) -> None:
        self.prompt: list[int] = []
        self.script = [*SENTENCE.encode(), END]
        self.said = 0

    def new_state(self, batch: int) -> SimpleNamespace:
        return SimpleNamespace(device=torch.device("cpu"))

    def __call__(self, tokens_BT: torch.Tensor, *, state: SimpleNamespace) -> SimpleNamespace:
        self.prompt = self.prompt or tokens_BT[0].tolist()
        logits = torch.full((*tokens_BT.shape, 258), -1e9)
        logits[:, -1, self.script[self.said]] = 0.0
        self.said += 1
        return SimpleNamespace(logits=logits)


TOKENIZER = SimpleNamespace(
    begin_id=BEGIN, end_id=END, encode=lambda text: list(text.encode()), token_bytes=lambda token: bytes([token]) if token < 256 else b""
)


@pytest.fixture
def model(monkeypatch):
    speaker = Speaker()
    monkeypatch.setitem(vars(byrote), "load", lambda path, **_: (speaker, TOKENIZER))
    return speaker


def test_the_continuation_goes_to_stdout_and_the_rest_to_stderr(capsys, model):
    assert main(["generate", "runs/x", "This is", "--device", "cpu", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.out == SENTENCE + "\n"
    assert "tokens/s" in captured.err
    assert "seed 3; not captured: Speaker is no byrote model" in captured.err
    assert model.prompt == [BEGIN, *b"This is"]


@pytest.mark.parametrize("extra", [[], ["--no-stream"]])
def test_streamed_or_not_the_text_is_the_same(capsys, model, extra):
    main(["generate", "runs/x", "p", "--stop", "END", "--stop", "zzz", *extra])
    assert capsys.readouterr().out == " a café, \n"


def test_json_is_one_object_with_all_that_happened(capsys, model):
    assert main(["generate", "runs/x", "p", "--json", "--max-tokens", "3"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["prompt"], result["text"], result["tokens"], result["finish"]) == ("p", " a ", 3, "length")
    assert isinstance(result["seed"], int)
    assert result["captured"] is False


@pytest.mark.parametrize("stop", [["--stop", "a"], ["--stop", " a", "--max-tokens", "2"], []])
def test_json_says_when_the_text_ended_by_itself(capsys, model, stop):
    main(["generate", "runs/x", "p", "--json", *stop])
    assert json.loads(capsys.readouterr().out)["finish"] == "stop"


def test_a_dash_reads_the_prompt_from_stdin(monkeypatch, model):
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert main(["generate", "runs/x", "-"]) == 0
    assert model.prompt[1:] == list(b"from a pipe")


def test_text_beyond_the_positions_of_the_model_is_announced(capsys, model):
    main(["generate", "runs/x", "p", "--max-tokens", "63"])
    assert "max_positions is 64" in capsys.readouterr().err
    model.said = 0
    main(["generate", "runs/x", "p", "--max-tokens", "62"])
    assert "max_positions" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["runs/x", "p", "--top-p", "2"], "top_p is 2.0; allowed: above 0, at most 1"),
        (["runs/x", "p", "--tempertaure", "1"], "unknown option --tempertaure; nearest: --temperature"),
        (["runs/x"], "the following arguments are required: PROMPT"),
        (["runs/x", "two", "words"], "unexpected argument: words. Text with spaces needs quotes"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(capsys, monkeypatch, argv, expected):
    monkeypatch.setitem(vars(byrote), "load", lambda path, **_: pytest.fail("loaded"))
    assert main(["generate", *argv]) == 2
    assert expected in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused_with_what_to_do(capsys, monkeypatch):
    monkeypatch.setitem(vars(byrote), "load", lambda path, **_: (Speaker(), None))
    assert main(["generate", "runs/x", "p"]) == 2
    assert "runs/x holds a model without a tokenizer" in capsys.readouterr().err


def test_a_counter_knows_no_speed_of_fewer_than_two_tokens():
    for count in (0, 1):
        counter = Counter(range(count))
        assert list(counter) == list(range(count))
        assert (counter.tokens, counter.tokens_per_second) == (count, None)
        assert "tokens/s" not in counter.line()
