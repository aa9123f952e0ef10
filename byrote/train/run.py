"""A run in one frozen value: what is trained, on what, how, for how long.

A recipe (`byrote/recipes/`) is a function that returns a `RunConfig`; a variant is `dataclasses.replace`; the command line
sets any field as `--section.key value`. The value is saved in every checkpoint.
"""

import math
from dataclasses import dataclass, field

from byrote.data.config import DataConfig, SourceConfig
from byrote.errors import ConfigError
from byrote.memory.config import TableConfig
from byrote.model.config import ModelConfig

__all__ = ["DataConfig", "OptimConfig", "RunConfig", "SourceConfig", "TableConfig", "TrainConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Learning rates are peaks; `schedule` shapes them. Roles come from `model.param_roles()`."""

    matrix: str = "muon"  # "muon" or "adamw" for hidden matrices
    lr: float = 0.02  # matrices: after RMS matching, comparable with AdamW's
    adam_lr: float = 0.002  # embedding, head, norms, mHC
    table_lr_scale: float = 5.0  # table rows learn at adam_lr × this
    table_rule: str = "rowwise"  # one fp32 state per row; or "adam": two full moments
    table_betas: tuple[float, float] = (0.9, 0.95)
    muon_momentum: float = 0.95
    newton_schulz: str = "quintic5"  # Moonlight: five steps; or "hybrid8+2" (V4)
    muon_rms: float = 0.2  # RMS of a full-rank update (Moonlight 0.2, V4 0.18)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices, embedding, head; never norms, mHC, tables
    clip_norm: float = 1.0  # global, table rows included; 0 switches clipping off
    schedule: str = "wsd"  # "wsd" | "cosine" | "step"
    warmup_fraction: float = 0.02
    decay_fraction: float = 0.3  # wsd: share of the steps spent falling to lr × final_scale
    final_scale: float = 0.0
    step_points: tuple[float, ...] = (0.8, 0.9)  # step: at these shares of the run …
    step_scales: tuple[float, ...] = (0.316, 0.1)  # … the rate becomes lr × these

    def __post_init__(self) -> None:
        for name, allowed in (
            ("matrix", ("muon", "adamw")),
            ("table_rule", ("rowwise", "adam")),
            ("newton_schulz", ("quintic5", "hybrid8+2")),
            ("schedule", ("wsd", "cosine", "step")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"optim.{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if len(self.step_points) != len(self.step_scales):
            raise ConfigError(
                f"optim.step_points has {len(self.step_points)} values, optim.step_scales {len(self.step_scales)}; they go in pairs"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    steps: int | None = None  # fixed number of optimizer steps; None: derived once from `seconds`, then saved
    seconds: float | None = None  # wall-clock budget of training, measured in the first seconds of a fresh run
    start_from: str | None = None  # run or checkpoint whose weights, rows included, a fresh run starts with; the optimizers start anew
    precision: str = "bf16"  # "bf16" autocast with fp32 islands, or "fp32"
    device: str = "auto"  # "auto" | "cpu" | "cuda" | "mps"
    seed: int = 0
    save_every: int = 0  # steps between checkpoints; 0: only at the end, on Ctrl-C and on failure
    keep_checkpoints: int = 2
    eval_every: int = 0  # steps between validations; 0: only at the end
    eval_context: int = 1024  # tokens a validation window sees
    eval_stride: int = 512  # tokens scored per window
    log_every: int = 10  # steps between rows of metrics.jsonl; 0: only the first and last
    count_ngrams: int = 16384  # size of the sketch of the most visited n-grams, for `byrote memory top`; 0: keep none
    tensorboard: bool = False  # also write the metrics to RUN/tensorboard
    mtp_final_weight: float = 0.1  # λ of MTP once the learning rate decays (V3: 0.3, then 0.1)
    index_warmup: tuple[float, float] | None = None  # shares of the run between which indexers alone learn: dense before, sparse after

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp32"):
            raise ConfigError(f"train.precision is {self.precision!r}; allowed: bf16, fp32")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"train.steps is {self.steps}; it must be at least 1, or none with train.seconds")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ConfigError(f"train.seconds is {self.seconds:g}; give a positive number, such as 20 or 225")
        for name in ("save_every", "eval_every", "log_every", "count_ngrams"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; it must not be negative")
        if self.keep_checkpoints < 1:
            raise ConfigError(f"train.keep_checkpoints is {self.keep_checkpoints}; at least the newest one stays")
        if self.index_warmup is not None and not 0 <= self.index_warmup[0] <= self.index_warmup[1] <= 1:
            raise ConfigError(f"train.index_warmup is {self.index_warmup}; give two shares of the run in order, such as 0.6,0.7")
        if not 1 <= self.eval_stride <= self.eval_context:
            raise ConfigError(f"train.eval_stride is {self.eval_stride}; it must lie in 1..{self.eval_context} (train.eval_context)")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    name: str
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    table: TableConfig = field(default_factory=TableConfig)
