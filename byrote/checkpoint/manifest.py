"""The manifest: what a checkpoint consists of, byte for byte. Written last, read first.

    {"format": 1, "byrote": "0.1.0", "step": 1200, "table_generations": [1200],
     "files": [{"name": "model.safetensors", "bytes": 74128, "sha256": ["9c56…"]}, …], "checksum": "e3b0…"}

A file has one SHA-256 per 64 MiB, so that all cores can check one large table; a file of a single piece has the
number that `sha256sum` prints. `checksum` is the SHA-256 of the manifest itself, as compact JSON with sorted keys and without that field.
`table_generations` are the numbers that tables were flushed under; none for a model without memory.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byrote.checkpoint.atomic import write_new
from byrote.config import from_dict, to_dict
from byrote.device import usable_cores
from byrote.errors import CheckpointError, ConfigError
from byrote.memory.segment import PIECE_BYTES

MANIFEST = "manifest.json"
FORMAT = 1
_READ_BYTES = 1 << 20
_RESTORE = "Restore the checkpoint from a copy, or use another checkpoint of the run"


class UnknownFormat(CheckpointError):
    """A checkpoint that another version of byrote wrote."""


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    name: str  # relative to the checkpoint, with slashes
    bytes: int
    sha256: tuple[str, ...]  # of each piece


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    format: int
    byrote: str
    step: int | None  # optimizer steps behind the weights; None: saved outside a training run
    table_generations: tuple[int, ...]
    files: tuple[File, ...]


def write_manifest(
    folder: Path, *, step: int | None, table_generations: tuple[int, ...], known: Mapping[str, tuple[str, ...]] | None = None
) -> None:
    """Describe all that lies in `folder`. Checksums that are `known` are not taken again: a table on disk would be read whole."""
    sizes, known = _sizes(folder), known or {}
    digests = {**known, **_digests(folder, {name: size for name, size in sizes.items() if name not in known})}
    manifest = Manifest(
        format=FORMAT,
        byrote=sys.modules["byrote"].__version__,
        step=step,
        table_generations=table_generations,
        files=tuple(File(name=name, bytes=size, sha256=digests[name]) for name, size in sizes.items()),
    )
    data = to_dict(manifest)
    write_new(folder / MANIFEST, [json.dumps(data | {"checksum": _checksum(data)}, indent=1).encode()])


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`, itself checked. Raises UnknownFormat, or CheckpointError if it is missing or damaged."""
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. {_RESTORE}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: it is no JSON ({error}). {_RESTORE}") from error
    if not isinstance(data, dict) or "format" not in data:
        raise CheckpointError(f"{path} is not the manifest of a checkpoint: it names no format. {_RESTORE}")
    if data["format"] != FORMAT:
        raise UnknownFormat(
            f"{folder} has checkpoint format {data['format']!r}; this byrote reads format {FORMAT}. Update byrote to load it"
        )
    checksum = data.pop("checksum", None)
    if checksum != _checksum(data):
        raise CheckpointError(f"{path} was altered: its checksum does not agree with its content. {_RESTORE}")
    try:
        return from_dict(Manifest, data)
    except ConfigError as error:
        raise CheckpointError(f"{path} is damaged: {error}. {_RESTORE}") from error


def check_files(folder: Path, manifest: Manifest, *, checksums: bool = True) -> None:
    """Raise CheckpointError unless `folder` holds exactly the listed files, of the listed sizes and, if asked, bytes."""
    found, listed = _sizes(folder), {file.name: file for file in manifest.files}
    for name in sorted({*found, *listed}):
        if name not in found:
            raise CheckpointError(f"{folder} is incomplete: {name} is missing. {_RESTORE}")
        if name not in listed:
            raise CheckpointError(f"{folder} holds {name}, which its manifest does not list. Move that file elsewhere")
        if found[name] != listed[name].bytes:
            raise CheckpointError(f"{folder / name} has {found[name]:,} bytes, its manifest says {listed[name].bytes:,}. {_RESTORE}")
    digests = _digests(folder, found) if checksums else {}
    for name, digest in digests.items():
        if digest != listed[name].sha256:
            raise CheckpointError(f"{folder / name} was altered: its checksum is not that of the manifest. {_RESTORE}")


def _digests(folder: Path, sizes: dict[str, int]) -> dict[str, tuple[str, ...]]:
    """The SHA-256 of every piece of every file."""
    pieces = [(name, start) for name, size in sizes.items() for start in range(0, max(size, 1), PIECE_BYTES)]
    digests: dict[str, tuple[str, ...]] = dict.fromkeys(sizes, ())
    with ThreadPoolExecutor(usable_cores()) as pool:
        for (name, _), digest in zip(pieces, pool.map(lambda piece: _digest(folder / piece[0], piece[1]), pieces), strict=True):
            digests[name] += (digest,)
    return digests


def _digest(path: Path, start: int) -> str:
    digest, left = hashlib.sha256(), PIECE_BYTES
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while left and (block := file.read(min(left, _READ_BYTES))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _sizes(folder: Path) -> dict[str, int]:
    """Every file below `folder`, without the manifest and hidden files (a file manager's, never read): name → bytes."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(_walk(folder))
        if path.is_file() and not path.name.startswith(".") and path != folder / MANIFEST
    }


def _walk(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in names)


def _checksum(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
