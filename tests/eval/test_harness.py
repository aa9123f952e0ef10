"""One forward pass decides what greedy decoding would; both kinds of model answer alike; a folder of code or pickles is not run."""

import pytest
import torch

from byrote.errors import DataError
from byrote.eval.harness import ByroteLM, TransformersLM, load_transformers
from tests.eval.needle_models import word_tokenizer
from tests.model.tiny_models import build, whole

LLAMA = {"vocab_size": 500, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def decoded(step, prompt: list[int], count: int) -> list[int]:
    """The slow twin: one token after the other, each after all that were said before."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(step(torch.tensor([text])).argmax(-1)[0, -1]))
    return text[len(prompt) :]


def llama(folder) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA, initializer_range=0.3)).save_pretrained(folder)
    word_tokenizer().save(folder)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """(judge, logits of a whole text) of a model of ours and of one of transformers."""
    model = build(whole(vocab_size=500, mtp=None))
    folder = tmp_path_factory.mktemp("llama")
    llama(folder)
    hf = load_transformers(str(folder), "cpu")
    assert isinstance(hf, TransformersLM)
    return {
        "byrote": (ByroteLM("ours", model, word_tokenizer()), lambda tokens: model(tokens).logits),
        "transformers": (hf, lambda tokens: hf._model(tokens).logits),
    }


@pytest.mark.parametrize("name", ["byrote", "transformers"])
def test_an_answer_is_right_under_one_forward_pass_exactly_if_greedy_decoding_writes_it(subjects, name):
    judge, logits = subjects[name]
    generator = torch.Generator().manual_seed(1)
    agreed = {True: 0, False: 0}
    with torch.no_grad():
        for number in range(24):
            prompt = torch.randint(500, (11,), generator=generator).tolist()
            answer = decoded(logits, prompt, 4)
            if number % 2:  # wrong at one place, from the first to the last
                answer[number // 2 % 4] = (answer[number // 2 % 4] + 1) % 500
            said = judge.greedy(torch.tensor([prompt + answer]), 4)[0].tolist()
            assert (said == answer) == (decoded(logits, prompt, 4) == answer)
            agreed[said == answer] += 1
    assert min(agreed.values()) == 12


@pytest.mark.parametrize("name", ["byrote", "transformers"])
def test_texts_of_one_length_are_judged_together_as_each_alone(subjects, name):
    judge, _ = subjects[name]
    tokens_BT = torch.randint(500, (3, 17), generator=torch.Generator().manual_seed(2))
    together = judge.greedy(tokens_BT, 5)
    assert together.shape == (3, 5)
    assert together.tolist() == [judge.greedy(tokens_BT[row : row + 1], 5)[0].tolist() for row in range(3)]


def test_a_model_without_a_way_to_keep_few_logits_says_the_same(subjects, monkeypatch):
    judge, _ = subjects["transformers"]
    assert judge._keeps_last
    tokens_BT = torch.randint(500, (2, 9), generator=torch.Generator().manual_seed(3))
    kept = judge.greedy(tokens_BT, 3)
    monkeypatch.setattr(judge, "_keeps_last", False)
    assert torch.equal(judge.greedy(tokens_BT, 3), kept)


def test_text_is_encoded_without_special_tokens_and_begins_with_the_begin_token(subjects):
    for judge, _ in subjects.values():
        assert judge.begin == (word_tokenizer().begin_id,)
        assert judge.encode(" is. One") == word_tokenizer().encode(" is. One")


def test_what_is_no_model_or_holds_only_pickles_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no config"):
        load_transformers(str(tmp_path), "cpu")
    llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(DataError, match="transformers cannot load"):
        load_transformers(str(tmp_path), "cpu")
