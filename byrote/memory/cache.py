"""Hot rows in memory, in front of any store: n-gram traffic is Zipfian, so a small part of the rows answers most reads.

Bounded in bytes, set-associative, written back. Row r may lie in any of the WAYS places of set r mod sets; what was used longest ago makes
room. (A hash table over rows would need memory that grows with the table; this needs its own bytes and no more.) With room for all rows
no two sets overflow, and the cache holds the whole table.

    gather   found: copied from here                   not found: read from the store in one call, and kept
    put      kept and marked dirty; the store hears of it when the place is needed or at `flush`, so a row that is
             updated at every step is written to a log once, not at every step

Places used by the present call are not given away in it; rows that find none are passed through. So any batch is served, also one that
is larger than the cache.

Shapes: U rows of a call, M of them not found, C places = sets · WAYS, W = WAYS.
"""

import torch
from torch import Tensor

from byrote.errors import ConfigError
from byrote.memory.table import Deferred, Slab, TableStore, Ticket

WAYS = 8
_FLUSH_ROWS = 1 << 16  # rows written to the store at a time
_NOBODY = -1


def cached_row_bytes(dtype: torch.dtype, dim: int, state_dim: int) -> int:
    """Of RAM: vector, state and visits; then row, time of last use and whether it is dirty."""
    return dim * dtype.itemsize + 4 * state_dim + 4 + 8 + 8 + 1


