"""A pack: a memory as a folder you can give away, attach to the model it was made for, swap, merge and take off again.

    manifest.json         what all this is, sizes and checksums; written last
    CARD.md               the same for people, and what the pack reveals of the text it was made from
    table.bin             rows of all memory layers behind one another, nothing else (records.RowFormat)
    table.bin.leaves      checksums inside its 4 MiB blocks (blocks.py)
    layers.safetensors    "BLOCK.name": projections, gains and convolution of each memory layer
    canonical.safetensors token id → class, where the tokenizer is compressed
    top.json              the most visited n-grams as text; left out of a pack that should not show any

Opening reads the manifest and the small files, compares names and sizes, and is done: 20 GB open as fast as 20 KB. Rows are checked
when they are first read, or all at once by `verify`. The manifest's digest covers every byte of it: the text must be exactly what this
file would write for the same content. Digests find damage; whoever forges a pack can also forge them, so a signature is for whoever
passes packs on. Nothing is unpickled, nothing is executed, and no name leads out of the folder.

Two fingerprints say what a pack belongs to. `tokenizer`: token ids must mean the same, or every look-up is noise. `base`: the model
whose hidden states the gates have learnt to read; sampled (`fingerprint`), because packs are compared more often than models are hashed.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from byrote.config import from_dict, to_dict
from byrote.errors import ConfigError, MemoryPackError
from byrote.memory.blocks import LEAF_BYTES, LEAVES, Checker, count_blocks, leaf_file_bytes
from byrote.memory.file import FileTable
from byrote.memory.heavy import TopNgram
from byrote.memory.ngram import NgramHash
from byrote.memory.records import RowFormat

FORMAT = 1
MANIFEST, CARD, TABLE, LAYERS, CANONICAL, TOP = (
    "manifest.json",
    "CARD.md",
    "table.bin",
    "layers.safetensors",
    "canonical.safetensors",
    "top.json",
)
NAMES = frozenset({CARD, TABLE, TABLE + LEAVES, LAYERS, CANONICAL, TOP})  # besides the manifest
_NEEDED = NAMES - {CANONICAL, TOP}
_BY_BLOCKS = (TABLE, TABLE + LEAVES)  # their checksums are those of the blocks
ROW_DTYPES = ("float32", "bfloat16", "fp8")
_MOST_MANIFEST_BYTES = 1 << 28
_SAMPLES = 4096
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class HashSpec:
    """What `NgramHash` is made from."""

    canonical_vocab: int
    rows_per_order: int | tuple[int, ...]
    max_order: int
    num_heads: int
    layers: tuple[int, ...]  # hash ids
    pad: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleSpec:
    """What the weights of a memory layer are made for."""

    dim: int
    streams: int
    conv_kernel: int
    conv_dilation: int
    gate: str
    eps: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TableSpec:
    rows: int
    dim: int
    dtype: str  # of records.RowFormat
    counted: bool  # whether every row carries its number of visits, which merging needs
    blocks: tuple[str, ...]  # SHA-256 of each 4 MiB

    @property
    def format(self) -> RowFormat:
        return RowFormat(dim=self.dim, dtype=self.dtype, counted=self.counted)


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    name: str
    bytes: int
    sha256: str | None  # none: checked by the blocks of the table


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    format: int = FORMAT
    byrote: str  # version that wrote it
    name: str
    layers: tuple[int, ...]  # blocks of the base that the memory speaks in
    vocab_size: int
    pad_token: int
    hash: HashSpec
    module: ModuleSpec
    table: TableSpec
    tokenizer: str  # fingerprint
    base: str  # fingerprint
    provenance: str
    licence: str
    files: tuple[File, ...]


class PackFiles(NamedTuple):
    """An open pack."""

    folder: Path
    manifest: Manifest
    digest: str  # of the manifest: tells packs apart
    hash: NgramHash
    weights: dict[str, Tensor]
    canonical_V: Tensor | None
    top: list[TopNgram]
    table: FileTable
    checker: Checker


def fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over name, dtype, shape and up to 4096 evenly spaced numbers of every tensor, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda item: item[0]):
        flat = tensor.detach().reshape(-1)
        picked = flat[torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), _SAMPLES), dtype=torch.float64).long().to(flat.device)]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(picked.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- manifest ---------------------------------------------------------------------------------------------------------


def manifest_bytes(manifest: Manifest) -> bytes:
    """The only text that says this."""
    return _text(to_dict(manifest) | {"digest": _digest(to_dict(manifest))})


def _text(data: dict[str, Any]) -> bytes:
    """JSON with a line for each field."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(data[name], sort_keys=True, ensure_ascii=False)}" for name in sorted(data))
    return ("{\n" + lines + "\n}\n").encode("utf-8", "surrogatepass")


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(_text(data)).hexdigest()


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest, itself checked, and its digest. MemoryPackError names what is wrong with it."""
    raw = read_small(folder / MANIFEST, _MOST_MANIFEST_BYTES)
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise MemoryPackError(f"{folder / MANIFEST} is damaged: it is no JSON ({error}). Get the pack again") from None
    if not isinstance(data, dict) or "format" not in data:
        raise MemoryPackError(f"{folder / MANIFEST} is not the manifest of a pack: it names no format. Give the folder of a pack")
    if data["format"] != FORMAT:
        raise MemoryPackError(f"{folder}: format is {data['format']!r}; this byrote reads format {FORMAT}. Update byrote to open it")
    digest = data.pop("digest", None)
    if digest != _digest(data) or raw != _text(data | {"digest": digest}):
        raise MemoryPackError(f"{folder / MANIFEST} was altered: digest does not agree with its content. Get the pack again")
    try:
        manifest = from_dict(Manifest, data)
        _check_manifest(manifest)
    except (ConfigError, OverflowError) as error:
        raise MemoryPackError(f"{folder / MANIFEST}: {error}. Get the pack again, or update byrote") from None
    return manifest, digest


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{field} is {value!r}; it must be {allowed}")


def _check_manifest(manifest: Manifest) -> None:
    """Every number within what can be built at all. Sizes and shapes are compared later, with files and tensors."""
    hash_, module, table = manifest.hash, manifest.module, manifest.table
    within = {
        "vocab_size": (manifest.vocab_size, 1, 2**31),
        "pad_token": (manifest.pad_token, 0, manifest.vocab_size - 1),
        "hash.canonical_vocab": (hash_.canonical_vocab, 1, manifest.vocab_size),
        "hash.max_order": (hash_.max_order, 2, 64),
        "hash.num_heads": (hash_.num_heads, 1, 1024),
        "hash.pad": (hash_.pad, 0, hash_.canonical_vocab - 1),
        "hash.seed": (hash_.seed, 0, 2**63),
        "module.dim": (module.dim, 1, 2**20),
        "module.streams": (module.streams, 1, 256),
        "module.conv_kernel": (module.conv_kernel, 0, 256),
        "module.conv_dilation": (module.conv_dilation, 1, 2**16),
        "table.rows": (table.rows, 1, 2**48),
        "table.dim": (table.dim, 1, 2**14),
    }
    for field, (value, least, most) in within.items():
        _require(least <= value <= most, field, value, f"within {least}..{most}")
    for field, layers in (("layers", manifest.layers), ("hash.layers", hash_.layers)):
        fine = len(layers) == len(manifest.layers) > 0 and all(0 <= layer < 2**31 for layer in layers)
        _require(fine and len(set(manifest.layers)) == len(manifest.layers), field, layers, "a block number per memory layer, each once")
    _require(module.gate in ("soft", "hard"), "module.gate", module.gate, "'soft' or 'hard'")
    _require(math.isfinite(module.eps) and module.eps > 0, "module.eps", module.eps, "a small positive number")
    _require(table.dtype in ROW_DTYPES, "table.dtype", table.dtype, f"one of {', '.join(ROW_DTYPES)}")
    _require(table.format.bytes <= LEAF_BYTES, "table.dim", table.dim, f"small enough for rows of at most {LEAF_BYTES} bytes")
    for field, sums in (("table.blocks", table.blocks), ("tokenizer", [manifest.tokenizer]), ("base", [manifest.base])):
        wrong = next((text for text in sums if not _SHA256.fullmatch(text)), None)
        _require(wrong is None, field, wrong, "a SHA-256 in 64 hexadecimal digits")
    _check_files(manifest)
    _check_rows(manifest)


def _check_files(manifest: Manifest) -> None:
    num_bytes = manifest.table.rows * manifest.table.format.bytes
    sizes = {TABLE: num_bytes, TABLE + LEAVES: leaf_file_bytes(num_bytes)}
    blocks = len(manifest.table.blocks)
    _require(blocks == count_blocks(num_bytes), "table.blocks", f"a list of {blocks}", f"{count_blocks(num_bytes)} checksums long")
    for number, file in enumerate(manifest.files):
        field = f"files[{number}]"
        _require(Path(file.name).name == file.name, f"{field}.name", file.name, "a plain name, which does not leave the folder")
        _require(file.name in NAMES, f"{field}.name", file.name, f"one of {', '.join(sorted(NAMES))}")
        _require(
            file.bytes == sizes.get(file.name, file.bytes) >= 0, f"{field}.bytes", file.bytes, f"{sizes.get(file.name)}, as table says"
        )
        summed = file.sha256 is None if file.name in _BY_BLOCKS else bool(_SHA256.fullmatch(file.sha256 or ""))
        _require(summed, f"{field}.sha256", file.sha256, "none for the table, a SHA-256 for any other file")
    names = [file.name for file in manifest.files]
    _require(
        len(set(names)) == len(names) and set(names) >= _NEEDED, "files", names, f"a list with {', '.join(sorted(_NEEDED))}, each once"
    )


def _check_rows(manifest: Manifest) -> None:
    """Whether the hash can address that many rows at all, before its primes are looked for."""
    hash_ = manifest.hash
    sizes = (hash_.rows_per_order,) * (hash_.max_order - 1) if isinstance(hash_.rows_per_order, int) else hash_.rows_per_order
    primes = len(hash_.layers) * len(sizes) * hash_.num_heads  # all different, so their sum is at least primes² / 2
    least = max(sum(sizes) * hash_.num_heads * len(hash_.layers), primes**2 // 2)
    right = len(sizes) == hash_.max_order - 1 and min(sizes) >= 1
    _require(right and least <= manifest.table.rows, "hash.rows_per_order", hash_.rows_per_order, f"right for {manifest.table.rows} rows")


# --- opening ----------------------------------------------------------------------------------------------------------


def open_files(folder: Path) -> PackFiles:
    """Check all of a pack but its rows, which are checked as they are read. Raises MemoryPackError; close with `close_files`."""
    manifest, digest = read_manifest(folder)
    _check_listing(folder, manifest)
    small = {file.name: _read_checked(folder, file) for file in manifest.files if file.name not in _BY_BLOCKS}
    hash_ = NgramHash(**{name: getattr(manifest.hash, name) for name in HashSpec.__dataclass_fields__})
    if sum(hash_.num_rows) != manifest.table.rows:
        raise MemoryPackError(
            f"{folder}: table.rows is {manifest.table.rows:,}; the hash addresses {sum(hash_.num_rows):,}. Get the pack again"
        )
    weights, canonical_V = _tensors(folder, small, LAYERS), _canonical(folder, manifest, small)
    top = _top(folder, small)
    form = manifest.table.format
    checker = Checker(folder / TABLE, manifest.table.rows * form.bytes, manifest.table.blocks)

    def check(rows_U: Tensor) -> None:
        checker.check(rows_U * form.bytes, form.bytes)

    table = FileTable(folder / TABLE, manifest.table.rows, form, check=check)
    return PackFiles(folder, manifest, digest, hash_, weights, canonical_V, top, table, checker)


def close_files(files: PackFiles) -> None:
    """Give the open files back to the system; the pack cannot be read any more."""
    files.table.close()
    files.checker.close()


def _check_listing(folder: Path, manifest: Manifest) -> None:
    """Exactly the listed files, of the listed sizes, all of them plain files."""
    listed = {file.name: file.bytes for file in manifest.files}
    try:
        found = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder) if entry.name != MANIFEST}
    except OSError as error:
        raise MemoryPackError(f"{folder} cannot be listed: {error.strerror}. Check its permissions") from error
    for name in sorted({*listed, *found}):
        if name not in listed:
            raise MemoryPackError(f"{folder} holds {name}, which its manifest does not list under files. Move it elsewhere")
        if name not in found:
            raise MemoryPackError(f"{folder} is incomplete: {name} is missing. Get the pack again")
        if not stat.S_ISREG(found[name].st_mode):
            raise MemoryPackError(f"{folder / name} is a link or no file: a pack holds plain files, so that none leaves the folder")
        if found[name].st_size != listed[name]:
            raise MemoryPackError(
                f"{folder / name} has {found[name].st_size:,} bytes; files.bytes in the manifest says {listed[name]:,}. Get the pack again"
            )


def _read_checked(folder: Path, file: File) -> bytes:
    data = read_small(folder / file.name, file.bytes)
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise MemoryPackError(f"{folder / file.name} was altered: its sha256 is not that of the manifest. Get the pack again")
    return data


def read_small(path: Path, most: int) -> bytes:
    """The content of a plain file of at most `most` bytes."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with open(handle, "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise MemoryPackError(f"{path} cannot be read: {error.strerror}. Give the folder of a pack, which has a {MANIFEST}") from error
    if len(data) > most:
        raise MemoryPackError(f"{path} has more than the {most:,} bytes it may have. Get the pack again")
    return data


