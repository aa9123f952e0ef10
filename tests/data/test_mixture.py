"""The mixture keeps its shares and forgets nothing, because there is nothing to remember."""

import math

import pytest

from byrote.data.mixture import Mixture
from byrote.errors import ConfigError


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [3, 1], [0.01, 5, 2.5]])
def test_each_source_has_its_share_of_the_rows(weights: list[float]) -> None:
    rows = 20_000
    chosen = Mixture(weights, seed=3).choose(0, rows)
    for source, weight in enumerate(weights):
        assert abs(chosen.count(source) / rows - weight / sum(weights)) < 2 / math.sqrt(rows)


def test_a_choice_depends_on_seed_and_row_only() -> None:
    mixture = Mixture([2, 1, 1], seed=0)
    whole = mixture.choose(0, 1000)
    assert [source for row in range(0, 1000, 7) for source in mixture.choose(row, 7)][:1000] == whole
    assert Mixture([4, 2, 2], seed=0).choose(0, 1000) == whole
    assert Mixture([2, 1, 1], seed=1).choose(0, 1000) != whole


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [math.nan]])
def test_weights_that_mean_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="positive weights"):
        Mixture(weights, seed=0)
