"""Saving and loading on one machine. A checkpoint is a folder, whole or absent (`atomic.py`), checked when it is read (`manifest.py`).

    config.json                   the model's configuration
    model.safetensors             state_dict: parameters, buffers, and the marker of the table
    table.safetensors, table/     with memory: its rows, and the canonical map where there is one (tables.py)
    tokenizer/                    where one was given
    trainer.json                  ┐
    trainer.safetensors           │ with training state: what the loop must know to go on (step, loader, random numbers …),
    optimizer.safetensors         │ the optimizers' state, the rows' own optimizer state and visits
    table_state.safetensors       ┘
    manifest.json                 format, step, sizes and checksums of all these; written last

Nothing is unpickled. The table comes first, then the state_dict, whose marker must agree with the rows. A table loaded on the CPU
is mapped, not read: its rows come into memory when they are used, and copies are made of the pages that training changes.

Shapes: N rows of the table, E numbers in a row, S numbers of optimizer state per row, V vocabulary.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byrote.checkpoint.atomic import replacing_folder, standing, write_new
from byrote.checkpoint.grow import with_indexers
from byrote.checkpoint.manifest import MANIFEST, check_files, read_manifest, write_manifest
from byrote.checkpoint.packs import attach_noted, attached_packs
from byrote.checkpoint.runs import CONFIG, find_checkpoint, is_step_folder, listing, newest_complete
from byrote.checkpoint.tables import (
    FOLDER,
    TABLE,
    TABLE_STATE,
    flush_table,
    link_table,
    read_table,
    restore_table,
    saved_table,
    table_tensors,
)
from byrote.checkpoint.tensors import expect, read_tensors, tensor_bytes, tensor_file
from byrote.config import from_dict, to_dict
from byrote.device import check_disk, disk_free, give_back_freed_memory, pick_device
from byrote.errors import CapacityError, CheckpointError, ConfigError
from byrote.memory.place import MakeTable
from byrote.memory.table import DeviceTable
from byrote.model.config import ModelConfig
from byrote.model.quantize import check_weights, quantize, to_quantize
from byrote.model.transformer import Model
from byrote.tokenizer.bpe import Tokenizer

MODEL, TOKENIZER = "model.safetensors", "tokenizer"
TRAINER, TRAINER_TENSORS, OPTIMIZER = "trainer.json", "trainer.safetensors", "optimizer.safetensors"
_ALL = (CONFIG, MODEL, TABLE, FOLDER, TOKENIZER, TRAINER, TRAINER_TENSORS, OPTIMIZER, TABLE_STATE, MANIFEST)
_FP32_ROLES = ("norm", "mix", "conv", "router")  # `load(dtype=)` lowers none of these
_COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ROOM = 1 << 20  # bytes for JSON, tokenizer and file system, beside the tensors
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """What a training loop needs to go on, besides the model. `optimizer` and its meta are `Optimizers.state_dict()`."""

    step: int  # optimizer steps done
    optimizer: dict[str, Tensor]
    optimizer_meta: dict[str, Any]  # JSON
    loop: dict[str, Any]  # JSON: state of the loader, what the run is, loads …
    tensors: dict[str, Tensor] = field(default_factory=dict)  # of the loop: random number generators …


class Loaded(NamedTuple):
    model: Model
    tokenizer: Tokenizer | None


def save(model: Model, path: str | os.PathLike[str], *, tokenizer: Tokenizer | None = None, training: TrainingState | None = None) -> None:
    """Write a checkpoint to folder `path`; one that stands there is replaced. Until the end the old one stays, also under `kill -9`.

    Raises CheckpointError if something else is at `path` or writing fails, CapacityError if the disk has too little room.
    """
    if not isinstance(model, Model):
        raise ConfigError(f"byrote.save needs a byrote.Model, got {type(model).__name__}; of a wrapped model give the one inside")
    target = Path(path).expanduser().resolve()
    generations = flush_table(model, training.step if training else None)
    tensors, documents = _tensors(model, training), _documents(model, training)
    need = _ROOM + sum(tensor_bytes(tensor) for group in tensors.values() for tensor in group.values())
    with _explained(target, need):
        _check_replaceable(target)
        check_disk(target.parent, need, f"the checkpoint {target.name}")
        with replacing_folder(target) as folder:
            for name, group in tensors.items():
                write_new(folder / name, tensor_file(group))
            for name, document in documents.items():
                write_new(folder / name, [document])
            if tokenizer is not None:
                tokenizer.save(folder / TOKENIZER)
            known = link_table(model, folder)
            write_manifest(folder, step=training.step if training else None, table_generations=generations, known=known)


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    weights: str = "saved",
    verify: bool = True,
    packs: bool = True,
) -> Loaded:
    """The model of a checkpoint, or of a run's newest one, in evaluation mode, and its tokenizer (None if it has none).

    `dtype` is for matrices, embedding and head; norms, mixing, routers, buffers and table rows keep at least the precision they were
    saved in. `weights="int8"`: matrices as int8, to be served on the CPU, the rest in fp32 (`model/quantize.py`). `verify=False` skips the
    checksums (names and sizes are checked always). With `packs` those that `byrote memory attach` noted down for the run are put on. Raises
    CheckpointError, ConfigError (device, weights), MemoryPackError.
    """
    device = check_weights(weights, device)
    device = pick_device(device) if isinstance(device, str) else device
    folder = _open(path, verify)
    model = _blank(read_config(folder), saved_table(folder))
    if model.memory is not None:
        read_table(model, folder)
    tensors = read_tensors(folder / MODEL)
    expect(tensors, _state(model), str(folder / MODEL), same_dtype=False)
    is_int8 = weights == "int8"
    dtypes = _dtypes(model, tensors, dtype or torch.float32 if is_int8 else dtype)
    mapped = {f"{name}.weight" for name, _ in to_quantize(model)} if is_int8 else set()  # read once, by `quantize`
    parts = {name: saved if name in mapped else saved.to(device, dtypes[name], copy=True) for name, saved in tensors.items()}
    model.load_state_dict(parts, assign=True)
    if model.memory is not None:
        model.memory.to(device)
    tokenizer = Tokenizer.load(folder / TOKENIZER) if (folder / TOKENIZER).is_dir() else None
    if packs:
        attach_noted(model, path, attached_packs(path), tokenizer=None if tokenizer is None else tokenizer.fingerprint())
    if is_int8:
        quantize(model)
        del tensors, parts
        give_back_freed_memory()
    return Loaded(model.eval(), tokenizer)


def load_training(path: str | os.PathLike[str], model: Model, *, verify: bool = True) -> TrainingState:
    """Put weights, rows and the rows' optimizer state into `model`, and return what the loop needs to go on, bitwise.

    The model must have the saved configuration, dtypes, and `table_state_dim`. Raises CheckpointError, also if there is nothing to
    resume from because the checkpoint was saved without training state.
    """
    folder = _open(path, verify)
    if not (folder / TRAINER).is_file():
        raise CheckpointError(f"{folder} was saved without training state: it can be loaded (byrote.load), not resumed")
    _check_config(folder, model.config)
    _fill(model, folder)
    about = _read_json(folder / TRAINER)
    return TrainingState(
        step=about["step"],
        optimizer=read_tensors(folder / OPTIMIZER),
        optimizer_meta=about["optimizer"],
        loop=about["loop"],
        tensors=read_tensors(folder / TRAINER_TENSORS),
    )


def load_weights(path: str | os.PathLike[str], model: Model) -> None:
    """Put weights, rows and the rows' optimizer state of a trained model into one of the same shapes; its configuration may differ.

    A model with sparse attention may begin with the weights of one with MLA (`grow`). Raises CheckpointError naming what has another shape.
    """
    _fill(model, _open(path, verify=True), may_grow=True)


def _fill(model: Model, folder: Path, *, may_grow: bool = False) -> None:
    weights = read_tensors(folder / MODEL)
    if may_grow:
        weights = with_indexers(weights, model.state_dict())
    expect(weights, _state(model), str(folder / MODEL))
    if model.memory is not None:
        moved = restore_table(model, folder)
        weights |= {"_extra_state": model.get_extra_state()} if moved else {}  # its marker is of the form the rows had
    model.load_state_dict(weights)


# --- what is saved ----------------------------------------------------------------------------------------------------


def _tensors(model: Model, training: TrainingState | None) -> dict[str, dict[str, Tensor]]:
    """File → its tensors."""
    files: dict[str, dict[str, Tensor]] = {MODEL: model.state_dict()} | table_tensors(model, training=training is not None)
    if training is not None:
        files |= {OPTIMIZER: training.optimizer, TRAINER_TENSORS: training.tensors}
    return files


def _documents(model: Model, training: TrainingState | None) -> dict[str, bytes]:
    """File → its JSON."""
    values = {CONFIG: to_dict(model.config)}
    if training is not None:
        values[TRAINER] = {"step": training.step, "optimizer": training.optimizer_meta, "loop": training.loop}
    return {name: json.dumps(value, indent=1).encode() for name, value in values.items()}


def _check_replaceable(target: Path) -> None:
    """A folder is replaced only if it is a checkpoint, or in the place of one, and nothing else lies in it."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; name a folder for the checkpoint")
    names = set(os.listdir(target)) if target.is_dir() else set()
    ours = names <= {*_ALL} and (MANIFEST in names or is_step_folder(target))
    if names and not ours:
        raise CheckpointError(
            f"{target} is no checkpoint and is not replaced: it holds {listing(names - {*_ALL} or names)}. "
            f"Name a new folder, such as {target / 'model'}"
        )


