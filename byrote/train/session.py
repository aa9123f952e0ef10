"""A run from a configuration to a folder: data, model, steps, checkpoints, metrics; stopped and resumed without a trace.

    RUN/run.json          configuration, number of steps, facts of the data, summary at the end
    RUN/metrics.jsonl     one JSON object a line
    RUN/data/             tokenizer, shards, validation texts (remade when missing)
    RUN/checkpoints/      written by `checkpoint.local`
    RUN/tensorboard/      with `train.tensorboard`

The number of steps is a fact of the run: given, or measured once in the first seconds of a fresh run from `train.seconds`, written to
run.json before the first real step, and never derived from a clock again. The measuring steps are thrown away, so a resumed
run is bitwise the run that was never interrupted.
"""

import errno
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from byrote.checkpoint.atomic import replace_file
from byrote.checkpoint.local import TrainingState, load_training, load_weights, save
from byrote.checkpoint.runs import latest, prune, step_folder
from byrote.config import to_dict
from byrote.data.loader import Loader
from byrote.data.packing import TokenBatch
from byrote.data.prepare import Prepared, prepare
from byrote.device import check_memory, keep_freed_memory, pick_device
from byrote.errors import CapacityError, ConfigError, TrainingError
from byrote.memory.canonical import canonical_ids
from byrote.memory.conditional import PendingRows
from byrote.memory.disk import INDEX_BYTES
from byrote.memory.heavy import HeavyHitters
from byrote.memory.place import place_table
from byrote.model.config import ModelConfig
from byrote.model.count import count_parameters, optimizer_bytes, table_bytes, table_optimizer_bytes
from byrote.model.transformer import Model
from byrote.optim.groups import OptimizerState
from byrote.optim.rowwise import state_dim
from byrote.optim.schedule import row_length
from byrote.tokenizer.bpe import Tokenizer
from byrote.train.hooks import Hook, count_ngrams, log_metrics, save_checkpoints
from byrote.train.interrupt import stop_on_interrupt
from byrote.train.loop import StepResult, Trainer
from byrote.train.metrics import Metrics
from byrote.train.run import RunConfig
from byrote.train.saved import saved_run

_WARM_STEPS = 3  # not timed when the pace is measured
_MEASURE_SHARE = 0.02  # of the budget, spent on measuring …
_MEASURE_AT_LEAST_S = 1.0
_PACE_MARGIN = 0.97  # … and kept back, as the pace of a shared machine varies

DataProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSummary:
    """What a run came to."""

    steps: int
    tokens: int
    seconds: float  # of training, over all sittings
    tokens_per_second: float
    loss: float  # last step, nats a token
    parameters: int
    memory_parameters: int
    interrupted: bool = False


