"""Where a table lives, as an option: without PyTorch, so that `byrote --help` can show it. `place.py` makes the stores."""

from dataclasses import dataclass

from byrote.errors import ConfigError

STORES = ("device", "host", "disk")
OWN = "own"  # what the memory that a run was trained with goes by, beside the names of packs


@dataclass(frozen=True, kw_only=True, slots=True)
class TableConfig:
    """Where the memory table lives while it trains. A run may go on with other values: the numbers are the same."""

    store: str = "device"  # "device" (beside the model), "host" (RAM) or "disk" (more rows than RAM)
    cache_bytes: int = 1 << 28  # disk: hot rows kept in RAM
    folder: str | None = None  # disk: a folder on a fast disk; default RUN/table. On the run's own disk checkpoints cost only what changed
    read_ahead: bool = True  # host, disk: read the next batch's rows while this one is computed

    def __post_init__(self) -> None:
        if self.store not in STORES:
            raise ConfigError(f"table.store is {self.store!r}; allowed: {', '.join(STORES)}")
        if self.cache_bytes < 1:
            raise ConfigError(f"table.cache_bytes is {self.cache_bytes}; give a positive number of bytes, such as {1 << 28}")
