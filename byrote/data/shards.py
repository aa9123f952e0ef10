"""A tokenised corpus on disk: written once, then read through memory maps.

A shard is a folder with three files.

    tokens-<checksum>.bin     every document, one after the other: begin token, its text, end token; uint16, or uint32 for
                              vocabularies above 65,536; little-endian
    offsets-<checksum>.bin    int64: where each document starts, and one past the last token of all
    manifest.json             counts, names, sizes and SHA-256 of the two, the tokenizer's fingerprint, the key of the corpus

The two are written as `.partial` and renamed when complete and on the disk; the manifest, which names them, is replaced last.
A crash at any byte leaves the old shard or the new one, or none where there was none; leftovers go at the next writing.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from byrote.data.sources import Document
from byrote.device import check_disk
from byrote.errors import CapacityError, DataError
from byrote.tokenizer.bpe import Tokenizer

FORMAT = "byrote-shard-1"
MANIFEST = "manifest.json"
BATCH_CHARACTERS = 1 << 22  # text handed to the tokenizer at a time
BYTES_PER_TOKEN = 2  # cautious; only used to ask for disk space
HASH_BLOCK = 1 << 22


class Shard:
    """A tokenised corpus, opened for reading: nothing is loaded before it is touched."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.num_tokens: int = manifest["num_tokens"]
        self.num_documents: int = manifest["num_documents"]
        self.tokens = np.memmap(self._file("tokens"), dtype=manifest["dtype"], mode="r")
        self.offsets = np.memmap(self._file("offsets"), dtype="<i8", mode="r")

    @property
    def checksum(self) -> str:
        """SHA-256 of the tokens: two shards that share it hold the same rows."""
        return self.manifest["files"]["tokens"]["sha256"]

    def document(self, number: int) -> NDArray[np.integer]:
        """The tokens of one document, begin and end included."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]

    def verify(self) -> None:
        """Read everything and compare the checksums. Raises DataError."""
        for kind, facts in self.manifest["files"].items():
            if _sha256(self._file(kind)) != facts["sha256"]:
                raise DataError(
                    f"{self._file(kind)} is damaged: its checksum is not the manifest's; delete {self.folder} to write it again"
                )

    def _file(self, kind: str) -> Path:
        return self.folder / self.manifest["files"][kind]["name"]


def open_shard(folder: str | os.PathLike[str]) -> Shard:
    """Open what `write_shard` left. Raises DataError if it is missing, incomplete or of another format; sizes are checked, sums not."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no tokenised corpus ({error}); prepare the data again") from None
    if manifest.get("format") != FORMAT:
        raise DataError(f"{folder} has the format {manifest.get('format')!r}, this version reads {FORMAT!r}; delete it to write it again")
    for facts in manifest["files"].values():
        file = folder / facts["name"]
        size = file.stat().st_size if file.exists() else None
        if size != facts["num_bytes"]:
            got = "is missing" if size is None else f"has {size} bytes"
            raise DataError(f"{file} {got}, {facts['num_bytes']} bytes are expected; delete {folder} to write it again")
    return Shard(folder, manifest)


def find_shard(folder: str | os.PathLike[str], key: str) -> Shard | None:
    """The shard at `folder` if it is whole and was written for this `key`; None if it has to be written."""
    with contextlib.suppress(DataError):
        shard = open_shard(folder)
        return shard if shard.manifest["key"] == key else None
    return None


def write_shard(
    folder: str | os.PathLike[str],
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    key: str,
    text_bytes: int,
    progress: Callable[[int], None] | None = None,
) -> Shard:
    """Tokenise `documents` and put them at `folder` in place of what was there.

    `key` says what the shard was made from; `text_bytes` is the size of the text, for the check of the disk; `progress` is told
    the bytes of text done. Raises CapacityError if the disk is or becomes full, DataError if there is no document.
    """
    folder = Path(folder)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    check_disk(folder, text_bytes * dtype.itemsize // BYTES_PER_TOKEN, "the tokenised corpus")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        manifest = _write_files(folder, documents, tokenizer, dtype, progress)
        manifest |= {"format": FORMAT, "key": key, "tokenizer": tokenizer.fingerprint(), "vocab_size": tokenizer.vocab_size}
        _publish(folder, manifest)
    except OSError as error:
        _remove_others(folder, keep=_named_by_manifest(folder))
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(f"the disk that holds {folder} is full; free some space or choose another folder, then run again") from None
        raise
    return open_shard(folder)


def _write_files(
    folder: Path, documents: Iterable[Document], tokenizer: Tokenizer, dtype: np.dtype[Any], progress: Callable[[int], None] | None
) -> dict[str, Any]:
    offsets, text_bytes = [0], 0
    with _partial(folder / "tokens.partial") as file:
        for batch in _batches(documents):
            for ids in tokenizer.encode_batch([document.text for document in batch]):
                file.write(np.array([tokenizer.begin_id, *ids, tokenizer.end_id], dtype=dtype).tobytes())
                offsets.append(offsets[-1] + len(ids) + 2)
            text_bytes += sum(len(document.text.encode("utf-8")) for document in batch)
            if progress is not None:
                progress(text_bytes)
    if len(offsets) == 1:
        raise DataError(f"there is no document to write to {folder}; give a corpus that holds text")
    with _partial(folder / "offsets.partial") as file:
        file.write(np.array(offsets, dtype="<i8").tobytes())
    return {
        "dtype": dtype.str,
        "num_tokens": offsets[-1],
        "num_documents": len(offsets) - 1,
        "text_bytes": text_bytes,
        "files": {kind: _settle(folder / f"{kind}.partial") for kind in ("tokens", "offsets")},
    }


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Runs of documents of about BATCH_CHARACTERS together."""
    batch: list[Document] = []
    filled = 0
    for document in documents:
        batch.append(document)
        filled += len(document.text)
        if filled >= BATCH_CHARACTERS:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[BinaryIO]:
    """A new file whose bytes are on the disk, not in a buffer, when the block ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _settle(partial: Path) -> dict[str, Any]:
    """Rename a complete file to the name that its content gives it; the facts for the manifest."""
    digest = _sha256(partial)
    final = partial.with_name(f"{partial.stem}-{digest[:16]}.bin")
    partial.replace(final)
    return {"name": final.name, "num_bytes": final.stat().st_size, "sha256": digest}


def _publish(folder: Path, manifest: dict[str, Any]) -> None:
    beside = folder / "manifest.partial"
    with _partial(beside) as file:
        file.write(json.dumps(manifest, indent=2).encode("utf-8"))
    beside.replace(folder / MANIFEST)
    _remove_others(folder, keep=_named_by_manifest(folder))


def _named_by_manifest(folder: Path) -> set[str]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet: nothing to keep
        return set()
    return {MANIFEST, *(facts["name"] for facts in manifest["files"].values())}


def _remove_others(folder: Path, keep: set[str]) -> None:
    for pattern in ("*.partial", "tokens-*.bin", "offsets-*.bin"):
        for file in folder.glob(pattern):
            if file.name not in keep:
                file.unlink()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
