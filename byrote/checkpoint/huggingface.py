"""DeepSeek models in and out: a folder of the Hugging Face form, or transformers' own class in memory.

    folder       import_hf ──► Model ──► export_hf           no transformers needed; MTP included
    hf_model     from_transformers ──► Model ──► to_transformers

Numbers are moved, never computed with: every tensor keeps its dtype and bits, there and back; FP8 and FP4 codes alone are decoded when
they are read (`coded_tensors`). What each architecture calls things is in `architectures`, files are in `safetensors_folder`. Reading a
folder needs memory for the model and one file, which is mapped, writing one for nothing beyond the model.
"""

import errno
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byrote.checkpoint.architectures import ARCHITECTURES, RELEASE, TRANSFORMERS, Architecture, reading, writing
from byrote.checkpoint.atomic import replacing_folder, standing
from byrote.checkpoint.coded_tensors import Coded, decoded
from byrote.checkpoint.runs import listing
from byrote.checkpoint.safetensors_folder import (
    DTYPES,
    INDEX,
    WHOLE_DTYPES,
    Header,
    file_names,
    read_headers,
    read_json,
    shards,
    stream,
    write_json,
    write_shards,
)
from byrote.checkpoint.tensors import tensor_bytes
from byrote.checkpoint.v3_config import mtp_layers
from byrote.checkpoint.v3_names import Piece
from byrote.device import check_disk, check_memory
from byrote.errors import CapacityError, CheckpointError, ConfigError
from byrote.model.config import ModelConfig
from byrote.model.init import without_storage
from byrote.model.transformer import Model
from byrote.tokenizer.bpe import CONFIG_FILE as TOKENIZER_CONFIG_FILE
from byrote.tokenizer.bpe import TOKENIZER_FILE, Tokenizer

CONFIG_FILE = "config.json"
MAX_SHARD_BYTES = 5 * 1000**3
OLDEST_TRANSFORMERS = (5, 17)

Report = Callable[[str], None]


def _say_nothing(status: str) -> None:
    pass


# --- transformers' class in memory ------------------------------------------------------------------------------------


def from_transformers(hf_model: Any) -> Model:
    """The same model as one of transformers' `architectures`, in its dtypes and on its device; nothing is shared with it.

    Their classes hold no MTP modules, whatever the configuration announces, so the result has none. They give the embedding of its
    pad_token_id no gradient; here that row trains like any other. ConfigError for configurations byrote cannot honour,
    CheckpointError for tensors that do not fit them.
    """
    data = {**hf_model.config.to_dict(), "num_nextn_predict_layers": 0}
    architecture, tensors = reading(data), hf_model.state_dict()
    config = architecture.read(data)
    pieces = architecture.layouts[TRANSFORMERS](config)
    model = _skeleton(config)
    _check_names(pieces, tensors, "the model")
    _check_shapes(pieces, model, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, "the model")
    return _filled(model, pieces, tensors.items()).train(hf_model.training)


