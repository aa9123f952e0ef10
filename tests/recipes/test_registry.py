"""Names of recipes lead to full configurations that carry the same name."""

import importlib.util

import pytest

from byrote.errors import ConfigError
from byrote.recipes import RECIPES, load_recipe
from byrote.train.run import RunConfig

PRESENT = [name for name, place in RECIPES.items() if importlib.util.find_spec(place.split(":")[0])]


@pytest.mark.parametrize("name", PRESENT)
def test_a_recipe_is_a_run_configuration_of_its_own_name(name):
    config = load_recipe(name)
    assert isinstance(config, RunConfig)
    assert config.name == name


def test_an_unknown_recipe_names_the_nearest_and_all():
    with pytest.raises(ConfigError, match="no recipe 'smal'; nearest: small; all: tiny_cpu, small, base, needle, needle_dsa, needle_v4"):
        load_recipe("smal")
