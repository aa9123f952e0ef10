"""Recipes by name. A recipe is a function without arguments that returns a full `RunConfig`."""

import importlib
from typing import TYPE_CHECKING

from byrote.config import nearest
from byrote.errors import ConfigError

if TYPE_CHECKING:
    from byrote.train.run import RunConfig

RECIPES = {
    "tiny_cpu": "byrote.recipes.tiny_cpu:tiny_cpu",
    "small": "byrote.recipes.small:small",
    "base": "byrote.recipes.base:base",
}


def load_recipe(name: str) -> "RunConfig":
    """The configuration that recipe `name` stands for; ConfigError for a name that is not in RECIPES."""
    if name not in RECIPES:
        raise ConfigError(f"no recipe {name!r}; nearest: {nearest(name, RECIPES)}; all: {', '.join(RECIPES)}")
    module, function = RECIPES[name].split(":")
    return getattr(importlib.import_module(module), function)()
