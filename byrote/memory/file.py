"""A table as one flat file, read-only: row r lies at `offset` + r · bytes of a record. What packs and other finished tables use.

Nothing is read when it is opened and nothing is kept in memory per row, so a table of any size opens at once; reads are batched, joined
where rows lie near one another, and many are in flight (`kernels/file_rows`). The page cache of the system is its cache.

Shapes: U unique rows, E numbers in a row, B bytes in a record.
"""

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from byrote.errors import ConfigError, MemoryPackError
from byrote.kernels.file_rows import read_records
from byrote.memory.records import RowFormat
from byrote.memory.table import Deferred, Slab, Ticket, digest_of

_SAMPLED = 64  # rows that the digest reads


class FileTable:
    """`check(rows_U)`, where given, is called with the rows about to be read: the place to verify the blocks they lie in."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        num_rows: int,
        format: RowFormat,
        *,
        offset: int = 0,
        check: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.num_rows, self.dim, self.state_dim = num_rows, format.dim, format.state_dim
        self.path, self.format, self.offset, self.check = Path(path), format, offset, check
        with _explained(self.path):
            self._handle = os.open(self.path, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, self._handle)
        size, need = os.fstat(self._handle).st_size, offset + num_rows * format.bytes
        if size < need:
            self.close()
            raise MemoryPackError(f"{self.path} has {size:,} bytes; {num_rows:,} rows of {format.bytes} need {need:,}. Fetch it again")
        expect_random_reads(self._handle)

    @property
    def dtype(self) -> torch.dtype:
        return self.format.tensor_dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    index_device = device

    def to(self, device: torch.device | str) -> None:
        stay_on_cpu(self, device)

    def records(self, rows_U: Tensor) -> Tensor:
        """uint8 [U, B]: the rows as they lie in the file."""
        if self.check is not None:
            self.check(rows_U)
        records_UB = torch.empty(len(rows_U), self.format.bytes, dtype=torch.uint8, device="cpu")
        with _explained(self.path):
            read_records(self._handle, rows_U.numpy() * self.format.bytes + self.offset, records_UB)
        return records_UB

    def gather(self, rows_U: Tensor) -> Slab:
        return self.format.decode(self.records(rows_U))

    def read(self, rows_U: Tensor) -> Tensor:
        return self.format.decode_vectors(self.records(rows_U))

    def prefetch(self, rows_U: Tensor) -> Ticket:
        return Deferred(self, rows_U)

    def put(self, rows_U: Tensor, slab: Slab) -> None:
        raise ConfigError(f"{self.path} is read-only; copy its rows into a table that trains")

    def flush(self, generation: int) -> None:
        """Nothing changes, so nothing is to be made durable."""

    def digest(self) -> int:
        """Of the layout and of rows spread over the whole file; reading all of it would cost what opening saves."""
        rows_U = torch.linspace(0, self.num_rows - 1, min(self.num_rows, _SAMPLED), dtype=torch.float64, device="cpu").long()
        return digest_of(self.num_rows, self.format, self.records(rows_U).numpy().tobytes())


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MemoryPackError(f"{path} cannot be read: {error}. Check the disk, or get the file again") from error


def stay_on_cpu(store: object, device: torch.device | str) -> None:
    """A store whose rows lie in files hands them out on the CPU."""
    if torch.device(device).type != "cpu":
        raise ConfigError(f"{type(store).__name__} hands out rows on the CPU only; wrap it in HostTable for a model on {device}")


def expect_random_reads(handle: int) -> None:
    """Ask the system not to read ahead: neighbours of a row are hashed from unrelated text."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
