"""Recipes by name. A recipe is a function without arguments that returns a full `RunConfig`."""

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING

from byrote.config import nearest
from byrote.errors import ConfigError
from byrote.model.profiles import apply_profile

if TYPE_CHECKING:
    from byrote.train.run import RunConfig

RECIPES = {
    "tiny_cpu": "byrote.recipes.tiny_cpu:tiny_cpu",
    "small": "byrote.recipes.small:small",
    "base": "byrote.recipes.base:base",
    "needle": "byrote.recipes.needle:needle",
    "needle_dsa": "byrote.recipes.needle:needle_dsa",
    "needle_v4": "byrote.recipes.needle:needle_v4",
}


def load_recipe(name: str) -> "RunConfig":
    """The configuration that recipe `name` stands for, or "RECIPE:PROFILE" (`byrote.model.profiles`); ConfigError for an unknown name."""
    recipe, _, profile = name.partition(":")
    if recipe not in RECIPES:
        raise ConfigError(f"no recipe {recipe!r}; nearest: {nearest(recipe, RECIPES)}; all: {', '.join(RECIPES)}")
    module, function = RECIPES[recipe].split(":")
    config: RunConfig = getattr(importlib.import_module(module), function)()
    if not profile:
        return config
    return replace(config, name=f"{config.name}-{profile}", model=apply_profile(config.model, profile))
