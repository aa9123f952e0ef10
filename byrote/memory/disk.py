"""A table on disk that trains: an append-only log of the rows that changed, and an index of where the newest record of each row is.

Why a log: a training step changes some ten thousand rows that lie anywhere. Written in place, each would cost a read and a write of a 4 KiB
page for 264 bytes, and a crash would find the table between two steps. Appended, they are one sequential write, and what was there
before stays.

    put        records of the rows → end of the open segment; index[row] = slot of its record        (segment.py)
    gather     slot 0: the row was never put, so it is made by the counter-based generator, without I/O
               else: slots sorted, near ones read together, many reads in flight                     (kernels/file_rows)
    flush      open segment sealed and synced; table.json, which lists all segments, written beside and renamed into place
    cleaning   when more than half of all records are out of date, every put also moves a few records that are not out of the segment
               that has fewest, until it is empty and goes; so there is never a long pause

    folder     table.json                {format, num_rows, dim, …, generation, segments: [{name, rows, live, sha256}], checksum}
               00000007.rows …           of two records of a row the one in the later segment, at the later place, counts

A generation is what table.json lists; its segments never change, so a crash at any byte leaves the last one whole, and a
checkpoint of it is a set of hard links (`link_into`): it costs the rows that changed, not the table. An empty table costs one small file.

The index is one uint32 per row of the table, in memory that the system commits only where a row was touched: 0.8 GB at most for 2·10⁸
rows, 1.5 % of a fully trained table of 64 float32. It is rebuilt from the ids in the segments when a table is opened.

Shapes: U unique rows, E numbers in a row, S numbers of state, B bytes in a record, N rows of the table.
"""

import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from byrote.errors import CapacityError, CheckpointError, ConfigError
from byrote.kernels.counter_random import normal_rows
from byrote.kernels.file_rows import pick_records
from byrote.memory.file import stay_on_cpu
from byrote.memory.records import RowFormat
from byrote.memory.segment import Segment
from byrote.memory.table import Deferred, Slab, Ticket, digest_of
from byrote.memory.table_folder import FORMAT, SUFFIX, TABLE, link, lock_folder, make_room, read_about, release, write_about