@contextlib.contextmanager
def _explained(target: Path, need: int) -> Iterator[None]:
    """Errors of the disk say what was needed and what still stands."""
    try:
        yield
    except CapacityError as error:
        raise CapacityError(f"{error}. {_what_stands(target)}") from None
    except OSError as error:
        if error.errno in _DISK_FULL:
            free = disk_free(target.parent)
            raise CapacityError(
                f"the disk is full: the checkpoint {target} needs {need / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free. "
                f"Free some space or save to another disk. {_what_stands(target)}"
            ) from error
        raise CheckpointError(f"the checkpoint {target} could not be saved: {error}. {_what_stands(target)}") from error


def _what_stands(target: Path) -> str:
    previous = standing(target) if standing(target).is_dir() else newest_complete(target.parent)
    return f"The previous checkpoint {previous} is intact" if previous else "Nothing was changed on disk"


# --- what is loaded ---------------------------------------------------------------------------------------------------


def _open(path: str | os.PathLike[str], verify: bool) -> Path:
    folder = find_checkpoint(path)
    check_files(folder, read_manifest(folder), checksums=verify)
    return folder


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Restore the checkpoint from a copy") from error


def read_config(folder: Path) -> ModelConfig:
    """The model of a checkpoint, as it was configured. CheckpointError: of another version."""
    try:
        return from_dict(ModelConfig, _read_json(folder / CONFIG))
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG} is not the configuration of a model of this version of byrote: {error}") from error


