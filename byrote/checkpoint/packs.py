"""Packs on the disk: written beside and renamed, opened without reading their rows, and noted down for a run.

    save_pack(pack, folder)      ──►  manifest.json CARD.md table.bin …      (`memory/pack.py` says what they hold)
    open_pack(folder)            ──►  Pack, rows in the file
    RUN/packs.json               which packs `byrote.load(RUN)` attaches, and whether the run's own memory speaks

packs.json notes the digest of each pack's manifest, so that another pack at the same place is not taken for the one that was attached.
"""

import contextlib
import errno
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from byrote.checkpoint.atomic import replace_file, replacing_folder, standing, write_new
from byrote.checkpoint.runs import CHECKPOINTS, is_run
from byrote.checkpoint.tensors import tensor_bytes, tensor_file
from byrote.config import from_dict, to_dict
from byrote.device import check_disk
from byrote.errors import CapacityError, ConfigError, MemoryPackError
from byrote.memory.blocks import LEAVES, Sums, blocks, leaf_file_bytes
from byrote.memory.card import card_text
from byrote.memory.config import OWN
from byrote.memory.heavy import TopNgram
from byrote.memory.host import HostTable
from byrote.memory.pack import (
    CANONICAL,
    CARD,
    LAYERS,
    MANIFEST,
    TABLE,
    TOP,
    File,
    Manifest,
    PackFiles,
    manifest_bytes,
    open_files,
    read_manifest,
)
from byrote.memory.table import DeviceTable, TableStore
from byrote.model.pack import Pack, PackFacts, attach, manifest_of, own_memory, pack_from
from byrote.model.transformer import Model

PACKS = "packs.json"
ROWS_AT_ONCE = 1 << 15
_ROOM = 1 << 20  # bytes for card, manifest and file system
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

Report = Callable[[int, int], None]


def _say_nothing(done: int, total: int) -> None:
    pass


