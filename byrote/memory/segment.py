"""A segment: records appended to one file, then sealed and never changed again.

    NAME.rows    record of the 1st row appended │ … │ record of the n-th │ the n row ids, int64

While it is open, records are written behind one another and the ids wait in memory; `seal` writes them behind the records and forces all to
the disk. SHA-256 is taken on the way, of every 64 MiB as the checkpoint's manifest wants it, so that no byte is read a second time.
What a killed writer leaves is a file that no table lists.

Shapes: U records, B bytes in one.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from byrote.errors import CheckpointError
from byrote.kernels.file_rows import read_records
from byrote.memory.file import expect_random_reads

PIECE_BYTES = 1 << 26  # a checksum covers so much of a file
_ID = np.dtype("<i8")
ID_BYTES = _ID.itemsize


class Segment:
    """`first` is the slot of its first record: slots number all records of a table. `live`: records that are still their row's newest."""

    def __init__(self, path: Path, first: int, size: int, *, rows: int = 0, live: int = 0, sha256: tuple[str, ...] = ()) -> None:
        self.path, self.first, self.size, self.rows, self.live, self.sha256 = path, first, size, rows, live, sha256
        self._ids: list[NDArray[np.int64]] = []
        self._digest, self._digested = hashlib.sha256(), 0  # of the piece that is being written
        self.handle = -1

    @classmethod
    def create(cls, path: Path, first: int, size: int) -> "Segment":
        """An empty one to append to; `size` bytes a record."""
        segment = cls(path, first, size)
        segment._open(os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        return segment

    @classmethod
    def open(cls, path: Path, first: int, size: int, *, rows: int, live: int, sha256: tuple[str, ...]) -> "Segment":
        """A sealed one. Raises CheckpointError if its file is missing or not as long as it was."""
        segment = cls(path, first, size, rows=rows, live=live, sha256=sha256)
        try:
            segment._open(os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(
                f"the table's segment {path} cannot be opened: {error.strerror}. Resume from another checkpoint"
            ) from error
        found, listed = os.fstat(segment.handle).st_size, rows * (size + ID_BYTES)
        if found != listed:
            segment.close()
            raise CheckpointError(f"{path} has {found:,} bytes, its table lists {listed:,}. Resume from another checkpoint")
        return segment

    def _open(self, flags: int) -> None:
        self.handle = os.open(self.path, flags, 0o666)
        expect_random_reads(self.handle)

    def close(self) -> None:
        handle, self.handle = self.handle, -1
        if handle >= 0:
            os.close(handle)

    @property
    def last(self) -> int:
        """The slot behind its last record."""
        return self.first + self.rows

    def append(self, ids_U: NDArray[np.int64], records_UB: NDArray[np.uint8]) -> None:
        """If writing fails, nothing was appended."""
        self._write(records_UB, self.rows * self.size)
        self._take_digest(records_UB)
        self._ids.append(ids_U)
        self.rows += len(ids_U)
        self.live += len(ids_U)

    def seal(self) -> None:
        """The ids behind the records, and everything on the disk."""
        ids_U = self.ids().view(np.uint8)
        self._write(ids_U, self.rows * self.size)
        os.fsync(self.handle)
        self._take_digest(ids_U)
        self.sha256 += (self._digest.hexdigest(),) if self._digested or not self.sha256 else ()
        self._ids.clear()

    def ids(self) -> NDArray[np.int64]:
        """The row of every record."""
        if self._ids or not self.rows:
            return np.concatenate([np.empty(0, np.int64), *self._ids])
        return np.fromfile(self.path, _ID, self.rows, offset=self.rows * self.size).astype(np.int64, copy=False)

    def read(self, slots_U: NDArray[np.int64], records_UB: Tensor) -> None:
        """Fill `records_UB` from ascending slots of this segment."""
        read_records(self.handle, (slots_U - self.first) * self.size, records_UB)

    def copy_of(self, begin: int, end: int) -> Tensor:
        """uint8 [end − begin, B]: records in the order they were appended."""
        records_UB = torch.empty(end - begin, self.size, dtype=torch.uint8, device="cpu")
        self.read(np.arange(self.first + begin, self.first + end), records_UB)
        return records_UB

    def verify(self) -> None:
        """Raises CheckpointError unless every byte is as it was written."""
        with open(self.path, "rb") as file:
            if tuple(hashlib.sha256(piece).hexdigest() for piece in iter(lambda: file.read(PIECE_BYTES), b"")) != self.sha256:
                raise CheckpointError(f"{self.path} was altered: its checksum is not the table's. Resume from another checkpoint")

    def _write(self, block: NDArray[np.uint8], at: int) -> None:
        rest = memoryview(np.ascontiguousarray(block).reshape(-1))
        while rest:
            done = os.pwrite(self.handle, rest, at)
            rest, at = rest[done:], at + done

    def _take_digest(self, block: NDArray[np.uint8]) -> None:
        for part in self._cut(memoryview(np.ascontiguousarray(block).reshape(-1))):
            self._digest.update(part)
            self._digested += len(part)
            if self._digested == PIECE_BYTES:
                self.sha256 += (self._digest.hexdigest(),)
                self._digest, self._digested = hashlib.sha256(), 0

    def _cut(self, block: memoryview) -> Iterator[memoryview]:
        """In two where a piece ends."""
        while block:
            room = PIECE_BYTES - self._digested
            yield block[:room]
            block = block[room:]
