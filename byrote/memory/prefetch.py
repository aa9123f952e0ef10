"""Reading ahead: rows depend on token ids alone, so the rows of the next batch are read while this one is computed.

One thread does all that the store inside is asked to, in the order it was asked. That alone makes it right: the store sees one caller, and
every read finds the puts before it. A ticket, though, is usually read *before* the put of the step that runs meanwhile and
waited for *after* it. So tickets that are out remember later puts, and `wait` lays them over what was read:

    caller   prefetch(rows of batch 2) · compute batch 1 · put(rows of batch 1) ·············· wait(): batch 2 as of after the put
    thread   read ······················                   write ····················         (not waited for: the ticket has the values)

`gather` and `read` are done at once by the caller while the thread has nothing to do (decoding a token at a time must not pay for two
changes of thread). A put that fails raises at the next call. Without this wrapper everything works the same, one after another: the twin.

Shapes: U unique rows of a call.
"""

import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from byrote.memory.table import Slab, TableStore

Result = TypeVar("Result")

_PUTS_WAITING = 2  # more would only fill memory with slabs: the disk is slower than the training


class BackgroundTable:
    """Wraps any store; for one calling thread."""

    def __init__(self, store: TableStore) -> None:
        self.inner = store
        self.num_rows, self.dim, self.state_dim = store.num_rows, store.dim, store.state_dim
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="table")
        self._work_alone()
        self._puts: deque[Future[None]] = deque()
        self._newest: Future[object] | None = None
        self._tickets: weakref.WeakSet[ReadAhead] = weakref.WeakSet()

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def index_device(self) -> torch.device:
        return self.inner.index_device

    def to(self, device: torch.device | str) -> None:
        self._now(self.inner.to, device)

    def gather(self, rows_U: Tensor) -> Slab:
        return self._now(self.inner.gather, rows_U)

    def read(self, rows_U: Tensor) -> Tensor:
        return self._now(self.inner.read, rows_U)

    def prefetch(self, rows_U: Tensor) -> "ReadAhead":
        self._raise_failed()
        ticket = ReadAhead(rows_U, self._later(self.inner.gather, rows_U))
        self._tickets.add(ticket)
        return ticket

    def put(self, rows_U: Tensor, slab: Slab) -> None:
        self._raise_failed(_PUTS_WAITING - 1)
        for ticket in self._tickets:
            ticket.puts.append((rows_U, slab))
        self._puts.append(self._later(self.inner.put, rows_U, slab))

    def flush(self, generation: int) -> None:
        self._raise_failed(0)  # no generation without a row that was put
        self._now(self.inner.flush, generation)

    def digest(self) -> int:
        return self._now(self.inner.digest)

    def close(self) -> None:
        """Finish what was begun, end the thread, close the store."""
        self._thread.shutdown()
        self.inner.close()

    def _work_alone(self) -> None:
        """The thread only copies rows; a team of OpenMP threads of its own would fight with the caller's over the cores."""
        threads = torch.get_num_threads()
        self._thread.submit(torch.set_num_threads, 1).result()
        torch.set_num_threads(threads)  # what threads that begin later find

    def _later(self, work: "Callable[..., Result]", *arguments: object) -> "Future[Result]":
        future = self._thread.submit(work, *arguments)
        self._newest = future  # type: ignore[assignment]
        return future

    def _now(self, work: "Callable[..., Result]", *arguments: object) -> Result:
        """After all that was asked before."""
        if self._newest is None or self._newest.done():
            self._raise_failed()
            return work(*arguments)
        result = self._later(work, *arguments).result()
        self._raise_failed()
        return result

    def _raise_failed(self, leave: int = _PUTS_WAITING) -> None:
        """Look at puts that are through, and wait until no more than `leave` are not."""
        while self._puts and (len(self._puts) > leave or self._puts[0].done()):
            self._puts.popleft().result()


class ReadAhead:
    """A read under way, and the puts it must not miss."""

    def __init__(self, rows_U: Tensor, read: "Future[Slab]") -> None:
        self.rows_U, self._read = rows_U, read
        self.puts: list[tuple[Tensor, Slab]] = []

    def wait(self) -> Slab:
        """As of after every put before this call."""
        slab = self._read.result()
        for rows_P, put in self.puts:
            overlay(self.rows_U, slab, rows_P, put)
        self.puts.clear()
        return slab


def overlay(rows_U: Tensor, slab: Slab, rows_P: Tensor, put: Slab) -> None:
    """Where ascending `rows_U` and `rows_P` hold the same row, `slab` takes what was put."""
    if not len(rows_U) or not len(rows_P):
        return
    at_P = torch.searchsorted(rows_U, rows_P).clamp_(max=len(rows_U) - 1)
    from_P = (rows_U[at_P] == rows_P).nonzero()[:, 0]
    for whole, part in zip(slab, put, strict=True):
        to_U = at_P[from_P].to(whole.device)
        whole.index_copy_(0, to_U, part.index_select(0, from_P.to(part.device)))
