"""Scores are counted right, intervals are Wilson's, and a finished cell depends on nothing but its seed."""

import pytest
import torch

from byrote.data.config import RecallConfig
from byrote.data.synthetic import Alphabet, is_held_out, num_pairs
from byrote.errors import ConfigError
from byrote.eval import needle
from byrote.eval.haystack import Sample, TextNeedles
from byrote.eval.needle import Cell, RecallNeedles, Score, count_right, even_depths, grid, pooled, score_cells, wilson
from tests.eval.needle_models import Reader, make_hay

CONFIG = RecallConfig(shortest=32, pair_every=8, max_pairs=8, num_keys=20, num_values=9, num_hay=30)


def letters() -> Alphabet:
    ids = torch.arange(3, 62).numpy()
    return Alphabet(0, ids[:20], ids[20:29], ids[29:])


@pytest.mark.parametrize(
    ("hits", "samples", "low", "high"),
    [(0, 50, 0.0, 0.0713), (50, 50, 0.9287, 1.0), (200, 200, 0.9812, 1.0), (100, 200, 0.4314, 0.5686), (1, 10, 0.0179, 0.4042)],
)
def test_the_interval_is_wilsons(hits, samples, low, high):
    """Figures from Newcombe (1998) and from the formula in exact arithmetic."""
    assert wilson(hits, samples) == pytest.approx((low, high), abs=5e-5)


def test_a_larger_sample_narrows_the_interval_around_the_same_share():
    widths = [wilson(n // 4, n).high - wilson(n // 4, n).low for n in (8, 80, 800)]
    assert widths == sorted(widths, reverse=True)
    assert all(wilson(n // 4, n).low < 0.25 < wilson(n // 4, n).high for n in (8, 80, 800))


class Says:
    """Always says the same tokens at the last places."""

    name, begin = "says", ()

    def __init__(self, said: list[list[int]]) -> None:
        self.said = said

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def greedy(self, tokens_BT, last):
        return torch.tensor([row[-last:] for row in self.said])


def test_an_answer_counts_only_if_every_token_of_it_is_right():
    texts = [Sample([5, 6, 7, 8], [2, 3]), Sample([5, 6, 7, 8], [2, 3]), Sample([1, 2, 3, 4], [3]), Sample([1, 2, 3, 4], [1, 3])]
    said = [[0, 0, 7, 8], [0, 0, 7, 9], [0, 0, 0, 4], [0, 9, 3, 4]]
    assert count_right(Says(said), texts) == 2
    assert [count_right(Says([row]), [text]) for row, text in zip(said, texts, strict=True)] == [1, 0, 1, 0]


def test_a_length_too_short_for_one_kind_is_refused_before_anything_is_asked():
    cells = [Cell("single", 512, 0.5), Cell("multi-key", 40, 0.5)]
    with pytest.raises(ConfigError, match="a length of 40 is too short"):
        next(score_cells(Says([]), TextNeedles(Reader(2), make_hay(400)), cells, samples=1))


def test_a_model_that_looks_the_key_up_finds_needles_and_one_that_sees_too_little_of_it_is_misled():
    """The last two tokens before a number, word and ' is', are those of most distractors; the whole key is nobody else's."""
    source = TextNeedles(Reader(10), make_hay())
    cells = grid(["single", "distractor"], [300], [0.0, 0.5])
    whole = dict(score_cells(Reader(10), source, cells, samples=20))
    assert {score.share for score in whole.values()} == {1.0}
    part = dict(score_cells(Reader(2), source, cells, samples=20))
    assert pooled(part, kind="single").share == 1.0
    assert pooled(part, kind="distractor").share < 0.9


def test_lengths_decide_how_many_samples_a_cell_has_and_batches_are_bounded():
    class Wrong(Reader):
        def greedy(self, tokens_BT, last):
            self.longest = max(self.longest, tokens_BT.numel())
            return torch.full((len(tokens_BT), last), -1)

    lm = Wrong(1)
    source = RecallNeedles(CONFIG, letters())
    told = []
    cells = grid(["single"], [64, 4096], [0.5])
    scores = dict(score_cells(lm, source, cells, done=lambda *progress: told.append(progress)))
    assert {cell.length: score.samples for cell, score in scores.items()} == {64: 200, 4096: 50}
    assert {score.hits for score in scores.values()} == {0}
    assert told[-1] == (250, 250) and lm.longest <= needle.BATCH_TOKENS


def test_a_cell_does_not_depend_on_what_was_scored_before_it():
    source = RecallNeedles(CONFIG, letters())
    assert source.sample("multi-key", 64, 0.5, "a") == RecallNeedles(CONFIG, letters()).sample("multi-key", 64, 0.5, "a")
    assert source.sample("multi-key", 64, 0.5, "a") != source.sample("multi-key", 64, 0.5, "b")
    assert source.sample("multi-key", 64, 0.5, "0 a long text that ends alike") != source.sample(
        "multi-key", 64, 0.5, "1 a long text that ends alike"
    )


@pytest.mark.parametrize(("kind", "pairs", "questions"), [("single", 1, 1), ("multi-key", 8, 1), ("multi-query", 8, 4)])
def test_recall_needles_ask_for_a_pair_at_the_depth_that_training_never_saw(kind, pairs, questions):
    alphabet = letters()
    assert num_pairs(CONFIG, 128) == 8
    for number in range(10):
        tokens, scored = RecallNeedles(CONFIG, alphabet).sample(kind, 128, 0.5, str(number))
        body = tokens[1 : 128 - 2 * questions]
        keys = [at for at, token in enumerate(body) if token in alphabet.keys]
        assert len(keys) == pairs and len(scored) == questions
        found = {body[at]: body[at + 1] for at in keys}
        assert [tokens[place] for place in scored] == [found[tokens[place - 1]] for place in scored]
        assert abs(body.index(tokens[scored[0] - 1]) - len(body) / 2) <= pairs
        pair = [torch.tensor([[*part]]).numpy() for part in (found.keys(), found.values())]
        assert is_held_out(*pair).all()


def test_depths_go_from_the_start_to_the_end():
    assert even_depths(5) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert even_depths(1) == [0.5]
    with pytest.raises(ConfigError, match="--depths is 0"):
        even_depths(0)


def test_cells_pool_by_what_they_share():
    scores = {
        Cell("a", 1, 0.0): Score(hits=1, samples=2),
        Cell("a", 2, 0.0): Score(hits=2, samples=2),
        Cell("b", 1, 0.0): Score(hits=0, samples=6),
    }
    assert pooled(scores, kind="a") == Score(hits=3, samples=4)
    assert pooled(scores, length=1) == Score(hits=1, samples=8)
    assert pooled(scores, kind="c") is None
    assert str(Score(hits=1, samples=2)) == "50 (9–91)"
