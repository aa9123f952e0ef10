"""Where the table lives: one option, and the stores it stands for.

    device   DeviceTable                                          everything beside the model
    host     BackgroundTable(HostTable(DeviceTable on the CPU))   the model on another device; on the CPU as device, read ahead
    disk     BackgroundTable(HostTable(CachedTable(DiskTable)))   more rows than memory

All give the same rows and, trained alike, the same bits. `read_ahead = false` leaves BackgroundTable out: one thing after another.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from byrote.memory.cache import CachedTable
from byrote.memory.config import TableConfig
from byrote.memory.disk import DiskTable
from byrote.memory.host import HostTable
from byrote.memory.prefetch import BackgroundTable
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
