"""Needles stand where they should, in texts of exactly the length asked for, and distractors differ in exactly one token."""

import random

import pytest

from byrote.errors import ConfigError, DataError
from byrote.eval import haystack
from byrote.eval.haystack import TextNeedles
from tests.eval.needle_models import Reader, make_hay, word_tokenizer

KINDS = TextNeedles.kinds


@pytest.fixture(scope="module")
def needles() -> TextNeedles:
    return TextNeedles(Reader(2), make_hay())


def text_of(sample) -> str:
    return word_tokenizer().decode(sample.tokens[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [257, 512, 3000])
def test_a_text_has_the_length_asked_for_and_ends_with_its_answer(needles, kind, length):
    sample = needles.sample(kind, length, 0.5, "seed")
    assert len(sample.tokens) == length and sample.tokens[0] == 0
    assert sample.scored == list(range(sample.scored[0], length)) and 1 <= len(sample.scored) < 40
    answer = word_tokenizer().decode([sample.tokens[place] for place in sample.scored])
    question = text_of(sample)[: -len(answer)]
    for part in answer.split(","):
        assert part in question, "what is asked for stands in the text"


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_asked_statement_stands_at_the_border_nearest_to_its_depth(needles, monkeypatch, kind, depth):
    placed = []
    insert = haystack._insert
    monkeypatch.setattr(haystack, "_insert", lambda hay, pieces, places: placed.append((hay, places)) or insert(hay, pieces, places))
    for seed in range(20):
        needles.sample(kind, 1024, depth, str(seed))
    for hay, (first, *others) in placed:
        assert abs(first - depth * len(hay)) <= 12, "no sentence of the hay is longer than 24 tokens"
        assert all(0 <= place <= len(hay) for place in others)
        assert kind not in ("multi-value", "variable") or (others == sorted(others) and min(others) >= first)


def test_needles_stand_between_sentences(needles):
    for seed in range(20):
        before, _, _ = text_of(needles.sample("single", 512, 0.5, str(seed))).partition(" The special number")
        assert before.endswith(".")


def test_every_distractor_differs_from_the_asked_key_in_exactly_one_token(needles):
    lm = Reader(1)
    for seed in range(50):
        statements = haystack._distractor(random.Random(seed), needles._words).statements
        asked, *others = [lm.encode(statement.partition(" is ")[0]) for statement in statements]
        assert len(others) == haystack.NUM_OTHERS == len({tuple(other) for other in others})
        for other in others:
            assert sum(one != two for one, two in zip(other, asked, strict=True)) == 1


def test_multi_keys_share_no_word_with_the_asked_one(needles):
    for seed in range(50):
        statements = haystack._multi_key(random.Random(seed), needles._words).statements
        words = [word for statement in statements for word in statement.split(" of ")[1].split(" is ")[0].split()]
        assert len(set(words)) == len(words) == (1 + haystack.NUM_OTHERS) * haystack.KEY_WORDS


def test_a_chain_of_variables_can_be_followed_to_its_number(needles):
    made = haystack._variable(random.Random(1), needles._words)
    values: dict[str, str] = {}
    for statement in made.statements:
        name, value = statement.removeprefix(" Let ").removesuffix(".").split(" be ")
        values[name] = values.get(value, value)
    number = made.question.split()[-2]
    assert [name for name, value in values.items() if value == number] == made.answer.strip().split(", ")
    assert sum(value != number for value in values.values()) == 3, "the other chain"


def test_the_seed_decides_the_text(needles):
    one, same, other = (needles.sample("distractor", 512, 0.5, seed) for seed in ("a", "a", "b"))
    assert one == same != other


def test_hay_shorter_than_the_text_goes_round(needles):
    short = TextNeedles(Reader(2), make_hay(40))
    assert len(short.sample("single", 4000, 1.0, "s").tokens) == 4000


def test_what_cannot_be_built_is_refused_with_what_it_needs(needles):
    with pytest.raises(ConfigError, match=r"needles of kind 'multi-key' with their question take \d+ tokens; a length of 40 is too short"):
        needles.sample("multi-key", 40, 0.5, "s")
    with pytest.raises(DataError, match="only 0 words of the hay are one token"):
        TextNeedles(Reader(2), "1 2 3. 4 5 6.")
    with pytest.raises(DataError, match="the hay holds no text"):
        TextNeedles(Reader(2), "")
