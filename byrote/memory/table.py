"""Where rows live: the `TableStore` protocol and the table in device memory.

A store knows rows by their **global** id (all memory layers behind one another), hands out the rows a batch needs as one `Slab`, and takes
the updated slab back. Nothing else touches a table: no layer, no optimizer loop, no distributed wrapper. Other stores keep the
same protocol: host.py, disk.py and file.py hold rows elsewhere; cache.py and prefetch.py wrap any of them; place.py chooses.

Whatever the store, a row that was never put has the values of `normal_rows(row, std, seed)`, zero state and zero visits.

Shapes: U unique rows, E numbers in a row, S numbers of optimizer state per row.
"""

import hashlib
import math
import mmap
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from byrote.errors import CapacityError
from byrote.kernels.counter_random import normal_rows

_FILL_CHUNK = 1 << 24  # numbers initialised at a time


class Slab(NamedTuple):
    """A batch's rows: values, optimizer state and number of updates so far."""

    vectors_UE: Tensor
    state_US: Tensor  # float32
    visits_U: Tensor  # int32


class Ticket(Protocol):
    """A read under way."""

    def wait(self) -> Slab: ...


class TableStore(Protocol):
    """Rows unique and sorted in every call, on `index_device`; slabs lie on `device`. What is put belongs to the store."""

    num_rows: int
    dim: int
    state_dim: int

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def index_device(self) -> torch.device: ...
    def gather(self, rows_U: Tensor) -> Slab: ...
    def read(self, rows_U: Tensor) -> Tensor: ...
    def prefetch(self, rows_U: Tensor) -> Ticket: ...
    def put(self, rows_U: Tensor, slab: Slab) -> None: ...
    def flush(self, generation: int) -> None: ...
    def digest(self) -> int: ...
    def to(self, device: torch.device | str) -> None: ...
    def close(self) -> None: ...


class Deferred(NamedTuple):
    """A read that is made when it is waited for."""

    store: TableStore
    rows_U: Tensor

    def wait(self) -> Slab:
        return self.store.gather(self.rows_U)


def digest_of(*facts: object) -> int:
    """An int64 that stands for plain values, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:8], "little", signed=True)


class DeviceTable:
    """The whole table in the memory of one device.

    A read is one `index_select`, so a prefetch has nothing to overlap: its ticket reads when waited for, after every earlier put.
    `std` 0 starts with zero rows.
    """

    def __init__(
        self,
        num_rows: int,
        dim: int,
        *,
        state_dim: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        std: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.num_rows, self.dim, self.state_dim = num_rows, dim, state_dim
        try:
            self.vectors_NE = _zeros((num_rows, dim), dtype, torch.device(device))
            self.state_NS = _zeros((num_rows, state_dim), torch.float32, torch.device(device))
            self.visits_N = _zeros((num_rows,), torch.int32, torch.device(device))
        except (RuntimeError, OSError, OverflowError) as error:
            need = num_rows * (dim * dtype.itemsize + 4 * state_dim + 4)
            raise CapacityError(
                f"a memory table of {num_rows:,} rows × {dim} needs {need / 1e9:.1f} GB on {device}; lower engram.rows_per_order"
            ) from error
        if std > 0:
            self._fill(std, seed)

    def _fill(self, std: float, seed: int) -> None:
        step = max(1, _FILL_CHUNK // self.dim)
        for start in range(0, self.num_rows, step):
            rows_U = torch.arange(start, min(start + step, self.num_rows), device="cpu")
            self.vectors_NE[start : start + step].copy_(normal_rows(rows_U, self.dim, std=std, seed=seed))

    @property
    def dtype(self) -> torch.dtype:
        return self.vectors_NE.dtype

    @property
    def device(self) -> torch.device:
        return self.vectors_NE.device

    @property
    def index_device(self) -> torch.device:
        return self.vectors_NE.device

    def to(self, device: torch.device | str) -> None:
        self.vectors_NE, self.state_NS, self.visits_N = (part.to(device) for part in (self.vectors_NE, self.state_NS, self.visits_N))

    def digest(self) -> int:
        """A number that tells tables with other values apart (not cryptographic). Reads the whole table."""
        bits_NE = self.vectors_NE.view(torch.int16 if self.vectors_NE.element_size() == 2 else torch.int32)
        total, step = self.num_rows * self.dim, max(1, _FILL_CHUNK // max(self.dim, 1))
        for start in range(0, self.num_rows, step):  # in parts: a sum in int64 widens what it sums
            sums_N = bits_NE[start : start + step].sum(dim=1, dtype=torch.int64)
            odd_N = 2 * torch.arange(start, start + len(sums_N), device=self.device) + 1
            total += int((sums_N * odd_N).sum())
        return (total + 2**63) % 2**64 - 2**63

    def gather(self, rows_U: Tensor) -> Slab:
        """Copies of the rows; changing them changes nothing until `put`."""
        return Slab(self.vectors_NE.index_select(0, rows_U), self.state_NS.index_select(0, rows_U), self.visits_N.index_select(0, rows_U))

    def read(self, rows_U: Tensor) -> Tensor:
        """The values alone, [U, E]."""
        return self.vectors_NE.index_select(0, rows_U)

    def prefetch(self, rows_U: Tensor) -> Ticket:
        return Deferred(self, rows_U)

    def put(self, rows_U: Tensor, slab: Slab) -> None:
        self.vectors_NE.index_copy_(0, rows_U, slab.vectors_UE)
        self.state_NS.index_copy_(0, rows_U, slab.state_US)
        self.visits_N.index_copy_(0, rows_U, slab.visits_U)

    def flush(self, generation: int) -> None:
        """Nothing to do: a table in memory becomes durable with the checkpoint that holds it."""

    def close(self) -> None:
        """Nothing to do either."""


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the CPU pages are taken when they are first written to (which `torch.zeros` does at once): a table of zeros costs what it uses."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)[:size].view(dtype).view(shape)
