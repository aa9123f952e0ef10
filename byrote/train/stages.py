"""Which stage of sparse attention a step trains (V3.2 §2.1; what a stage computes: model/dsa.py).

    train.index_warmup = 0.6,0.7     of the run's steps: up to 0.6 dense, from there to 0.7 the indexers alone, then sparse
    none                             all steps as the model's index_stage says

In the warm-up the language-model loss is computed and not learned from, memory rows are read and not written, and routers keep their
biases: nothing but the indexers' own parameters moves. The step alone decides, so a resumed run is in the right stage.
"""

from collections.abc import Iterator
from typing import Any

from byrote.errors import ConfigError
from byrote.model.block import Block
from byrote.model.transformer import Model

WARMUP = "dense_warmup"


def stage_at(step: int, total_steps: int, warmup: tuple[float, float] | None, otherwise: str) -> str:
    """`warmup`: where it begins and ends, as shares of the run."""
    if warmup is None:
        return otherwise
    begin, end = (share * total_steps for share in warmup)
    return "dense" if step < begin else WARMUP if step < end else "sparse"


def is_indexers(name: str) -> bool:
    """Whether a parameter is an indexer's."""
    return ".indexer." in name


def indexed(model: Model) -> Iterator[Any]:
    """The attention of every block that has an indexer."""
    blocks = (module for module in model.modules() if isinstance(module, Block))
    return (block.attn for block in blocks if getattr(block.attn, "indexer", None) is not None)


def initial_stage(model: Model, warmup: tuple[float, float] | None) -> str:
    """The index_stage of the configuration. ConfigError where stages are asked for that the model cannot have."""
    stages = {attention.config.index_stage for attention in indexed(model)}
    if warmup is not None and stages != {"sparse"}:
        found = f"some block's index_stage is {WARMUP}" if stages else "no block has an indexer"
        raise ConfigError(f"train.index_warmup is set and {found}; set it to none, or use attention with an indexer and index_stage sparse")
    if len(stages) > 1:
        raise ConfigError("some blocks' index_stage is sparse and others' dense_warmup; give all the same, as a step trains one of them")
    return stages.pop() if stages else "sparse"


def enter(model: Model, stage: str) -> None:
    """From now on `model` computes and learns what `stage` says."""
    for attention in indexed(model):
        attention.stage = stage
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage != WARMUP or is_indexers(name))