def _check_config(folder: Path, config: ModelConfig) -> None:
    saved, ours = _flat(to_dict(read_config(folder))), _flat(to_dict(config))
    other = [f"{name} is {saved.get(name)} there, {ours.get(name)} here" for name in {**saved, **ours} if saved.get(name) != ours.get(name)]
    if other:
        raise CheckpointError(f"{folder} is of another model: {listing(other)}. Resume with the configuration of the saved run")


def _flat(values: Any, path: str = "model") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"model.a.b": 1}"""
    if not isinstance(values, dict):
        return {path: values}
    return {name: leaf for key, value in values.items() for name, leaf in _flat(value, f"{path}.{key}").items()}


def _blank(config: ModelConfig, make_table: MakeTable | None) -> Model:
    """A model to load into. Its parameters are unset and its rows zero, which costs nothing; random ones would take minutes."""
    engram = None if config.engram is None else replace(config.engram, table_std=0.0)
    model = Model(replace(config, engram=engram), seed=None, make_table=make_table or DeviceTable)
    model.config = config
    return model


def _state(model: Model) -> dict[str, Tensor]:
    """What `model.state_dict()` holds, without reading the table for the marker."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers()), "_extra_state": torch.zeros(1, dtype=torch.int64)}


def _dtypes(model: Model, weights: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Name → dtype to load it in."""
    dtypes = {name: saved.dtype for name, saved in weights.items()}
    if dtype is None:
        return dtypes
    if dtype not in _COMPUTE_DTYPES:
        raise ConfigError(f"dtype is {dtype}; allowed: {', '.join(map(str, _COMPUTE_DTYPES))}, or None for the saved ones")
    roles = model.param_roles()
    for name, saved in weights.items():
        if saved.is_floating_point():
            is_island = roles.get(name) in _FP32_ROLES or name not in roles
            dtypes[name] = torch.promote_types(saved.dtype, dtype) if is_island else dtype
    return dtypes