def to_transformers(model: Model) -> Any:
    """The same model in transformers' class for it, in its dtypes and on its device; nothing is shared with it.

    The class has no place for MTP modules: they are left out with a warning; `export_hf` writes them. ConfigError names every
    part that the class cannot express, or says how to install transformers.
    """
    architecture = writing(model.config)
    architecture.check_expressible(model.config)
    transformers = require_transformers()
    if model.mtp:
        warnings.warn(f"transformers' class holds no MTP modules: {len(model.mtp)} left out (export_hf writes them)", stacklevel=2)
    config = replace(model.config, mtp=None)
    hf_config = getattr(transformers, f"{architecture.name}Config").from_dict(architecture.write(config, _dtype_name(model)))
    with torch.device("meta"):
        hf_model = getattr(transformers, f"{architecture.name}ForCausalLM")(hf_config)
    ours = model.state_dict()
    tensors = {piece.name: piece.of(ours[piece.target]).detach().clone() for piece in architecture.layouts[TRANSFORMERS](config)}
    hf_model.load_state_dict(tensors, strict=True, assign=True)
    for name, module in list(hf_model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # rotary tables, which are in no state_dict
            hf_model.set_submodule(name, type(module)(hf_config).to(model.embed.weight.device))
    return hf_model.train(model.training)


def require_transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError("this needs transformers, which is not installed: pip install byrote[hf]") from None
    version = transformers.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRANSFORMERS:
        raise ConfigError(f"transformers is {version}; byrote exchanges models with 5.17 and later: pip install --upgrade byrote[hf]")
    return transformers


# --- a folder → Model -------------------------------------------------------------------------------------------------


class Inspected(NamedTuple):
    """What an import of a folder will bring. No weight has been read."""

    config: ModelConfig
    pieces: list[Piece]
    headers: dict[str, Header]  # of coded tensors as they are once decoded
    coded: dict[str, Coded]
    dtypes: list[str]  # of the files
    num_parameters: int
    num_bytes: int  # of the model
    has_tokenizer: bool
    notes: list[str]  # what will not come along


def inspect_hf(folder: str | Path, *, report: Report = _say_nothing) -> Inspected:
    """Check configuration, names, shapes and dtypes; `report` hears how far it is. ConfigError, CheckpointError: what is in the way."""
    folder = standing(Path(folder).expanduser())
    data = read_json(folder / CONFIG_FILE)
    architecture = reading(data)
    config, stored, unknown = architecture.read(data), read_headers(folder, report), architecture.ignored_keys(data)
    notes = [f"{CONFIG_FILE} has keys byrote does not know, whose meaning is lost: {', '.join(unknown)}"] if unknown else []
    if config.mtp and not any(name.startswith(_mtp_prefixes(config)) for name in stored):
        notes.append(f"{CONFIG_FILE} announces {mtp_layers(data)} MTP layers and the files hold none: imported without")
        config = architecture.read({**data, "num_nextn_predict_layers": 0})
    pieces, model = _layout(architecture, config, stored), _skeleton(config)
    headers, coded = decoded(stored, {piece.name for piece in pieces}, data, str(folder))
    _check_names(pieces, headers, str(folder))
    _check_shapes(pieces, model, {name: header.shape for name, header in headers.items()}, str(folder))
    _check_dtypes(pieces, model, headers, str(folder))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return Inspected(
        config=config,
        pieces=pieces,
        headers=headers,
        coded=coded,
        dtypes=sorted({header.dtype for header in stored.values()}),
        num_parameters=num_parameters,
        num_bytes=_num_bytes(pieces, headers),
        has_tokenizer=(folder / TOKENIZER_FILE).exists(),
        notes=notes,
    )


def import_hf(folder: str | Path, *, report: Report = _say_nothing) -> Model:
    """Read a folder of one of the `architectures` into a model on the CPU, tensor by tensor; `report` hears how far it is.

    Raises what `inspect_hf` raises, before any weight is read, and CapacityError if the model does not fit into memory.
    """
    folder = standing(Path(folder).expanduser())
    found = inspect_hf(folder, report=report)
    check_memory(found.num_bytes, f"importing {folder}")
    pieces = found.pieces
    copies = {piece.name for piece in pieces if piece.is_copy and piece.name in found.headers}
    names = [name for name in found.headers if name not in copies]
    model = _filled(_skeleton(found.config), pieces, _counted(_read(folder, found, names), len(names), report))
    _check_copies(model, pieces, _read(folder, found, copies))
    return model


def _layout(architecture: Architecture, config: ModelConfig, given: Iterable[str]) -> list[Piece]:
    """That whose names more of the given tensors have than any other's."""
    names = set(given)
    layouts = [pieces(config) for pieces in architecture.layouts.values()]
    return max(layouts, key=lambda pieces: len(names & {piece.name for piece in pieces}))


def _read(folder: Path, found: Inspected, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, decoded, in the order of the files."""
    scales = {name: (way.file, way.scale) for name, way in found.coded.items()}
    for name, tensor, scale in stream(folder, {name: found.headers[name] for name in names}, scales):
        yield name, tensor if scale is None else found.coded[name].decode(tensor, scale)


def import_tokenizer(folder: str | Path, config: ModelConfig) -> Tokenizer:
    """The folder's tokenizer. DataError if byrote cannot use it, CheckpointError if it has more tokens than the model."""
    tokenizer = Tokenizer.load(folder)
    _check_vocabulary(tokenizer, config)
    return tokenizer


def _skeleton(config: ModelConfig) -> Model:
    """The modules without storage."""
    with without_storage():
        return Model(config)


def _filled(model: Model, pieces: list[Piece], tensors: Iterable[tuple[str, Tensor]]) -> Model:
    """Give the skeleton its numbers. A router's bias stays fp32, in which its small steps are not lost."""
    by_name = {piece.name: piece for piece in pieces}
    shapes, ours = model.state_dict(), {}
    for name, tensor in tensors:
        piece = by_name[name]
        if piece.target not in ours:
            dtype = torch.float32 if piece.target.endswith("ffn.bias") else tensor.dtype
            ours[piece.target] = torch.empty(shapes[piece.target].shape, dtype=dtype, device=tensor.device)
        piece.of(ours[piece.target]).copy_(tensor)
    model.load_state_dict(shapes | ours, strict=True, assign=True)
    return model


def _counted(tensors: Iterable[tuple[str, Tensor]], total: int, report: Report) -> Iterable[tuple[str, Tensor]]:
    for number, (name, tensor) in enumerate(tensors, start=1):
        report(f"reading tensor {number} of {total}: {name}")
        yield name, tensor


def _num_bytes(pieces: list[Piece], headers: Mapping[str, Header]) -> int:
    """Of the model, which holds no copies."""
    owned = (headers[piece.name] for piece in pieces if not piece.is_copy)
    return sum(math.prod(header.shape) * (DTYPES | WHOLE_DTYPES)[header.dtype].itemsize for header in owned)


def _mtp_prefixes(config: ModelConfig) -> tuple[str, ...]:
    """V4's, and V3's: blocks behind the last."""
    return ("mtp.", *(f"model.layers.{config.num_layers + depth}." for depth in range(config.mtp.depth if config.mtp else 0)))


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_names(pieces: list[Piece], given: Iterable[str], where: str) -> None:
    """Copies may be absent: they say nothing new."""
    known, needed, given = {p.name for p in pieces}, {p.name for p in pieces if not p.is_copy}, set(given)
    problems = [f"missing {name}" for name in needed - given] + [f"unknown {name}" for name in given - known]
    if problems:
        raise CheckpointError(
            f"the tensors of {where} are not those of the model its configuration describes: {listing(problems)}; "
            f"check {CONFIG_FILE}'s counts of layers, experts and MTP layers, and whether the folder is whole"
        )


def _check_shapes(pieces: list[Piece], model: Model, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    tensors = model.state_dict()
    wanted = {piece.name: tuple(piece.of(tensors[piece.target]).shape) for piece in pieces if piece.name in shapes}
    wrong = [f"{name} has shape {shapes[name]}, not {shape}" for name, shape in wanted.items() if shapes[name] != shape]
    if wrong:
        raise CheckpointError(f"{where} does not fit its configuration: {listing(wrong)}; check the widths in {CONFIG_FILE}")


def _check_dtypes(pieces: list[Piece], model: Model, headers: Mapping[str, Header], where: str) -> None:
    """One dtype for each of our tensors, and one that byrote computes in (whole numbers where ours are)."""
    first: dict[str, str] = {}
    tensors, problems = model.state_dict(), []
    for piece in pieces:
        allowed = DTYPES if tensors[piece.target].is_floating_point() else WHOLE_DTYPES
        dtype = headers[piece.name].dtype if piece.name in headers else next(iter(allowed))
        if dtype not in allowed:
            problems.append(f"{piece.name} is {dtype}")
        elif not piece.is_copy and first.setdefault(piece.target, dtype) != dtype:
            problems.append(f"{piece.name} is {dtype} and what it is joined with {first[piece.target]}")
    if problems:
        raise CheckpointError(
            f"{where} has dtypes byrote cannot take: {listing(problems)}; convert the weights to one of {', '.join(DTYPES)} first"
        )


def _check_copies(model: Model, pieces: list[Piece], copies: Iterable[tuple[str, Tensor]]) -> None:
    by_name, ours = {piece.name: piece for piece in pieces}, model.state_dict()
    different = []
    for name, tensor in copies:
        shared = ours[by_name[name].target]
        if tensor.dtype != shared.dtype or not torch.equal(tensor, shared):
            different.append(name)
    if different:
        raise CheckpointError(
            f"{listing(different)} differ from the model's own embedding or head, and byrote's MTP modules share those; "
            "set num_nextn_predict_layers to 0 and remove these layers to import the model without them"
        )


def _check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}; they do not belong to one another"
        )


# --- Model → a folder -------------------------------------------------------------------------------------------------


class Export(NamedTuple):
    """What an export writes. The tensors are views of the model's."""

    config: dict[str, Any]
    shards: list[dict[str, Tensor]]
    files: list[str]

    @property
    def num_tensors(self) -> int:
        return sum(map(len, self.shards))

    @property
    def num_bytes(self) -> int:
        return sum(tensor_bytes(tensor) for shard in self.shards for tensor in shard.values())


def plan_export(model: Model, tokenizer: Tokenizer | None, *, layout: str = RELEASE, max_shard_bytes: int = MAX_SHARD_BYTES) -> Export:
    """What `export_hf` would write. ConfigError names every part that the architecture cannot express."""
    architecture = writing(model.config)
    if layout not in (RELEASE, TRANSFORMERS):
        raise ConfigError(f"layout is {layout!r}; byrote writes {RELEASE!r} and {TRANSFORMERS!r}")
    ids = (None, None) if tokenizer is None else (tokenizer.begin_id, tokenizer.end_id)
    config = architecture.write(model.config, _dtype_name(model), *ids)
    if tokenizer is not None:
        _check_vocabulary(tokenizer, model.config)
    ours = model.state_dict()
    pieces = architecture.layouts[layout](model.config)
    left_out = ours.keys() - {piece.target for piece in pieces} - {"_extra_state"}
    if left_out:
        raise ConfigError(f"layout {layout!r} has no place for {listing(left_out)}; {RELEASE!r} has, and transformers reads that too")
    tensors = {piece.name: piece.of(ours[piece.target]) for piece in pieces}
    parts = shards(tensors, max_shard_bytes)
    files = [CONFIG_FILE, *file_names(len(parts)), *([INDEX] if len(parts) > 1 else [])]
    return Export(config, parts, files + ([] if tokenizer is None else [TOKENIZER_FILE, TOKENIZER_CONFIG_FILE]))


def export_hf(
    model: Model,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    *,
    layout: str = RELEASE,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    report: Report = _say_nothing,
) -> Export:
    """Write config.json, safetensors and tokenizer files; returns what was written.

    `layout` "release" has the names of DeepSeek's own files, MTP included, "transformers" those of its class's state_dict. The
    folder appears, or is replaced, whole or not at all. ConfigError if no architecture can express the model or the folder may not be
    replaced, CapacityError if the disk is too small.
    """
    plan = plan_export(model, tokenizer, layout=layout, max_shard_bytes=max_shard_bytes)
    folder = check_target(folder, overwrite)
    check_disk(folder, plan.num_bytes, f"exporting to {folder}")
    with _explained(folder), replacing_folder(folder) as beside:
        write_shards(beside, plan.shards, report)
        if tokenizer is not None:
            tokenizer.save(beside)
        write_json(beside / CONFIG_FILE, plan.config)
    return plan


def check_target(folder: str | Path, overwrite: bool = False) -> Path:
    """The absolute path of a folder that may be written: absent, empty, or with `overwrite` one that holds such a model."""
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder that does not exist yet")
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    if not overwrite:
        raise ConfigError(f"{folder} is not empty; name another folder, or replace the export in it with --overwrite (overwrite=True)")
    if not (folder / CONFIG_FILE).exists() or read_json(folder / CONFIG_FILE).get("model_type") not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise ConfigError(f"{folder} is not empty and holds no {known} model, so it is not overwritten; name another folder")
    return folder


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Errors of the disk in words of the tree."""
    try:
        yield
    except OSError as error:
        kind = CapacityError if error.errno in (errno.ENOSPC, errno.EDQUOT) else CheckpointError
        raise kind(f"{folder} could not be written: {error}; what was there is unchanged. Free space or name another folder") from error


def _dtype_name(model: Model) -> str:
    return str(model.embed.weight.dtype).removeprefix("torch.")
