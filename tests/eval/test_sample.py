"""Sampling on a model that is a table: which id follows which."""

from types import SimpleNamespace

import pytest
import torch

from byrote.engine.request import Grammar, SamplingParams
from byrote.errors import RequestError
from byrote.eval.sample import PREFILL_TOKENS, decode_pieces, generate, generate_ids
from byrote.kernels.decode_step import cpu
from byrote.model.tape import Tape
from tests.engine.small import answers, engine_of
from tests.kernels.twins import need
from tests.model.tiny_models import build, whole


class Bytes:
    """A tokenizer whose ids 0…255 are bytes and whose further ids are `words`, then begin and end."""

    def __init__(self, words: tuple[str, ...] = ()) -> None:
        self._tokens = [bytes([byte]) for byte in range(256)] + [word.encode() for word in words] + [b"", b""]
        self.begin_id, self.end_id = len(self._tokens) - 2, len(self._tokens) - 1

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return self._tokens[token]


class Counting:
    """Logits say: the id after the newest one, plus the number of tokens seen. Keeps the chunks it was called with."""

    def __init__(self, vocab: int = 258, sharpness: float = 9.0) -> None:
        self.vocab, self.sharpness, self.chunks = vocab, sharpness, []

    def new_state(self, batch: int) -> SimpleNamespace:
        assert batch == 1
        return SimpleNamespace(length=0, device=torch.device("cpu"))

    def __call__(self, tokens_BT: torch.Tensor, *, state: SimpleNamespace) -> SimpleNamespace:
        assert not torch.is_grad_enabled()
        self.chunks.append(tokens_BT.tolist()[0])
        state.length += tokens_BT.shape[1]
        following_BT = (tokens_BT + state.length) % self.vocab
        return SimpleNamespace(logits=self.sharpness * torch.nn.functional.one_hot(following_BT, self.vocab).float())


class Script:
    """Says the ids of `script` one after the other, whatever it reads."""

    def __init__(self, script: list[int], vocab: int) -> None:
        self.script, self.vocab, self.said = script, vocab, 0

    def new_state(self, batch: int) -> SimpleNamespace:
        return SimpleNamespace(device=torch.device("cpu"))

    def __call__(self, tokens_BT: torch.Tensor, *, state: SimpleNamespace) -> SimpleNamespace:
        logits = torch.zeros(*tokens_BT.shape, self.vocab)
        logits[:, -1, self.script[self.said]] = 1.0
        self.said += 1
        return SimpleNamespace(logits=logits)


def said(script: list[int], tokenizer: Bytes, prompt: str = "p", **params) -> list[str]:
    model = Script([*script, tokenizer.end_id], tokenizer.end_id + 1)
    return list(generate(model, tokenizer, prompt, SamplingParams(temperature=0, **params)))


def test_greedy_follows_the_largest_logit_and_reads_each_token_once():
    model = Counting()
    ids = list(generate_ids(model, [3, 4], SamplingParams(max_tokens=4, temperature=0)))
    assert ids == [6, 9, 13, 18]
    assert model.chunks == [[3, 4], [6], [9], [13]], "the last id is not read: nothing follows it"


@pytest.mark.parametrize("length", [1, PREFILL_TOKENS - 1, PREFILL_TOKENS, PREFILL_TOKENS + 1, 2 * PREFILL_TOKENS + 7])
def test_a_prompt_in_chunks_gives_what_it_gives_whole(length):
    prompt = [n % 251 for n in range(length)]
    model = Counting()
    (first,) = generate_ids(model, prompt, SamplingParams(max_tokens=1, temperature=0))
    assert first == (prompt[-1] + length) % model.vocab
    assert [token for chunk in model.chunks for token in chunk] == prompt
    assert max(map(len, model.chunks)) <= PREFILL_TOKENS


def test_the_captured_step_is_taken_by_itself_and_says_what_the_model_says(monkeypatch):
    need(cpu.library)
    model, ran = build(whole(mtp=None)), []
    run = Tape.run
    monkeypatch.setattr(Tape, "run", lambda *parts: ran.append(1) or run(*parts))
    params = SamplingParams(max_tokens=40, temperature=0)
    captured = list(generate_ids(model, [1] * 20, params))
    assert len(ran) == 39, "the prompt is longer than a tape takes, all that follows is captured"
    assert captured == list(generate_ids(model, [1] * 20, params, step=model))
    monkeypatch.setenv("BYROTE_NATIVE", "0")
    assert captured == list(generate_ids(model, [1] * 20, params))
    assert len(ran) == 39