class Run:
    """A run in progress: what hooks and callers may look at."""

    def __init__(self, config: RunConfig, out: Path, prepared: Prepared, device: torch.device, metrics: Metrics) -> None:
        self.out, self.prepared, self.device, self.metrics = out, prepared, device, metrics
        self.config = resolve(config, prepared.tokenizer)
        self.tokenizer = prepared.tokenizer
        self.bytes_per_token: float = prepared.facts["tokenizer"]["bytes_per_token"]
        self.total_steps = 0
        self.done = 0
        self.seconds = 0.0  # spent in steps, over all sittings
        self._before = (0, 0.0)  # tokens and seconds before this sitting
        self.model: Model
        self.trainer: Trainer
        self.loader: Loader
        self.last: StepResult
        self._pending: list[PendingRows] = []  # of the next step
        self.batches: list[TokenBatch] = []  # of the last step
        self.ngrams: HeavyHitters | None = None  # the most visited n-grams so far

    # ── building ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def start_fresh(self) -> None:
        """Model, optimizers and loader as the seed says, before step 0."""
        seed, engram = self.config.train.seed, self.config.model.engram
        rows = 1 if engram is None else state_dim(self.config.optim.table_rule, engram.head_dim)
        if hasattr(self, "model") and self.model.memory is not None:
            self.model.memory.store.close()  # a folder on disk has one writer at a time
        make_table = place_table(self.config.table, self.out / "table")
        self.model = Model(self.config.model, seed=seed, table_state_dim=rows, make_table=make_table).to(self.device)
        if self.model.memory is not None:
            if self.config.model.engram is not None and self.config.model.engram.canonical_vocab is not None:
                self.model.memory.set_canonical(_canonical(self.tokenizer)[0])
            self.model.memory.to(self.device)
        self.trainer = Trainer(self.model, self.config, self.total_steps)
        data, total = self.config.data, self.total_steps
        self.ngrams = self._sketch()
        self.loader = self.prepared.train_loader(lambda batch: row_length(batch // data.accumulate, total, data))
        self.done, self._pending = 0, []

    def _sketch(self) -> HeavyHitters | None:
        memory, capacity = self.model.memory, self.config.train.count_ngrams
        if memory is None or capacity == 0:
            return None
        return HeavyHitters(memory.hash.canonical_vocab, memory.hash.max_order, capacity)

    def fix_steps(self) -> None:
        """Decide the number of steps, once."""
        wanted, seconds = self.config.train.steps, self.config.train.seconds
        if wanted is not None:
            self.total_steps = wanted
        elif seconds is not None:
            pace_s, spent_s = self._measure_pace(seconds)
            self.total_steps = max(1, int((seconds - spent_s) * _PACE_MARGIN / pace_s))
        else:
            raise ConfigError("a run needs train.steps or train.seconds; both are none")

    def _measure_pace(self, budget_s: float) -> tuple[float, float]:
        """(median seconds a step, seconds spent), on steps that are thrown away."""
        self.total_steps = 1
        self.start_fresh()
        begin, times = time.monotonic(), list[float]()
        while len(times) < _WARM_STEPS + 3 or time.monotonic() - begin < max(_MEASURE_AT_LEAST_S, _MEASURE_SHARE * budget_s):
            start = time.monotonic()
            self._one_step(0)
            times.append(time.monotonic() - start)
        self.loader.close()
        return median(times[_WARM_STEPS:]), time.monotonic() - begin

    def _one_step(self, index: int) -> StepResult:
        """While this step is computed, the memory rows of the next are read."""
        count = self.config.data.accumulate
        pending = self._pending or self.trainer.read_ahead(self.loader.peek(count))
        self.batches = [self.loader.next_batch() for _ in range(count)]
        self._pending = self.trainer.read_ahead(self.loader.peek(count))
        return self.trainer.step(index, self.batches, pending)

    # ── going ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def go(self, hooks: Sequence[Hook], stop: threading.Event) -> None:
        """Train to the end, or to the step during which `stop` was set."""
        self._before = (self.loader.tokens_seen, self.seconds)
        while self.done < self.total_steps and not stop.is_set():
            began = time.monotonic()
            self.last = self._step_or_nothing()
            self.done += 1
            self.seconds += time.monotonic() - began
            for hook in hooks:
                hook(self.done, self)

    def _step_or_nothing(self) -> StepResult:
        """The next step. If it fails, the data too stands where it did before."""
        position = self.loader.state_dict()
        try:
            return self._one_step(self.done)
        except TrainingError:
            self.loader.load_state_dict(position)
            self._pending = []
            raise

    def tokens_per_second(self) -> float:
        """Of this sitting; steps alone."""
        tokens, seconds = self._before
        return (self.loader.tokens_seen - tokens) / max(self.seconds - seconds, 1e-9)

    def record(self, row: dict[str, Any]) -> None:
        self.metrics.write(row)

    # ── keeping ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def save(self) -> None:
        """Write a checkpoint of this moment, and delete those that are too old to keep."""
        self._save()
        prune(self.out, self.config.train.keep_checkpoints)

    def save_failure(self) -> Path:
        """Keep the state before a step that failed, beside all earlier ones: it may be damaged itself."""
        folder = step_folder(self.out, self.done)
        if latest(self.out) != folder:
            self._save()
        return folder

    def _save(self) -> None:
        optimizer = self.trainer.optimizers.state_dict()
        training = TrainingState(
            step=self.done,
            optimizer=optimizer.tensors,
            optimizer_meta=optimizer.meta,
            loop={
                "seconds": self.seconds,
                "total_steps": self.total_steps,
                "loader": self.loader.state_dict(),
                "run": to_dict(self.config),
            },
            tensors={} if self.ngrams is None else self.ngrams.state_dict(),
        )
        save(self.model, step_folder(self.out, self.done), tokenizer=self.tokenizer, training=training)

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint of this run, bitwise."""
        training = load_training(checkpoint, self.model)
        self.trainer.optimizers.load_state_dict(OptimizerState(training.optimizer, training.optimizer_meta))
        self.loader.load_state_dict(training.loop["loader"])
        self.done, self.seconds = training.step, training.loop["seconds"]
        self._pending = []
        if self.ngrams is not None and training.tensors:
            self.ngrams.load_state_dict(training.tensors)

    def write_facts(self, **more: Any) -> None:
        """run.json: everything a reader of the folder should know besides the weights."""
        facts = {
            "format": 1,
            "config": to_dict(self.config),
            "total_steps": self.total_steps,
            "facts": self.prepared.facts,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": str(self.device),
        }
        replace_file(self.out / "run.json", json.dumps(facts | more, indent=1).encode())

    def summary(self) -> TrainSummary:
        counted = count_parameters(self.config.model)
        loss = self.last.losses["next_token"].item() if hasattr(self, "last") else self._recorded_loss()
        return TrainSummary(
            steps=self.done,
            tokens=self.loader.tokens_seen,
            seconds=self.seconds,
            tokens_per_second=self.loader.tokens_seen / max(self.seconds, 1e-9),
            loss=loss,
            parameters=counted.trained,
            memory_parameters=counted.table,
            interrupted=self.done < self.total_steps,
        )

    def _recorded_loss(self) -> float:
        """Loss of the last step as an earlier sitting wrote it down; NaN if it did not."""
        row = self.metrics.last("train", self.done)
        return math.nan if row is None or row["loss"] is None else row["loss"]


def _canonical(tokenizer: Tokenizer) -> tuple[torch.Tensor, int]:
    ids, classes = canonical_ids([tokenizer.decode_one(token) for token in range(tokenizer.vocab_size)], tokenizer.token_strings())
    return ids, classes


def resolve(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """Fill in what only the tokenizer knows: vocabulary size, pad token, canonical classes."""
    model: ModelConfig = replace(config.model, vocab_size=tokenizer.vocab_size, pad_token=tokenizer.pad_id)
    if model.engram is not None:
        classes = _canonical(tokenizer)[1] if model.engram.tokenizer_compression else None
        model = replace(model, engram=replace(model.engram, canonical_vocab=classes, pad_token=tokenizer.pad_id))
    return replace(config, model=model)


def train(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    hooks: Sequence[Hook] = (),
    on_data: DataProgress | None = None,
    on_ready: Callable[[Run], None] | None = None,
) -> tuple[Run, TrainSummary]:
    """Train `config` into the folder `out`.

    With `resume`, the run in `out` goes on (its saved configuration must agree) and a finished one is returned as it is. Ctrl-C
    finishes the step, saves, and returns with `interrupted` set. Raises TrainingError when a number is not finite, after saving
    the state before that step; CapacityError for a full disk or too little RAM.
    """
    device = pick_device(config.train.device)
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    saved = saved_run(config, out) if resume else None
    checkpoint = latest(out)
    if saved is None and checkpoint is not None:
        raise ConfigError(f"{out} holds checkpoints of another run, up to {checkpoint.name}. Choose another folder, or move them away")
    _check_fits(config, device)
    with _disk_full_explained(out):
        metrics = Metrics(out, tensorboard=config.train.tensorboard)
        run = Run(config, out, prepare(config.data, out / "data", on_data), device, metrics)
        _begin(run, saved, checkpoint)
        if on_ready is not None and run.done < run.total_steps:
            on_ready(run)
        return run, _finish(run, hooks)


def _begin(run: Run, saved: dict[str, Any] | None, checkpoint: Path | None) -> None:
    """Bring the run to where it starts or goes on."""
    if saved is None:
        run.fix_steps()
        run.metrics.truncate_after(-1)
        run.write_facts()
    else:
        run.total_steps = saved["total_steps"]
    run.start_fresh()
    if checkpoint is not None:
        run.restore(checkpoint)
    elif run.config.train.start_from is not None:
        load_weights(run.config.train.start_from, run.model)
    run.metrics.truncate_after(run.done)


def _finish(run: Run, hooks: Sequence[Hook]) -> TrainSummary:
    before = run.done
    with stop_on_interrupt() as stop:
        try:
            # a checkpoint comes last: whoever resumes from it finds all that its step recorded
            run.go((count_ngrams, log_metrics, *hooks, save_checkpoints), stop)
        except TrainingError as error:
            folder = run.save_failure()
            raise TrainingError(f"{error}. The state before this step is in {folder}; delete it to resume from an earlier one") from error
        finally:
            run.loader.close()
        if run.done > before or latest(run.out) is None:
            run.save()
    summary = run.summary()
    known = asdict(summary) | {"loss": summary.loss if math.isfinite(summary.loss) else None}  # JSON has no NaN
    run.write_facts(summary=known)
    return summary


@contextmanager
def _disk_full_explained(out: Path) -> Iterator[None]:
    """Checkpoints and shards explain themselves; this is for metrics.jsonl and run.json."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CapacityError(f"the disk of {out} is full. Free some space and resume: earlier checkpoints are intact") from error


def _check_fits(config: RunConfig, device: torch.device) -> None:
    """Refuse a model that cannot fit in RAM before anything is read."""
    if device.type != "cpu":
        return
    counted = count_parameters(config.model)
    need = 8 * counted.trained + optimizer_bytes(counted, config.optim.matrix)
    table = table_bytes(config.model) + table_optimizer_bytes(config.model, config.optim.table_rule)
    if config.table.store == "disk":
        check_memory(
            need + min(table, config.table.cache_bytes) + INDEX_BYTES * sum(counted.table_rows),
            "the model, and the table's cache and index",
        )
    else:
        check_memory(need + table, "weights, gradients, optimizer state and (unless --table.store disk keeps it there) the memory table")