_LEAST_SEGMENT, _MOST_SEGMENTS = 1 << 26, 128  # bytes of a segment; segments of a table without anything out of date, roughly
_FEW = 64  # rows that are found and read in one call: those of a token, not of a batch
_CLEAN_PER_PUT = 2  # records looked at for each record put, while cleaning is due
INDEX_BYTES = 4  # of RAM per row of the table
_MOST_SLOTS = 2**32
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class DiskTable:
    """Make one with `create` or `open`. One writer at a time holds a folder; any number may read a finished copy."""

    def __init__(self, folder: Path, about: dict[str, Any], lock: int | None) -> None:
        self.folder, self.read_only, self._about = folder, lock is None, about
        self.num_rows, self.dim, self.state_dim = about["num_rows"], about["dim"], about["state_dim"]
        self.format = RowFormat(dim=self.dim, dtype=about["dtype"], state_dim=self.state_dim, counted=True)
        self.generation: int = about["generation"]
        self._capacity = max(1, max(_LEAST_SEGMENT, self.num_rows * self.format.bytes // _MOST_SEGMENTS) // self.format.bytes)
        try:
            self._slot_N = np.zeros(self.num_rows, np.uint32)
        except MemoryError as error:
            need = INDEX_BYTES * self.num_rows / 1e9
            raise CapacityError(f"the index of {self.num_rows:,} rows needs {need:.1f} GB of RAM; lower engram.rows_per_order") from error
        self._segments: list[Segment] = []  # in the order of the log
        self._open: Segment | None = None  # the last of them, while it takes records
        self._victim: tuple[Segment, NDArray[np.int64], int] | None = None  # being cleaned: its row ids, and how far
        self._parts_P3: NDArray[np.int64] | None = None  # of all segments, until one changes
        self._named = 0
        self._finalizer = weakref.finalize(self, release, self._segments, lock)

    # ── making and opening ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def create(
        cls, folder: str | os.PathLike[str], num_rows: int, dim: int, *, state_dim: int = 1, dtype: torch.dtype = torch.float32,
        std: float = 0.0, seed: int = 0,
    ) -> "DiskTable":  # fmt: skip
        """A table in which no row was put yet; one that stands in `folder` is replaced. ConfigError if something else lies there."""
        name = next((name for name, known in _DTYPES.items() if known == dtype), None)
        if name is None:
            raise ConfigError(f"rows of {dtype} cannot be trained on disk; allowed: {', '.join(_DTYPES)}")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        spec = {"num_rows": num_rows, "dim": dim, "state_dim": state_dim, "dtype": name, "std": std, "seed": seed}
        table = cls(folder, {"format": FORMAT, **spec, "generation": 0, "segments": []}, lock_folder(folder))
        make_room(folder)
        table._publish(0)
        return table

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, read_only: bool = False) -> "DiskTable":
        """The last generation that was made durable. Raises CheckpointError if it is missing or damaged."""
        folder = Path(folder)
        table = cls(folder, read_about(folder), None if read_only else lock_folder(folder))
        if not read_only:
            table._remove_unlisted()
        for entry in table._about["segments"]:
            table._replay(entry)
        return table

    def _replay(self, entry: dict[str, Any]) -> None:
        path, first = self.folder / entry["name"], self._free_slots(entry["rows"])
        facts = {"rows": entry["rows"], "live": entry["live"], "sha256": tuple(entry["sha256"])}
        segment = Segment.open(path, first, self.format.bytes, **facts)
        self._segments.append(segment)
        self._parts_P3 = None
        ids_U = segment.ids()
        if len(ids_U) and not 0 <= ids_U.min() <= ids_U.max() < self.num_rows:
            raise CheckpointError(f"{path} names rows outside 0..{self.num_rows - 1}: it is damaged. Resume from another checkpoint")
        self._slot_N[ids_U] = np.arange(first, segment.last, dtype=np.uint32)  # of a row that is there twice the last counts
        self._named = max(self._named, int(path.stem))

    def adopt(self, folder: Path) -> None:
        """Become the table that lies in `folder`, sharing its segments. What was put before is gone. CheckpointError: of another shape."""
        self._check_writable()
        about = read_about(folder)
        for name in ("num_rows", "dim", "state_dim", "dtype"):
            if about[name] != self._about[name]:
                raise CheckpointError(f"the table in {folder} has {name} {about[name]}; the model needs {self._about[name]}")
        self._forget_all()
        make_room(self.folder)
        self._about, self.generation = about | {"segments": []}, about["generation"]
        for entry in about["segments"]:
            link(folder / entry["name"], self.folder / entry["name"])
            self._replay(entry)
        self._about = self._publish(self.generation)

    def _forget_all(self) -> None:
        for segment in self._segments:
            segment.close()
        self._segments.clear()
        self._open = self._victim = self._parts_P3 = None
        self._slot_N = np.zeros(self.num_rows, np.uint32)

    def close(self) -> None:
        """Files and lock are given back; what was put since the last flush is gone."""
        self._parts_P3 = None
        self._finalizer()

    # ── the protocol ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def dtype(self) -> torch.dtype:
        return self.format.tensor_dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    index_device = device

    def to(self, device: torch.device | str) -> None:
        stay_on_cpu(self, device)

    def gather(self, rows_U: Tensor) -> Slab:
        slot_U = self._slot_N[rows_U.numpy()]
        written_U = slot_U > 0
        if written_U.all():
            return self.format.decode(self._records(slot_U))
        slab = Slab(self._initial(rows_U), torch.zeros(len(rows_U), self.state_dim), torch.zeros(len(rows_U), dtype=torch.int32))
        if written_U.any():
            at_U = torch.from_numpy(written_U.nonzero()[0])
            for whole, part in zip(slab, self.format.decode(self._records(slot_U[written_U])), strict=True):
                whole.index_copy_(0, at_U, part)
        return slab

    def read(self, rows_U: Tensor) -> Tensor:
        if len(rows_U) <= _FEW:
            vectors_UE = torch.empty(len(rows_U), self.dim, dtype=self.dtype, device="cpu")
            if pick_records(rows_U, self._slot_N, self._parts(), self.format.bytes, vectors_UE):
                return vectors_UE
        slot_U = self._slot_N[rows_U.numpy()]
        return self.format.decode_vectors(self._records(slot_U)) if slot_U.all() else self.gather(rows_U).vectors_UE

    def prefetch(self, rows_U: Tensor) -> Ticket:
        return Deferred(self, rows_U)

    def put(self, rows_U: Tensor, slab: Slab) -> None:
        """Rows that a failed write did not reach keep what they had."""
        self._check_writable()
        self._append(rows_U.numpy(), self.format.encode(*slab).numpy())
        budget = _CLEAN_PER_PUT * len(rows_U)
        while budget > 0 and self._is_cleaning_due() and self._choose_victim():
            budget -= self._clean(budget)

    def flush(self, generation: int) -> None:
        """What was put becomes durable under this number; the segments that only the previous generation needs are deleted afterwards."""
        if self.read_only:
            return
        self._seal()
        self._about = self._publish(generation)
        self.generation = generation
        self._remove_unlisted()

    def digest(self) -> int:
        """Of how the table began and of its generation. Rows are not read: that would cost the table; their checksums are in table.json."""
        return digest_of({key: value for key, value in self._about.items() if key not in ("segments", "generation")}, self.generation)

    # ── what else is asked of a table on disk ──────────────────────────────────────────────────────────────────────────────────

    @property
    def touched(self) -> int:
        """Rows that have a record."""
        return sum(segment.live for segment in self._segments)

    @property
    def records(self) -> int:
        """Records in all segments, those out of date included."""
        return sum(segment.rows for segment in self._segments)

    def rows_touched(self) -> Tensor:
        """int64, ascending: the rows that have a record."""
        return torch.from_numpy(self._slot_N.nonzero()[0])

    def link_into(self, folder: Path) -> dict[str, tuple[str, ...]]:
        """Make `folder` a table of its own that shares the segments of the last generation; returns the checksums of each.

        Where the file system knows no hard links, or `folder` lies on another one, segments are copied.
        """
        folder.mkdir()
        about = read_about(self.folder)
        for entry in about["segments"]:
            link(self.folder / entry["name"], folder / entry["name"])
        shutil.copyfile(self.folder / TABLE, folder / TABLE)
        return {entry["name"]: tuple(entry["sha256"]) for entry in about["segments"]}

    def verify(self) -> None:
        """Read every byte. Raises CheckpointError naming a segment that was altered."""
        for segment in self._segments:
            if segment is not self._open:
                segment.verify()

    # ── rows ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _initial(self, rows_U: Tensor) -> Tensor:
        return normal_rows(rows_U, self.dim, std=self._about["std"], seed=self._about["seed"]).to(self.dtype)

    def _records(self, slot_U: NDArray[np.uint32]) -> Tensor:
        """uint8 [U, B] of rows that have one, read in the order of the log."""
        order_U = np.argsort(slot_U)
        sorted_U = slot_U[order_U].astype(np.int64)
        records_UB = torch.empty(len(slot_U), self.format.bytes, dtype=torch.uint8)
        for segment, begin, end in self._by_segment(sorted_U):
            segment.read(sorted_U[begin:end], records_UB[begin:end])
        back_U = torch.empty(len(slot_U), dtype=torch.int64)
        back_U[torch.from_numpy(order_U)] = torch.arange(len(slot_U))
        return records_UB.index_select(0, back_U)

    def _parts(self) -> NDArray[np.int64]:
        """(first slot, slot behind the last, open file) of every segment, ascending."""
        if self._parts_P3 is None:
            parts = sorted((segment.first, segment.last, segment.handle) for segment in self._segments)
            self._parts_P3 = np.array(parts, np.int64).reshape(-1, 3)
        return self._parts_P3

    def _append(self, rows_U: NDArray[np.int64], records_UB: NDArray[np.uint8]) -> None:
        self._parts_P3 = None
        while len(rows_U):
            segment = self._open or self._new_segment()
            room = self._capacity - segment.rows
            part_U, first = rows_U[:room], segment.last
            segment.append(part_U, records_UB[:room])
            self._forget(self._slot_N[part_U])
            self._slot_N[part_U] = np.arange(first, segment.last, dtype=np.uint32)
            rows_U, records_UB = rows_U[room:], records_UB[room:]
            if segment.rows == self._capacity:
                self._seal()

    def _forget(self, slot_U: NDArray[np.uint32]) -> None:
        """These records are out of date."""
        for segment, begin, end in self._by_segment(np.sort(slot_U)):
            segment.live -= end - begin

    def _by_segment(self, sorted_U: NDArray[Any]) -> Iterator[tuple[Segment, int, int]]:
        """Which part of ascending slots lies in which segment."""
        edges = np.array([(segment.first, segment.last) for segment in self._segments], sorted_U.dtype).reshape(-1, 2)
        for segment, (begin, end) in zip(self._segments, np.searchsorted(sorted_U, edges).tolist(), strict=True):
            if begin < end:
                yield segment, begin, end

    # ── segments ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _new_segment(self) -> Segment:
        path = self.folder / f"{self._named + 1:08d}{SUFFIX}"
        self._open = Segment.create(path, self._free_slots(self._capacity), self.format.bytes)
        self._named += 1
        self._segments.append(self._open)
        return self._open

    def _free_slots(self, count: int) -> int:
        """The first of `count` slots that no segment uses; slot 0 means "none"."""
        first = 1
        for segment in sorted(self._segments, key=lambda segment: segment.first):
            if segment.first - first >= count:
                break
            first = max(first, segment.last)
        if first + count > _MOST_SLOTS:
            raise CapacityError(f"the table in {self.folder} has more than {_MOST_SLOTS:,} records; lower engram.rows_per_order")
        return first

    def _seal(self) -> None:
        if self._open is not None:
            self._open.seal()
            self._open = None

    def _is_cleaning_due(self) -> bool:
        too_many = len(self._segments) > 2 * _MOST_SEGMENTS
        return self._victim is not None or too_many or self.records > 2 * self.touched + self._capacity

    def _choose_victim(self) -> bool:
        """The sealed segment with fewest records up to date is the one to clean; whether there is one."""
        sealed = [segment for segment in self._segments if segment is not self._open]
        if self._victim is None and sealed:
            victim = min(sealed, key=lambda segment: segment.live)
            self._victim = victim, victim.ids(), 0
        return self._victim is not None

    def _clean(self, budget: int) -> int:
        """Move what is up to date out of the next `budget` records of the victim; emptied, it leaves the log. Returns how many it saw."""
        assert self._victim is not None, "choose a victim first"
        victim, ids_U, begin = self._victim
        end = min(begin + budget, victim.rows)
        slots_U = np.arange(victim.first + begin, victim.first + end)
        live_U = self._slot_N[ids_U[begin:end]] == slots_U
        self._append(ids_U[begin:end][live_U], victim.copy_of(begin, end).numpy()[live_U])
        self._victim = (victim, ids_U, end)
        if end == victim.rows:
            self._victim = None
            self._segments.remove(victim)
            self._parts_P3 = None
            victim.close()
        return end - begin

    # ── durability ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _check_writable(self) -> None:
        if self.read_only:
            raise ConfigError(f"the table in {self.folder} was opened read-only; open a copy of it to train")

    def _publish(self, generation: int) -> dict[str, Any]:
        """table.json says what the segments are now; until it is renamed, the old one counts."""
        entries = [{"name": s.path.name, "rows": s.rows, "live": s.live, "sha256": s.sha256} for s in self._segments]
        about = self._about | {"generation": generation, "segments": entries}
        write_about(self.folder, about)
        return about

    def _remove_unlisted(self) -> None:
        """Segments of a generation that is gone, or of a writer that was killed."""
        listed = {entry["name"] for entry in self._about["segments"]}
        for path in self.folder.glob(f"*{SUFFIX}"):
            if path.name not in listed:
                path.unlink()
