"""Losses land in the octave of their position, and only whole windows count."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from byrote.errors import DataError
from byrote.eval.positions import loss_by_position
from tests.eval.needle_models import word_tokenizer


class Counts(nn.Module):
    """The loss at a place is its number, from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1, 1)
        self.seen: list[list[int]] = []

    def forward(self, tokens_BT, *, targets_BT, want):
        assert want == ("token_losses",)
        self.seen += torch.cat((tokens_BT, targets_BT[:, -1:]), 1).tolist()
        places = torch.arange(1, tokens_BT.shape[1] + 1).expand(tokens_BT.shape)
        return SimpleNamespace(extras={"token_losses": places.float()})


@pytest.mark.parametrize("context", [64, 128, 200, 257])
def test_octaves_hold_the_mean_of_their_positions(context):
    texts = ["xyz " * 300, "short", "xyz " * 200]
    model = Counts()
    octaves = loss_by_position(model, word_tokenizer(), texts, context)
    lines = [[word_tokenizer().begin_id, *word_tokenizer().encode(text)] for text in texts]
    windows = [line[at : at + context + 1] for line in lines for at in range(0, len(line) - context, context)]
    assert model.seen == windows and len(windows) >= 4
    assert octaves[0].first == 1 and octaves[-1].last == context
    for one, other in pairwise(octaves):
        assert other.first == one.last + 1 and math.log2(other.first).is_integer()
    for octave in octaves:
        assert octave.loss == pytest.approx((octave.first + octave.last) / 2)
        assert octave.tokens == (octave.last - octave.first + 1) * len(windows)


def test_texts_too_short_for_one_window_are_refused():
    with pytest.raises(DataError, match="no text has 500 tokens"):
        loss_by_position(Counts(), word_tokenizer(), ["short"], 500)
