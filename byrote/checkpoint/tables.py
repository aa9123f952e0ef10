"""The memory table in a checkpoint, wherever it lives while it trains.

    in memory    table.safetensors         rows [N, E] in their own dtype, and the canonical map [V] where there is one
                 table_state.safetensors   with training state: the rows' optimizer state and visits
    on disk      table/                    a folder as memory/disk.py describes it, hard-linked from the table that trains: a checkpoint
                                           costs the rows that changed. Rows, state and visits are in it; table.safetensors
                                           then holds the canonical map alone.

A run may go on with its table elsewhere than it was saved: rows move from one form into the other here.

Shapes: N rows of the table, U rows of a chunk, E numbers in a row, S numbers of optimizer state per row, V vocabulary.
"""

from pathlib import Path

import torch
from torch import Tensor

from byrote.checkpoint.tensors import expect, read_tensors
from byrote.errors import CheckpointError
from byrote.memory.disk import DiskTable
from byrote.memory.host import HostTable
from byrote.memory.place import MakeTable, find_cache, innermost
from byrote.memory.table import DeviceTable, Slab, TableStore
from byrote.model.transformer import Model

TABLE, TABLE_STATE, FOLDER = "table.safetensors", "table_state.safetensors", "table"
_CHUNK = 1 << 18  # rows moved at a time


def flush_table(model: Model, step: int | None) -> tuple[int, ...]:
    """Makes the store durable as the generation of `step` (None: as the one it is); returns the generations of tables to save."""
    if model.memory is None:
        return ()
    base = innermost(model.memory.store)
    generation = step if step is not None else base.generation if isinstance(base, DiskTable) else 0
    model.memory.store.flush(generation)
    return (base.generation if isinstance(base, DiskTable) else generation,)


def table_tensors(model: Model, *, training: bool) -> dict[str, dict[str, Tensor]]:
    """File → its tensors."""
    if model.memory is None:
        return {}
    canonical_V, base = model.memory.canonical_V, innermost(model.memory.store)
    mapped = {} if canonical_V is None else {"canonical_V": canonical_V}
    if isinstance(base, DiskTable):
        return {TABLE: mapped} if mapped else {}
    dense = _dense(base)
    return {TABLE: {"vectors_NE": dense.vectors_NE} | mapped} | ({TABLE_STATE: _state(dense)} if training else {})


def link_table(model: Model, folder: Path) -> dict[str, tuple[str, ...]]:
    """A table on disk joins the checkpoint `folder`; returns the checksums of its files, which need not be taken again."""
    base = None if model.memory is None else innermost(model.memory.store)
    if not isinstance(base, DiskTable):
        return {}
    return {f"{FOLDER}/{name}": digests for name, digests in base.link_into(folder / FOLDER).items()}


def saved_table(folder: Path) -> MakeTable | None:
    """What opens the table of a checkpoint where it lies, read-only; None if its rows are in table.safetensors."""
    if not (folder / FOLDER).is_dir():
        return None

    def make(num_rows: int, dim: int, **_: object) -> TableStore:
        table = DiskTable.open(folder / FOLDER, read_only=True)
        if (table.num_rows, table.dim) != (num_rows, dim):
            raise CheckpointError(f"{folder / FOLDER} holds {table.num_rows:,} rows × {table.dim}; the model needs {num_rows:,} × {dim}")
        return HostTable(table)

    return make


def read_table(model: Model, folder: Path) -> None:
    """Rows and canonical map of a model that was built with `saved_table`; rows in memory are mapped, not read."""
    assert model.memory is not None, "only a model with memory has rows"
    vectors_NE = _read_rows(model, folder)
    if vectors_NE is not None:
        _dense(innermost(model.memory.store)).vectors_NE = vectors_NE


def restore_table(model: Model, folder: Path) -> bool:
    """Rows, their optimizer state and visits, into the store that the model has. Returns whether they had another form."""
    assert model.memory is not None, "only a model with memory has a table"
    store, base, vectors_NE = model.memory.store, innermost(model.memory.store), _read_rows(model, folder)
    if vectors_NE is None:
        return _restore_from_disk(store, folder / FOLDER)
    state = read_tensors(folder / TABLE_STATE)
    wanted = {"state_NS": torch.empty(store.num_rows, store.state_dim, device="meta")}
    wanted["visits_N"] = torch.empty(store.num_rows, dtype=torch.int32, device="meta")
    expect(state, wanted, f"{folder / TABLE_STATE} (saved under another optim.table_rule?)")
    saved = Slab(vectors_NE, state["state_NS"], state["visits_N"])
    if isinstance(base, DeviceTable):
        for whole, part in zip((base.vectors_NE, base.state_NS, base.visits_N), saved, strict=True):
            whole.copy_(part)
        return False
    for rows_U in torch.arange(store.num_rows).split(_CHUNK):
        _put_changed(store, rows_U, Slab(*(part[rows_U] for part in saved)))
    return True


def _restore_from_disk(store: TableStore, folder: Path) -> bool:
    base, cache = innermost(store), find_cache(store)
    if isinstance(base, DiskTable):
        base.adopt(folder)
        if cache is not None:
            cache.forget()
        return False
    table = DiskTable.open(folder, read_only=True)
    for name in ("num_rows", "dim", "state_dim", "dtype"):
        if getattr(table, name) != getattr(store, name):
            raise CheckpointError(f"{folder} has {name} {getattr(table, name)}; the model needs {getattr(store, name)}")
    for rows_U in torch.arange(store.num_rows).split(_CHUNK):
        store.put(rows_U.to(store.index_device), Slab(*(part.to(store.device) for part in table.gather(rows_U))))
    table.close()
    return True


def _put_changed(store: TableStore, rows_U: Tensor, saved: Slab) -> None:
    """A log holds what differs from what the store would make by itself, and no more."""
    now = store.gather(rows_U)
    differs_U = (saved.vectors_UE != now.vectors_UE).any(1) | (saved.state_US != now.state_US).any(1) | (saved.visits_U != now.visits_U)
    store.put(rows_U[differs_U], Slab(*(part[differs_U] for part in saved)))


def _read_rows(model: Model, folder: Path) -> Tensor | None:
    """The rows [N, E], mapped; None if they lie in a folder of their own. Gives the memory its canonical map."""
    assert model.memory is not None, "only a model with memory has rows"
    store, on_disk = model.memory.store, (folder / FOLDER).is_dir()
    tensors = read_tensors(folder / TABLE) if (folder / TABLE).is_file() or not on_disk else {}
    wanted = {} if on_disk else {"vectors_NE": torch.empty(store.num_rows, store.dim, dtype=store.dtype, device="meta")}
    if "canonical_V" in tensors:
        wanted["canonical_V"] = torch.empty(model.config.vocab_size, dtype=torch.int64, device="meta")
    expect(tensors, wanted, str(folder / TABLE))
    if "canonical_V" in tensors:
        model.memory.set_canonical(tensors["canonical_V"].clone())
    return tensors.get("vectors_NE")


def _dense(base: TableStore) -> DeviceTable:
    if not isinstance(base, DeviceTable):
        raise CheckpointError(f"rows in a {type(base).__name__} cannot be saved in a checkpoint; save the memory as a pack")
    return base


def _state(base: DeviceTable) -> dict[str, Tensor]:
    return {"state_NS": base.state_NS, "visits_N": base.visits_N}
