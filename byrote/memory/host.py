"""Rows in the computer's own memory, or on its disk, for a model on another device.

The store inside works on the CPU. Slabs cross through page-locked memory and a stream of their own, so that the copy runs beside
the model's kernels; together with `BackgroundTable` all of it, the read and the crossing, happens while the last batch is computed.
On the CPU there is nothing to cross and this passes through.
"""

import torch
from torch import Tensor

from byrote.memory.table import Deferred, Slab, TableStore, Ticket


class HostTable:
    """`to` changes where slabs land; the store stays where it is. Rows are named on the CPU."""

    def __init__(self, store: TableStore, device: torch.device | str = "cpu") -> None:
        self.inner, self.device = store, torch.device(device)
        self.num_rows, self.dim, self.state_dim = store.num_rows, store.dim, store.state_dim
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def index_device(self) -> torch.device:
        return torch.device("cpu")

    def to(self, device: torch.device | str) -> None:
        self.__init__(self.inner, device)  # type: ignore[misc]

    def gather(self, rows_U: Tensor) -> Slab:
        return Slab(*self._sent(*self.inner.gather(rows_U)))

    def read(self, rows_U: Tensor) -> Tensor:
        return self._sent(self.inner.read(rows_U))[0]

    def prefetch(self, rows_U: Tensor) -> Ticket:
        return Deferred(self, rows_U)

    def put(self, rows_U: Tensor, slab: Slab) -> None:
        self.inner.put(rows_U, Slab(*(part.cpu() for part in slab)))

    def flush(self, generation: int) -> None:
        self.inner.flush(generation)

    def digest(self) -> int:
        return self.inner.digest()

    def close(self) -> None:
        self.inner.close()

    def _sent(self, *parts: Tensor) -> list[Tensor]:
        if self._stream is None:
            return [part.to(self.device) for part in parts]
        with torch.cuda.stream(self._stream):
            sent = [part.pin_memory().to(self.device, non_blocking=True) for part in parts]
        self._stream.synchronize()  # waits in the thread that reads ahead, not in the one that computes
        for part in sent:
            part.record_stream(torch.cuda.default_stream(self.device))
        return sent
