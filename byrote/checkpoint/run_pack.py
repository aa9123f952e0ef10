"""The memory that a run was trained with, as a pack: rows with their visits, projections, canonical map and most visited n-grams."""

import json
import os
from pathlib import Path
from typing import NamedTuple

from byrote.checkpoint.local import TABLE_STATE, TRAINER_TENSORS, load
from byrote.checkpoint.runs import find_checkpoint
from byrote.checkpoint.tensors import read_tensors
from byrote.errors import MemoryPackError
from byrote.memory.heavy import HeavyHitters
from byrote.memory.table import DeviceTable
from byrote.model.pack import Pack, PackFacts, base_fingerprint, own_memory
from byrote.tokenizer.bpe import Tokenizer


class RunPack(NamedTuple):
    pack: Pack
    tokenizer: Tokenizer
    sketch: HeavyHitters | None  # None: the run kept none


def pack_of_run(path: str | os.PathLike[str], *, name: str | None = None, provenance: str | None = None, licence: str) -> RunPack:
    """Of a run, or of one checkpoint. Raises MemoryPackError if it has no memory, or no tokenizer to say what its rows mean."""
    model, tokenizer = load(path, packs=False)
    if tokenizer is None:
        raise MemoryPackError(f"{path} holds no tokenizer, and a pack must say which token ids it reads. Save the model again with its own")
    run = _run_of(path)
    facts = PackFacts(
        name=run.name if name is None else name,
        tokenizer=tokenizer.fingerprint(),
        base=base_fingerprint(model),
        provenance=_provenance(run) if provenance is None else provenance,
        licence=licence,
    )
    pack = own_memory(model, facts)
    store, state = pack.memory.store, find_checkpoint(path) / TABLE_STATE
    if isinstance(store, DeviceTable) and state.is_file():
        store.visits_N = read_tensors(state)["visits_N"]
    return RunPack(pack, tokenizer, read_sketch(path))


def read_sketch(path: str | os.PathLike[str]) -> HeavyHitters | None:
    """The sketch of the most visited n-grams that a run kept while training; None if it kept none."""
    file = find_checkpoint(path) / TRAINER_TENSORS
    tensors = read_tensors(file) if file.is_file() else {}
    return HeavyHitters.restored(tensors) if tensors else None


def _run_of(path: str | os.PathLike[str]) -> Path:
    """The folder of the run, also where one of its checkpoints was named."""
    path = Path(path).expanduser().resolve()
    return next((folder for folder in (path, *path.parents[:2]) if (folder / "run.json").is_file()), path)


def _provenance(run: Path) -> str:
    """What run.json tells, without the paths of anybody's files."""
    file = run / "run.json"
    if not file.is_file():
        return ""
    facts = json.loads(file.read_bytes())
    tokens = facts.get("summary", {}).get("tokens")
    return f"trained with its model from recipe {facts['config']['name']}, {facts['total_steps']} steps" + (
        f", {tokens} tokens" if tokens else ""
    )
