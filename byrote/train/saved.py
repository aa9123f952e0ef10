"""What a folder holds of an earlier sitting, and whether this configuration may go on with it."""

import json
from pathlib import Path
from typing import Any

from byrote.config import from_dict, to_dict
from byrote.errors import CheckpointError, ConfigError
from byrote.train.run import RunConfig


def saved_run(config: RunConfig, out: Path) -> dict[str, Any] | None:
    """run.json of an earlier sitting; refuses one of another configuration."""
    try:
        saved: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{out / 'run.json'} is damaged ({error}); restore it, or train into another folder") from error
    missing = {"config", "total_steps"} - set(saved)
    if missing:
        raise CheckpointError(f"{out / 'run.json'} lacks {', '.join(sorted(missing))}; restore it, or train into another folder")
    before, now = _comparable(from_dict(RunConfig, saved["config"])), _comparable(config)
    if before != now:
        change = _first_difference(before, now)
        raise ConfigError(f"the run in {out} has another configuration: {change}. Resume with its options, or choose another --out")
    return saved


def _comparable(config: RunConfig) -> dict[str, Any]:
    """The configuration without what a run fills in or may change between sittings."""
    values: dict[str, Any] = to_dict(config)
    values.pop("table")
    for name in ("vocab_size", "pad_token"):
        values["model"].pop(name)
    if values["model"]["engram"]:
        for name in ("canonical_vocab", "pad_token"):
            values["model"]["engram"].pop(name)
    for name in ("seconds", "device", "save_every", "keep_checkpoints", "eval_every", "log_every", "tensorboard"):
        values["train"].pop(name)
    return values


def _first_difference(before: Any, now: Any, path: str = "") -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before:
            if before[key] != now.get(key):
                return _first_difference(before[key], now.get(key), f"{path}.{key}" if path else key)
    return f"{path} was {before!r}, now {now!r}"