class CachedTable:
    """`cache_bytes` covers rows, state, visits and the directory. `hits` of `lookups` rows were found since the beginning."""

    def __init__(self, store: TableStore, cache_bytes: int) -> None:
        self.inner = store
        self.num_rows, self.dim, self.state_dim = store.num_rows, store.dim, store.state_dim
        each = cached_row_bytes(store.dtype, store.dim, store.state_dim)
        self._sets = min(cache_bytes // (each * WAYS), -(-store.num_rows // WAYS))
        if self._sets < 1:
            raise ConfigError(f"a cache of {cache_bytes:,} bytes has no room for {WAYS} rows of {each}; give at least {WAYS * each:,}")
        places, where = self._sets * WAYS, store.device
        self.cache_bytes = places * each
        self._slab = Slab(
            torch.empty(places, store.dim, dtype=store.dtype, device=where),
            torch.empty(places, store.state_dim, dtype=torch.float32, device=where),
            torch.empty(places, dtype=torch.int32, device=where),
        )
        self._row_C = torch.full((places,), _NOBODY, dtype=torch.int64, device=where)
        self._used_C = torch.zeros(places, dtype=torch.int64, device=where)  # the call that used the place last
        self._dirty_C = torch.zeros(places, dtype=torch.bool, device=where)
        self._call = self.hits = self.lookups = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / max(self.lookups, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self._slab.vectors_UE.dtype

    @property
    def device(self) -> torch.device:
        return self._row_C.device

    @property
    def index_device(self) -> torch.device:
        return self.inner.index_device

    def to(self, device: torch.device | str) -> None:
        """The store moves; the cache starts empty there."""
        if torch.device(device).type != self.device.type:
            self._write_back()
            self.inner.to(device)
            self.__init__(self.inner, self.cache_bytes)  # type: ignore[misc]

    def gather(self, rows_U: Tensor) -> Slab:
        place_U, found_U = self._find(rows_U)
        if bool(found_U.all()):
            return self._taken(place_U)
        missing_U = ~found_U
        fresh = self.inner.gather(rows_U[missing_U])
        slab = Slab(*(whole.new_empty((len(rows_U), *whole.shape[1:])) for whole in self._slab))
        for whole, held, new in zip(slab, self._taken(place_U[found_U]), fresh, strict=True):
            whole[found_U], whole[missing_U] = held, new
        self._keep(rows_U[missing_U], fresh, dirty=False)
        return slab

    def read(self, rows_U: Tensor) -> Tensor:
        return self.gather(rows_U).vectors_UE

    def prefetch(self, rows_U: Tensor) -> Ticket:
        return Deferred(self, rows_U)

    def put(self, rows_U: Tensor, slab: Slab) -> None:
        place_U, found_U = self._find(rows_U, count=False)
        if bool(found_U.all()):
            self._write(place_U, slab, dirty=True)
            return
        self._write(place_U[found_U], Slab(*(part[found_U] for part in slab)), dirty=True)
        self._keep(rows_U[~found_U], Slab(*(part[~found_U] for part in slab)), dirty=True)

    def flush(self, generation: int) -> None:
        self._write_back()
        self.inner.flush(generation)

    def forget(self) -> None:
        """The store has other rows now: what is kept here, dirty or not, means nothing any more."""
        self._row_C.fill_(_NOBODY)
        self._dirty_C.fill_(False)

    def digest(self) -> int:
        self._write_back()
        return self.inner.digest()

    def close(self) -> None:
        self.inner.close()

    # ── places ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _find(self, rows_U: Tensor, *, count: bool = True) -> tuple[Tensor, Tensor]:
        """(place of every row that is here, whether it is here). Places found count as used by this call."""
        self._call += 1
        set_U = rows_U.to(self.device) % self._sets
        match_UW = self._row_C.view(-1, WAYS).index_select(0, set_U) == rows_U.to(self.device)[:, None]
        found_U, way_U = match_UW.max(dim=1)
        place_U = set_U * WAYS + way_U
        self._used_C[place_U[found_U]] = self._call
        if count:
            self.lookups += len(rows_U)
            self.hits += int(found_U.sum())
        return place_U, found_U

    def _keep(self, rows_M: Tensor, slab: Slab, *, dirty: bool) -> None:
        """Give rows that are not here a place. What loses its place, or finds none, goes to the store first."""
        rows_M = rows_M.to(self.device)
        place_M, fits_M = self._free(rows_M % self._sets)
        place_K = place_M[fits_M]
        lost_K = place_K[self._dirty_C[place_K]]
        leaving = [(self._row_C[lost_K], self._taken(lost_K))]
        if dirty:
            leaving.append((rows_M[~fits_M], Slab(*(part[~fits_M] for part in slab))))
        self._send(torch.cat([rows for rows, _ in leaving]), [part for _, part in leaving])
        self._row_C[place_K] = rows_M[fits_M]
        self._used_C[place_K] = self._call
        self._write(place_K, Slab(*(part[fits_M] for part in slab)), dirty=dirty)

    def _free(self, set_M: Tensor) -> tuple[Tensor, Tensor]:
        """(a place for every row, whether it may be used). The k-th row of a set gets the place used k-th longest ago."""
        sorted_M, order_M = set_M.sort(stable=True)
        nth_M = torch.arange(len(set_M), device=set_M.device) - torch.searchsorted(sorted_M, sorted_M)
        used_MW, way_MW = self._used_C.view(-1, WAYS).index_select(0, sorted_M).sort(dim=1)
        column_M1 = nth_M.clamp(max=WAYS - 1)[:, None]
        fits_M = (nth_M < WAYS) & (used_MW.gather(1, column_M1)[:, 0] < self._call)
        place_M = sorted_M * WAYS + way_MW.gather(1, column_M1)[:, 0]
        return torch.empty_like(place_M).index_copy_(0, order_M, place_M), torch.empty_like(fits_M).index_copy_(0, order_M, fits_M)

    def _taken(self, place_U: Tensor) -> Slab:
        return Slab(*(part.index_select(0, place_U) for part in self._slab))

    def _write(self, place_U: Tensor, slab: Slab, *, dirty: bool) -> None:
        for whole, part in zip(self._slab, slab, strict=True):
            whole.index_copy_(0, place_U, part)
        self._dirty_C[place_U] = dirty

    # ── the store behind ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _send(self, rows_U: Tensor, parts: list[Slab]) -> None:
        if len(rows_U):
            rows_U, order_U = rows_U.sort()
            slab = Slab(*(torch.cat(pieces).index_select(0, order_U) for pieces in zip(*parts, strict=True)))
            self.inner.put(rows_U.to(self.index_device), slab)

    def _write_back(self) -> None:
        """All dirty rows, in the order of rows."""
        dirty_U = self._dirty_C.nonzero()[:, 0]
        for place_U in dirty_U[self._row_C[dirty_U].argsort()].split(_FLUSH_ROWS):
            self._send(self._row_C[place_U], [self._taken(place_U)])
            self._dirty_C[place_U] = False