def test_a_seed_repeats_and_two_seeds_differ():
    def drawn(seed: int) -> list[int]:
        return list(generate_ids(Counting(sharpness=1.0), [1], SamplingParams(max_tokens=33, temperature=1.0, seed=seed)))

    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)


def test_sampling_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    list(generate_ids(Counting(), [1], SamplingParams(max_tokens=7)))
    assert torch.equal(before, torch.get_rng_state())


def test_an_end_id_ends_and_is_not_given_out():
    assert list(generate_ids(Counting(), [3, 4], SamplingParams(max_tokens=9, temperature=0), end_ids=(13,))) == [6, 9]


def test_a_seed_draws_what_it_draws_in_the_engine():
    model, prompt = build(whole()), [5, 9, 14]
    for params in (SamplingParams(max_tokens=20, temperature=1.0, seed=3), SamplingParams(max_tokens=20, top_k=9, top_p=0.9, seed=4)):
        assert list(generate_ids(model, prompt, params)) == answers(engine_of(model), [prompt], params)[0]


@pytest.mark.parametrize("params", [SamplingParams(n=2), SamplingParams(grammar=Grammar(kind="json"))], ids=["choices", "grammar"])
def test_what_only_the_engine_can_is_refused(params):
    with pytest.raises(RequestError, match=r"byrote\.LLM"):
        next(generate_ids(Counting(), [1], params))


def test_without_a_first_id_there_is_nothing_to_continue():
    with pytest.raises(RequestError, match="begin_id"):
        next(generate_ids(Counting(), [], SamplingParams()))


def test_an_empty_prompt_begins_a_document():
    model = Counting()
    list(generate(model, Bytes(), "", SamplingParams(max_tokens=1)))
    assert model.chunks == [[Bytes().begin_id]]


def test_characters_that_straddle_tokens_come_out_whole():
    text = "aé€😀 b"
    pieces = said(list(text.encode()), Bytes())
    assert pieces == list(text)


def test_bytes_that_are_no_text_are_shown_and_do_not_hold_up_what_follows():
    assert said([0x80, 0x80, 0xE2, ord("a")], Bytes()) == ["\ufffd", "\ufffd", "\ufffda"]
    assert said([ord("a"), 0xE2, 0x82], Bytes()) == ["a", "\ufffd"], "cut in the middle of a character"


def test_a_stop_string_may_straddle_tokens_and_is_never_shown_in_part():
    tokenizer = Bytes(("the E", " E", "ND of"))
    pieces = said([256, ord("N"), ord("T"), 257, 258, ord("x")], tokenizer, stop=("END",))
    assert pieces == ["the ", "ENT", " "]


def test_text_that_only_looked_like_a_stop_string_comes_out_at_the_end():
    assert "".join(said(list(b"one EN"), Bytes(), stop=("END",))) == "one EN"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(("c",), "ab"), (("zz", "bc"), "a"), (("d", "b"), "a"), (("a",), ""), (("abcdefg",), "abcdef"), (("é",), "abcdef")],
)
def test_output_ends_before_the_first_stop_string(stop, expected):
    tokenizer = Bytes(("abcdef",))
    for script in ([256], list(b"abcdef")):
        assert "".join(said(script, tokenizer, stop=stop)) == expected


def test_stopping_reads_no_further_id():
    ids = iter(b"ab-cd")
    assert list(decode_pieces(Bytes(), ids, ("-",))) == ["a", "b"]
    assert list(ids) == list(b"cd")


def test_any_split_into_pieces_joins_to_the_same_text():
    text = "x€END€yEN😀DEND!"
    for seed in range(7):
        cuts = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))[:4].sort().values.tolist()
        parts = tuple(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if a < b)
        tokenizer = Bytes(parts)
        assert "".join(said([256 + n for n in range(len(parts))], tokenizer, stop=("DEND",))) == "x€END€yEN😀"