class Contents:
    """All of a pack that its manifest does not say: `records` are the rows of table.bin, uint8 [U, B], in order.

    `card` gives more sections for CARD.md, and is asked when all records were written.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        canonical_V: Tensor | None,
        records: Iterable[Tensor],
        top: Sequence[TopNgram] = (),
        card: Callable[[], str] = str,
    ) -> None:
        self.weights, self.canonical_V, self.records, self.top, self.card = weights, canonical_V, records, top, card


# --- writing ----------------------------------------------------------------------------------------------------------


def save_pack(
    pack: Pack,
    path: str | os.PathLike[str],
    *,
    card: str = "",
    top: Sequence[TopNgram] = (),
    overwrite: bool = False,
    report: Report = _say_nothing,
) -> Path:
    """Write a pack to folder `path`, rows with their visits and without optimizer state. `card`: more sections for CARD.md.

    Raises MemoryPackError if something stands in the way, CapacityError if the disk has too little room; then nothing has changed.
    """
    manifest = manifest_of(pack, sys.modules["byrote"].__version__)
    manifest = replace(manifest, table=replace(manifest.table, dtype=_DTYPES[pack.memory.store.dtype]))
    records = (
        manifest.table.format.encode(slab.vectors_UE.cpu(), visits_U=slab.visits_U.cpu())
        for slab in map(pack.memory.store.gather, _all_rows(pack.memory.store))
    )
    contents = Contents(pack.layers.state_dict(), pack.memory.canonical_V, records, top, lambda: card)
    return write_pack(Path(path), manifest, contents, overwrite=overwrite, report=report)


def _all_rows(store: TableStore) -> Iterator[Tensor]:
    for start in range(0, store.num_rows, ROWS_AT_ONCE):
        yield torch.arange(start, min(start + ROWS_AT_ONCE, store.num_rows), device=store.index_device)


def write_pack(path: Path, manifest: Manifest, contents: Contents, *, overwrite: bool = False, report: Report = _say_nothing) -> Path:
    """Write `contents`, whose sizes and checksums `manifest` need not hold yet."""
    target = path.expanduser().resolve()
    _check_replaceable(target, overwrite)
    total = manifest.table.rows * manifest.table.format.bytes
    need = _ROOM + total + leaf_file_bytes(total) + sum(map(tensor_bytes, contents.weights.values())) + 8 * manifest.vocab_size
    with _explained(target):
        check_disk(target.parent, need, f"the pack {target.name}")
        with replacing_folder(target) as folder:
            sums: Sums = []
            write_new(folder / TABLE, _counted(blocks(_raw(contents.records), sums), total, report))
            write_new(folder / (TABLE + LEAVES), [b"".join(leaves for _, leaves in sums)])
            manifest = replace(manifest, table=replace(manifest.table, blocks=tuple(sum_ for sum_, _ in sums)))
            for name, data in _small_files(manifest, contents).items():
                write_new(folder / name, [data])
            write_new(folder / MANIFEST, [manifest_bytes(replace(manifest, files=_listed(folder)))])
    return target


def _raw(records: Iterable[Tensor]) -> Iterator[memoryview]:
    for records_UB in records:
        yield records_UB.numpy().data.cast("B") if len(records_UB) else memoryview(b"")


def _counted(parts: Iterable[bytes], total: int, report: Report) -> Iterator[bytes]:
    done = 0
    for part in parts:
        yield part
        done += len(part)
        report(done, total)


def _small_files(manifest: Manifest, contents: Contents) -> dict[str, bytes]:
    files = {
        LAYERS: b"".join(map(bytes, tensor_file(contents.weights))),
        CARD: card_text(manifest, contents.top, contents.card()).encode("utf-8", "replace"),
    }
    if contents.canonical_V is not None:
        files[CANONICAL] = b"".join(map(bytes, tensor_file({"canonical_V": contents.canonical_V})))
    if contents.top:
        files[TOP] = json.dumps([entry._asdict() for entry in contents.top], indent=1).encode()
    return files


def _listed(folder: Path) -> tuple[File, ...]:
    return tuple(
        File(
            name=path.name,
            bytes=path.stat().st_size,
            sha256=None if path.name.startswith(TABLE) else hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.iterdir())
    )


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise MemoryPackError(f"{target} exists. Name another folder, or replace it with --overwrite (overwrite=True)")
    try:
        read_manifest(target)
    except MemoryPackError as error:
        raise MemoryPackError(f"{target} is not replaced, as it is no whole pack: {error}") from None


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    stands = f"{target} is what it was" if target.exists() else "Nothing was changed on disk"
    try:
        yield
    except CapacityError as error:
        raise CapacityError(f"{error}. {stands}") from None
    except OSError as error:
        kind = CapacityError if error.errno in (errno.ENOSPC, errno.EDQUOT) else MemoryPackError
        raise kind(f"the pack {target} could not be written: {error}. {stands}") from error


# --- opening ----------------------------------------------------------------------------------------------------------


def open_pack_files(path: str | os.PathLike[str]) -> PackFiles:
    """The pack as files, for whoever needs no model: its manifest, list of n-grams, rows."""
    return open_files(_pack_folder(path))


def _pack_folder(path: str | os.PathLike[str]) -> Path:
    folder = standing(Path(path).expanduser())
    if not folder.is_dir():
        raise MemoryPackError(f"{path} {'is a file' if folder.exists() else 'does not exist'}. Give the folder of a pack")
    if is_run(folder):
        raise MemoryPackError(f"{path} is a run or a checkpoint, and no pack. Its memory becomes one by: byrote memory pack {path} OUT")
    return folder


def open_pack(path: str | os.PathLike[str], *, device: str | torch.device = "cpu", in_memory: bool = False) -> Pack:
    """A pack, checked but for its rows, which stay in the file, read-only, and are checked as they are read.

    With `in_memory` they, and their visits, are copied into a table that can be trained. Raises MemoryPackError.
    """
    return _pack(open_pack_files(path), torch.device(device), in_memory)


def _pack(files: PackFiles, device: torch.device, in_memory: bool = False) -> Pack:
    if not in_memory:
        return pack_from(files, HostTable(files.table, device))
    store = DeviceTable(files.table.num_rows, files.table.dim, dtype=files.table.dtype)
    for rows_U in _all_rows(files.table):
        store.put(rows_U, files.table.gather(rows_U)._replace(state_US=torch.zeros(len(rows_U), store.state_dim)))
    store.to(device)
    return pack_from(files, store)


# --- packs of a run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Attached:
    """A pack that belongs to a run until it is detached."""

    name: str
    path: str  # from the folder that packs.json lies in
    digest: str  # of the manifest
    any_base: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AttachedPacks:
    format: int = 1
    own: bool = True  # whether the memory the run was trained with speaks
    packs: tuple[Attached, ...] = ()


def packs_file(path: str | os.PathLike[str]) -> Path:
    """Where the packs of a run are noted down, or those of a checkpoint that belongs to none."""
    path = Path(path).expanduser().resolve()
    if path.parent.name == CHECKPOINTS:
        path = path.parent.parent
    return path / PACKS if standing(path / CHECKPOINTS).is_dir() else path.with_name(f"{path.name}.{PACKS}")


def attached_packs(path: str | os.PathLike[str]) -> AttachedPacks:
    """What is noted down for a run; nothing, if nothing was ever attached."""
    file = packs_file(path)
    try:
        noted = from_dict(AttachedPacks, json.loads(file.read_bytes()))
    except FileNotFoundError:
        return AttachedPacks()
    except (OSError, ValueError, ConfigError) as error:
        raise MemoryPackError(f"{file} is damaged: {error}. Delete it, and attach the packs again") from error
    if noted.format != 1:
        raise MemoryPackError(f"{file}: format is {noted.format}; this byrote reads format 1. Update byrote")
    return noted


def note_packs(path: str | os.PathLike[str], packs: AttachedPacks) -> None:
    """Change what is noted down, in one piece."""
    replace_file(packs_file(path), json.dumps(to_dict(packs), indent=1).encode())


def note_for(path: str | os.PathLike[str], pack: str | os.PathLike[str], name: str | None, *, any_base: bool) -> Attached:
    """The entry for a pack that lies in folder `pack`."""
    folder = Path(pack).expanduser().resolve()
    manifest, digest = read_manifest(_pack_folder(pack))
    name = manifest.name if name is None else name
    if name == OWN:
        raise MemoryPackError(f"{OWN!r} is the memory a run was trained with, so no pack can go by that name; give another with --name")
    where = os.path.relpath(folder, packs_file(path).parent)
    return Attached(name=name, path=where, digest=digest, any_base=any_base)


def attach_noted(model: Model, path: str | os.PathLike[str], noted: AttachedPacks, *, tokenizer: str | None = None) -> None:
    """Put on what is noted down for the run. Raises MemoryPackError if a pack is gone, is another one now, or does not fit."""
    device = model.embed.weight.device
    if not noted.own and model.memory is not None:
        own_memory(model, PackFacts(name="own", tokenizer="", base=""), take_off=True)
    for entry in noted.packs:
        folder = packs_file(path).parent / entry.path
        try:
            files = open_pack_files(folder)
        except MemoryPackError as error:
            raise MemoryPackError(f"{error}. It is attached as {entry.name!r}: byrote memory detach {path} {entry.name}") from error
        if files.digest != entry.digest:
            raise MemoryPackError(
                f"{folder} is another pack than the one attached as {entry.name!r}: its digest is {files.digest[:12]}…, that was "
                f"{entry.digest[:12]}…. To take it: byrote memory swap {path} {entry.name} {folder}"
            )
        attach(model, _pack(files, device), entry.name, tokenizer=tokenizer, any_base=entry.any_base)
