"""`byrote.LLM` on a saved model."""

import pytest
import torch

import byrote
from byrote.engine.engine import EngineConfig
from byrote.engine.request import SamplingParams
from byrote.errors import RequestError
from byrote.tokenizer.bpe import train_bpe
from tests.engine.small import twin
from tests.model.tiny_models import build, whole

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a tokenizer with a chat template, saved."""
    tokenizer = train_bpe(["some text to learn from, some more text"] * 4, 270)
    tokenizer.chat_template = TEMPLATE
    path = tmp_path_factory.mktemp("llm") / "model"
    byrote.save(build(whole(vocab_size=270)), path, tokenizer=tokenizer)
    return path


def llm_of(folder) -> byrote.LLM:
    return byrote.LLM(folder, device="cpu", config=EngineConfig(speculate="off", max_length=512))


def test_answers_come_in_the_order_of_the_prompts_n_for_each(folder):
    llm = llm_of(folder)
    prompts = ["some", [1, 2, 3], ""]
    ids = [[llm.tokenizer.begin_id, *llm.tokenizer.encode("some")], [1, 2, 3], [llm.tokenizer.begin_id]]
    params = SamplingParams(max_tokens=8, temperature=0.0, n=2, ignore_end=True)
    got = llm.generate(prompts, params)
    assert [one.index for one in got] == [0, 1] * 3
    for number, one in enumerate(got):
        assert list(one.ids) == twin(llm.model, ids[number // 2], 8)
        assert (one.text, one.finish, one.usage[:2]) == (llm.tokenizer.decode(one.ids), "length", (len(ids[number // 2]), 8))


def test_one_prompt_may_be_given_by_itself_with_or_without_params(folder):
    llm = llm_of(folder)
    (text,), (ids,) = llm.generate("some", GREEDY), llm.generate([5, 6], GREEDY)
    assert list(ids.ids) == twin(llm.model, [5, 6], len(ids.ids))
    assert text.usage.prompt_tokens == 1 + len(llm.tokenizer.encode("some"))
    assert llm.generate([], GREEDY) == []
    assert llm.generate("x")[0].finish in ("length", "stop")


def test_params_may_differ_by_prompt(folder):
    got = llm_of(folder).generate(
        [[1], [1]], [SamplingParams(max_tokens=2, ignore_end=True), SamplingParams(max_tokens=5, ignore_end=True)]
    )
    assert [len(one.ids) for one in got] == [2, 5]
    with pytest.raises(RequestError, match="2 prompts and 1 params"):
        llm_of(folder).generate([[1], [1]], [GREEDY])


def test_streams_may_run_side_by_side_and_be_left_early(folder):
    llm = llm_of(folder)
    want = [llm.generate(prompt, GREEDY)[0].text for prompt in ("some", "text")]
    first, second = llm.stream("some", GREEDY), llm.stream("text", GREEDY)
    pieces = [next(first).text, next(second).text]
    pieces = [piece + "".join(event.text for event in rest) for piece, rest in zip(pieces, (first, second), strict=True)]
    assert pieces == want
    third = llm.stream("some", SamplingParams(max_tokens=99))
    next(third)
    third.close()
    assert llm.engine.running() == []


def test_one_bad_prompt_raises_and_leaves_nothing_behind(folder):
    llm = llm_of(folder)
    with pytest.raises(RequestError, match="outside the model's vocabulary"):
        llm.generate([[1], [9999]], GREEDY)
    assert not llm.engine.running()
    assert not llm.engine.waiting()
    assert len(llm.generate([[1]], GREEDY)) == 1


def test_chat_uses_the_template_and_a_base_model_says_what_it_is_for(folder):
    llm = llm_of(folder)
    messages = [{"role": "user", "content": "text"}]
    assert llm.chat_ids(messages) == [llm.tokenizer.begin_id, *llm.tokenizer.encode("[user]text>")]
    assert llm.chat(messages, GREEDY)[0].ids == llm.generate([llm.chat_ids(messages)], GREEDY)[0].ids
    llm.tokenizer.chat_template = None
    with pytest.raises(RequestError, match="base model"):
        llm.chat(messages)


def test_log_probabilities_do_not_change_between_loads(folder):
    params = SamplingParams(max_tokens=6, temperature=0.0, logprobs=0)
    runs = [torch.tensor([token.logprob for token in llm_of(folder).generate([[4, 5]], params)[0].tokens]) for _ in range(2)]
    assert torch.equal(*runs)
