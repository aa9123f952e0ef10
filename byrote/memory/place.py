"""Where the table lives: one option, and the stores it stands for.

    device   DeviceTable                                          everything beside the model
    host     BackgroundTable(HostTable(DeviceTable on the CPU))   the model on another device; on the CPU as device, read ahead
    disk     BackgroundTable(HostTable(CachedTable(DiskTable)))   more rows than memory

All give the same rows and, trained alike, the same bits. `read_ahead = false` leaves BackgroundTable out: one thing after another.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from byrote.memory.cache import CachedTable, cached_row_bytes
from byrote.memory.config import TableConfig
from byrote.memory.disk import INDEX_BYTES, DiskTable
from byrote.memory.host import HostTable
from byrote.memory.prefetch import BackgroundTable
from byrote.memory.records import RowFormat
from byrote.memory.segment import ID_BYTES
from byrote.memory.table import DeviceTable, TableStore

MakeTable = Callable[..., TableStore]  # (num_rows, dim, *, state_dim, dtype, std, seed)


def place_table(config: TableConfig, folder: Path) -> MakeTable:
    """What makes a table where `config` says; `folder` is for a table on disk that names no other."""
    if config.store == "device":
        return DeviceTable

    def make(*shape: int, **options: Any) -> TableStore:
        store: TableStore
        if config.store == "host":
            store = DeviceTable(*shape, **options)
        else:
            store = CachedTable(DiskTable.create(Path(config.folder or folder).expanduser(), *shape, **options), config.cache_bytes)
        return BackgroundTable(HostTable(store)) if config.read_ahead else HostTable(store)

    return make


class TableRoom(NamedTuple):
    """Bytes that a table takes where it is placed, when every row was trained."""

    device: int  # beside the model
    ram: int
    disk: int  # the newest record of every row; while out-of-date ones wait to be cleaned away up to about twice that


def table_room(config: TableConfig, num_rows: int, dim: int, *, dtype: str, state_dim: int) -> TableRoom:
    """What `place_table` would come to take."""
    form = RowFormat(dim=dim, dtype=dtype, state_dim=state_dim, counted=True)
    if config.store == "disk":
        cache = min(config.cache_bytes, num_rows * cached_row_bytes(form.tensor_dtype, dim, state_dim))
        return TableRoom(0, num_rows * INDEX_BYTES + cache, num_rows * (form.bytes + ID_BYTES))
    whole = num_rows * (form.vector_bytes + 4 * state_dim + 4)
    return TableRoom(0, whole, 0) if config.store == "host" else TableRoom(whole, 0, 0)


def innermost(store: TableStore) -> TableStore:
    """The store that holds the rows, without what is wrapped around it."""
    while (inner := getattr(store, "inner", None)) is not None:
        store = inner
    return store


def find_cache(store: TableStore) -> CachedTable | None:
    """The cache among what is wrapped around a store."""
    while not isinstance(store, CachedTable):
        if (store := getattr(store, "inner", None)) is None:  # type: ignore[assignment]
            return None
    return store
