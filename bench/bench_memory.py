"""What the memory table costs in a training step of `tiny_cpu`, and whether that depends on its size.

    python -m bench.bench_memory [--rounds 15]

`table share` is the time in fetching rows (hash, unique, gather) and updating them (gather, rule, scatter), over the step's. The
second figure compares whole steps with a table of 100 thousand and of 10 million rows, taken in turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from bench.measure import report, spread, take_turns
from byrote.data.packing import TokenBatch
from byrote.model.transformer import Model
from byrote.recipes import load_recipe
from byrote.train.loop import Trainer
from byrote.train.run import RunConfig


class Timed:
    """A function that adds up the seconds spent in it."""

    def __init__(self, work: Callable[..., object]) -> None:
        self._work, self.seconds = work, 0.0

    def __call__(self, *args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        try:
            return self._work(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start


def batches(config: RunConfig, count: int) -> list[TokenBatch]:
    """Zipf-distributed tokens, as n-gram traffic is."""
    generator = torch.Generator().manual_seed(0)
    weights = 1.0 / torch.arange(1, config.model.vocab_size + 1)
    shape = (config.data.batch_sequences, config.data.sequence_length + 1)
    made = []
    for _ in range(count):
        tokens = torch.multinomial(weights, shape[0] * shape[1], replacement=True, generator=generator).view(shape)
        made.append(TokenBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.zeros_like(tokens[:, 1:], dtype=torch.int32)))
    return made


def trainer(config: RunConfig, rows: int | None = None) -> Trainer:
    """The recipe, with about `rows` rows in all of its table."""
    if rows is not None and config.model.engram is not None:
        engram = config.model.engram
        each = rows // (engram.heads_per_layer * len(engram.layers))
        config = replace(config, model=replace(config.model, engram=replace(engram, rows_per_order=each)))
    return Trainer(Model(config.model), config, total_steps=1000)


def stepper(training: Trainer, data: list[TokenBatch]) -> Callable[[], None]:
    count = iter(range(10**9))

    def step() -> None:
        index = next(count)
        training.step(index % 1000, [data[index % len(data)]])

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    config = load_recipe("tiny_cpu")
    data = batches(config, 16)

    own = trainer(config)
    assert own.model.memory is not None and own.rows is not None
    fetch, update = Timed(own.model.memory.fetch), Timed(own.rows.step)
    own.model.memory.fetch, own.rows.step = fetch, update  # type: ignore[method-assign, assignment]
    step = stepper(own, data)
    for _ in range(3):
        step()
    fetch.seconds = update.seconds = 0.0
    whole = take_turns({"step": step}, rounds=rounds, warm_up=0)["step"]

    sizes = {"100 thousand rows": 100_000, "10 million rows": 10_000_000}
    seconds = take_turns({name: stepper(trainer(config, rows), data) for name, rows in sizes.items()}, rounds=rounds, warm_up=3)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    report(
        "memory",
        {
            "table_share_of_step": (fetch.seconds + update.seconds) / sum(whole),
            "fetch_seconds": fetch.seconds / rounds,
            "update_seconds": update.seconds / rounds,
            "step_seconds": {"tiny_cpu": spread(whole)} | {name: spread(values) for name, values in seconds.items()},
            "ratio_10m_to_100k_rows": medians["10 million rows"] / medians["100 thousand rows"],
            "sizes": {"batch": config.data.batch_sequences, "length": config.data.sequence_length, "recipe": "tiny_cpu"},
        },
    )


if __name__ == "__main__":
    main()
