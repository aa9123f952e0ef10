"""The journal of facts beside a run, and the run whose table they are in: changed together, or not at all.

    RUN/facts.safetensors         per fact: its rows, their bits before and after; prompts, answers and the table's digest in the header
    RUN/facts.next.safetensors    only while a change is under way

A change is three steps, each whole or absent: the new journal is written as facts.next; the checkpoint is replaced; facts.next
becomes the journal. Whoever opens the run compares the digest of its table with both, and knows which one tells the truth:

    stopped after step 1      the table is the old one:   the journal counts, facts.next goes
    stopped after step 2      the table is the new one:   facts.next becomes the journal

A table that fits neither was changed by something else (training that went on): its facts can no longer be taken back exactly, and that
is said.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from byrote.checkpoint.atomic import replace_file, replacing_folder, write_new
from byrote.checkpoint.local import MODEL, load
from byrote.checkpoint.manifest import check_files, read_manifest, write_manifest
from byrote.checkpoint.packs import packs_file
from byrote.checkpoint.runs import find_checkpoint
from byrote.checkpoint.tables import TABLE, table_tensors
from byrote.checkpoint.tensors import read_tensors, tensor_file
from byrote.errors import CheckpointError, ConfigError
from byrote.graft.edit import Entry, editable_memory
from byrote.memory.table import DeviceTable

JOURNAL, NEXT = "facts.safetensors", "facts.next.safetensors"
_PARTS = ("rows_W", "before_WE", "after_WE")


class EditableRun:
    """A run or checkpoint, loaded on the CPU without packs, with its facts."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.folder = find_checkpoint(path)
        self.model, tokenizer = load(self.folder, packs=False)
        if tokenizer is None:
            raise CheckpointError(f"{path} holds a model without a tokenizer, and facts are text. Save it with one (byrote.save)")
        self.tokenizer = tokenizer
        store = editable_memory(self.model).store
        if not isinstance(store, DeviceTable):
            raise ConfigError(
                f"{path} keeps its table on disk; facts are written into tables in memory. Resume it once with --table.store device"
            )
        place = packs_file(path)
        self.journal = place.with_name(place.name.replace("packs.json", JOURNAL))
        self._next = self.journal.with_name(self.journal.name.replace(JOURNAL, NEXT))
        self.entries = self._settled(store.digest())

    def save(self, entries: Sequence[Entry]) -> None:
        """The table as it is now, and these facts as what it holds."""
        digest = editable_memory(self.model).store.digest()
        replace_file(self._next, b"".join(bytes(part) for part in _journal_file(entries, digest)))
        self._save_checkpoint()
        os.replace(self._next, self.journal)
        self.entries = list(entries)

    def _settled(self, digest: int) -> list[Entry]:
        for path in (self._next, self.journal):
            if not path.exists():
                continue
            entries, of_table = _read_journal(path)
            if of_table == digest:
                os.replace(path, self.journal)
                self._next.unlink(missing_ok=True)
                return entries
        if self.journal.exists():
            raise CheckpointError(
                f"{self.journal} tells of another table than {self.folder} holds: it was changed since. Its facts can no longer be taken "
                "back exactly; delete the journal to go on with the table as it is"
            )
        return []

    def _save_checkpoint(self) -> None:
        """The checkpoint with other rows and the marker that goes with them; all other files are the same files."""
        manifest = read_manifest(self.folder)
        check_files(self.folder, manifest, checksums=False)
        changed: dict[str, dict[str, Tensor]] = {
            TABLE: table_tensors(self.model, training=False)[TABLE],
            MODEL: read_tensors(self.folder / MODEL) | {"_extra_state": self.model.get_extra_state()},
        }
        with replacing_folder(self.folder) as fresh:
            for file in manifest.files:
                target = fresh / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                if file.name in changed:
                    write_new(target, tensor_file(changed[file.name]))
                else:
                    _same_file(self.folder / file.name, target)
            write_manifest(fresh, step=manifest.step, table_generations=manifest.table_generations)


def _same_file(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except OSError:  # a file system without links
        shutil.copyfile(old, new)


def _journal_file(entries: Sequence[Entry], digest: int) -> Any:
    tensors = {f"{number}.{part}": getattr(entry, part) for number, entry in enumerate(entries) for part in _PARTS}
    facts = [{"prompt": entry.prompt, "answer": entry.answer, "felt_bits": entry.felt_bits} for entry in entries]
    return tensor_file(tensors, {"format": "1", "digest": str(digest), "facts": json.dumps(facts)})


def _read_journal(path: Path) -> tuple[list[Entry], int]:
    tensors = {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        facts = json.loads(about["facts"])
        parts = [[tensors[f"{number}.{part}"] for part in _PARTS] for number in range(len(facts))]
        entries = [Entry(fact["prompt"], fact["answer"], fact["felt_bits"], *some) for fact, some in zip(facts, parts, strict=True)]
        return entries, int(about["digest"])
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is no journal of facts: {error}. Restore it from a copy, or delete it") from error
