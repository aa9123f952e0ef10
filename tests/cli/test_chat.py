"""`byrote chat` on a small saved model, with lines on stdin."""

import io

import pytest

import byrote
from byrote.cli.main import main
from byrote.tokenizer.bpe import train_bpe
from tests.model.tiny_models import build, whole

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def saved(path, template):
    tokenizer = train_bpe(["some text to learn from, some more text"] * 4, 270)
    tokenizer.chat_template = template
    byrote.save(build(whole(vocab_size=270, mtp=None)), path, tokenizer=tokenizer)
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    return {"chat": saved(root / "chat", TEMPLATE), "base": saved(root / "base", None)}


def talk(monkeypatch, capsys, folder, lines, *options):
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    status = main(["chat", folder, "--device", "cpu", "--max-tokens", "6", "--temperature", "0", *options])
    return status, *capsys.readouterr()


@pytest.fixture
def prompts(monkeypatch):
    """What the model was asked, in order."""
    asked = []
    real = byrote.LLM.stream
    monkeypatch.setattr(byrote.LLM, "stream", lambda self, prompt, *rest, **more: asked.append(prompt) or real(self, prompt, *rest, **more))
    return asked


def test_a_conversation_goes_on_until_it_is_reset(monkeypatch, capsys, folders, prompts):
    status, out, err = talk(monkeypatch, capsys, folders["chat"], "some\n\nmore\n/reset\nsome\n/exit\nnever\n", "--system", "text")
    assert status == 0
    assert "type a message" in err
    assert len(prompts) == 3
    first, second, third = prompts
    encode = byrote.load(folders["chat"]).tokenizer.encode
    assert first == third == encode("[system]text[user]some>")
    said = out.split("\n")[0]
    assert second == encode(f"[system]text[user]some[assistant]{said}[user]more>")


def test_a_base_model_continues_text_and_says_so(monkeypatch, capsys, folders, prompts):
    status, out, err = talk(monkeypatch, capsys, folders["base"], "some\nmore\n")
    assert status == 0
    assert "base model without a chat template: it continues what you type" in err
    assert prompts == ["some", "more"]
    want = byrote.LLM(folders["base"], device="cpu").generate(["some", "more"], byrote.SamplingParams(max_tokens=6, temperature=0.0))
    assert out == "".join(one.text + "\n" for one in want)


def test_a_base_model_takes_no_system_message(monkeypatch, capsys, folders):
    status, _, err = talk(monkeypatch, capsys, folders["base"], "", "--system", "x")
    assert status == 2
    assert "takes no --system" in err


def test_unknown_commands_and_prompts_that_are_too_long_do_not_end_the_conversation(monkeypatch, capsys, folders, prompts):
    long = "text " * 9000
    status, out, err = talk(monkeypatch, capsys, folders["base"], f"/quit\n{long}\nsome\n")
    assert status == 0
    assert "unknown command /quit; there are /reset, /exit" in err
    assert "/reset begins anew" in err
    assert out.count("\n") == 1
    assert prompts[-1] == "some"
