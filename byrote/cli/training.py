"""What `train` and `quickstart` share: a live line while data is prepared and the model trains, and validation at the end.

Training knows neither the console nor evaluation; both are passed in from here as hooks.
"""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from byrote.console import Progress, format_bytes, format_duration

if TYPE_CHECKING:
    from byrote.train.run import RunConfig
    from byrote.train.session import Run, TrainSummary

_SMOOTH = 0.95  # of the loss shown


class LiveLine:
    """The status line of a run: loss, bits per byte, tokens/s, share of the matmul peak, time left."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._loss: float | None = None
        self._flops_per_token = 0.0
        self._peak = 0.0
        self._began = 0.0
        self._first = 0

    def data(self, stage: str, done: int, total: int) -> None:
        """Told by the data pipeline."""
        of = f" of {format_bytes(total)} ({100 * done / total:.0f} %)" if total else ""
        self._progress.update(f"{stage} {format_bytes(done)}{of}")

    def ready(self, run: "Run") -> None:
        """Told before the first step: measure what this machine could do at most."""
        import torch

        from byrote.device import matmul_peak
        from byrote.model.count import training_flops

        dtype = torch.bfloat16 if run.config.train.precision == "bf16" else torch.float32
        self._peak = matmul_peak(run.device, dtype)
        self._flops_per_token = training_flops(run.config.model, run.config.data.sequence_length)
        self._began, self._first = time.monotonic(), run.done
        self._progress.note(
            f"training: {run.total_steps} steps on {run.device}; matmul peak {self._peak / 1e9:.0f} GFLOP/s ({run.config.train.precision})"
        )

    def step(self, done: int, run: "Run") -> None:
        """The hook."""
        loss = run.last.losses["next_token"].item()
        self._loss = loss if self._loss is None else _SMOOTH * self._loss + (1 - _SMOOTH) * loss
        pace = run.tokens_per_second()
        left_s = (run.total_steps - done) * (time.monotonic() - self._began) / max(done - self._first, 1)
        self._progress.update(
            f"step {done}/{run.total_steps}  loss {self._loss:.3f}  {self._loss / math.log(2) / run.bytes_per_token:.3f} bits/byte  "
            f"{pace:,.0f} tokens/s  {100 * pace * self._flops_per_token / self._peak:.0f} % of peak  ETA {format_duration(left_s)}"
        )


class Score(NamedTuple):
    bits_per_byte: float
    tokens: int
    seconds: float


class Validator:
    """The hook that scores the validation texts every `train.eval_every` steps, and the final score."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.last: Score | None = None

    def step(self, done: int, run: "Run") -> None:
        every = run.config.train.eval_every
        if every and done % every == 0 and done < run.total_steps and run.prepared.validation:
            self.score(run)

    def score(self, run: "Run") -> Score:
        """Bits per byte of the validation texts after the last step; recorded in the metrics."""
        self.last = self._recorded(run, "validation")
        return self.last

    def score_without_memory(self, run: "Run") -> Score:
        """The same with all memory rows zeroed."""
        from byrote.eval.probes import memory_silenced

        with memory_silenced(run.model):
            return self._recorded(run, "validation_without_memory")

    def _recorded(self, run: "Run", kind: str) -> Score:
        """Computed once for each step: a finished run that is called again has its row already."""
        row = run.metrics.last(kind, run.done)
        if row is not None:
            return Score(*(row[name] for name in Score._fields))
        score = self._compute(run)
        run.record({"kind": kind, "step": run.done} | score._asdict())
        return score

    def _compute(self, run: "Run") -> Score:
        from byrote.eval.bits import bits_per_byte

        t = run.config.train
        texts = [(document.name, document.text) for document in run.prepared.validation]
        result = bits_per_byte(
            run.model, run.tokenizer, texts, context=t.eval_context, stride=t.eval_stride, device=run.device, precision=t.precision,
            progress=lambda done, total: self._progress.update(f"validating {100 * done / max(total, 1):.0f} %"),
        )  # fmt: skip
        return Score(result.bits_per_byte, result.tokens, result.seconds)


def train_with_progress(config: "RunConfig", out: Path, *, resume: bool, progress: Progress) -> tuple["Run", "TrainSummary", Validator]:
    """Train with a live line; the final validation is done unless the run was interrupted or holds no text back."""
    from byrote.train.session import train

    line, validator = LiveLine(progress), Validator(progress)
    hooks: list[Any] = [line.step, validator.step]
    run, summary = train(config, out, resume=resume, hooks=hooks, on_data=line.data, on_ready=line.ready)
    if summary.interrupted:
        progress.close(f"stopped after step {summary.steps} of {run.total_steps}; saved in {out}")
    elif run.prepared.validation:
        validator.score(run)
    return run, summary, validator
