"""Hooks: what else happens after a step. The loop calls each with the number of steps done and the `Run`; none changes the training.

Saving and logging live here; validation, samples and a live line are passed in from above, as training knows neither evaluation
nor the command line.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byrote.train.session import Run

Hook = Callable[[int, "Run"], None]


def log_metrics(done: int, run: "Run") -> None:
    """Record a row every `train.log_every` steps, and after the first and last."""
    every = run.config.train.log_every
    if done not in (1, run.total_steps) and (every == 0 or done % every):
        return
    result = run.last
    row: dict[str, Any] = {"kind": "train", "step": done, "tokens": run.loader.tokens_seen, "seconds": round(run.seconds, 3)}
    row |= {name: value.item() for name, value in result.losses.items()}
    row |= {"loss": row.pop("next_token"), "grad_norm": result.grad_norm.item(), "lr": result.lr_scale, "rows_touched": result.rows_touched}
    row["bits_per_byte"] = row["loss"] / math.log(2) / run.bytes_per_token
    row["tokens_per_second"] = run.tokens_per_second()
    row["expert_load_max"] = {name: round(load.max().item() / load.float().mean().item(), 3) for name, load in result.loads.items()}
    run.record(row)


def count_ngrams(done: int, run: "Run") -> None:
    """Keep the sketch of the most visited n-grams (`memory/heavy.py`), which `byrote memory top` shows."""
    if run.ngrams is not None and run.model.memory is not None:
        for batch in run.batches:
            run.ngrams.update(run.model.memory.canonical(batch.tokens_BT.to(run.device)), batch.document_BT)


def save_checkpoints(done: int, run: "Run") -> None:
    """Save every `train.save_every` steps."""
    every = run.config.train.save_every
    if every and done % every == 0 and done < run.total_steps:
        run.save()