def _tensors(folder: Path, small: Mapping[str, bytes], name: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(small[name])
    except (SafetensorError, ValueError, RuntimeError, KeyError, OverflowError, TypeError) as error:
        raise MemoryPackError(f"{folder / name} is not a safetensors file of this library: {error}. Get the pack again") from None


def _canonical(folder: Path, manifest: Manifest, small: Mapping[str, bytes]) -> Tensor | None:
    if CANONICAL not in small:
        if manifest.hash.canonical_vocab != manifest.vocab_size:
            raise MemoryPackError(f"{folder}: hash.canonical_vocab is {manifest.hash.canonical_vocab}, and {CANONICAL} is missing")
        return None
    class_V = _tensors(folder, small, CANONICAL).get("canonical_V")
    if class_V is None or class_V.shape != (manifest.vocab_size,) or class_V.dtype != torch.int64:
        raise MemoryPackError(f"{folder / CANONICAL}: canonical_V must hold an int64 for each of vocab_size {manifest.vocab_size} tokens")
    low, high = (int(end) for end in torch.aminmax(class_V))
    if low < 0 or high >= manifest.hash.canonical_vocab or int(class_V[manifest.pad_token]) != manifest.hash.pad:
        raise MemoryPackError(
            f"{folder / CANONICAL}: classes span {low}..{high} and that of the pad token is {int(class_V[manifest.pad_token])}; "
            f"hash.canonical_vocab is {manifest.hash.canonical_vocab} and hash.pad {manifest.hash.pad}"
        )
    return class_V


def _top(folder: Path, small: Mapping[str, bytes]) -> list[TopNgram]:
    try:
        entries = json.loads(small.get(TOP, b"[]"))
        top = [TopNgram(entry["text"], entry["order"], entry["times"]) for entry in entries]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise MemoryPackError(f"{folder / TOP} is damaged: {error}. Get the pack again") from None
    if not all(type(entry.text) is str and type(entry.order) is int and type(entry.times) is int for entry in top):
        raise MemoryPackError(f"{folder / TOP} is damaged: an entry has a text, an order and times. Get the pack again")
    return top
