"""Where text comes from: every kind of corpus as one stream of named documents.

    a folder          each text file below it is a document, named by its relative path; see `list_files` for what is passed over
    a text file       one document, or several where `separator` names the line that parts them
    .jsonl .jsonl.gz  one document a line, the text under `text_key`      (also .json, if it holds one object a line)
    .parquet          one document a row, the text in column `text_key`   (needs the extra `data`)
    hf:NAME[:SPLIT]   a Hugging Face dataset, split "train" by default    (needs the extra `data`)
    python-stdlib     the Python standard library of this machine: see corpus.py

Readers are iterators: a corpus never has to fit in memory, one document does. What cannot be read stops the reading with an
error when it was named by the user, and is counted in a `Tally` when it merely lay in a folder.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from byrote.config import nearest
from byrote.data import corpus, records
from byrote.data.config import SourceConfig
from byrote.data.files import list_files
from byrote.errors import DataError

HEAD_BYTES = 8192  # a zero byte in here makes a file binary
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
GZIP_MARK = b"\x1f\x8b"
JSON_LINES = (".jsonl", ".jsonl.gz")


class Document(NamedTuple):
    """One text. The name is the same on every machine: a relative path, or a file name and a line number."""

    name: str
    text: str


@dataclass(slots=True)
class Tally:
    """What a reading met, counted while its iterator runs."""

    documents: int = 0
    text_bytes: int = 0  # UTF-8, of the documents
    empty: int = 0  # documents without a character
    binary: int = 0  # files of a folder that are no text
    not_utf8: int = 0  # files of a folder in another encoding
    plain_json: int = 0  # JSON-lines files of a folder without the text key, read as plain text

    def remarks(self) -> str:
        """What a user should know of the reading, in words; "" if there is nothing."""
        counts = (
            (self.binary, "binary files skipped"),
            (self.not_utf8, "files skipped that are not UTF-8"),
            (self.empty, "empty documents skipped"),
            (self.plain_json, "JSON-lines files without the text key read as plain text"),
        )
        return ", ".join(f"{count} {what}" for count, what in counts if count)


def read_documents(source: SourceConfig, tally: Tally | None = None) -> Iterator[Document]:
    """Every document of `source`, always in the same order; documents without text are left out.

    Raises DataError or ConfigError: at once if the source does not exist, from the iterator if it is damaged or has no text.
    """
    tally = Tally() if tally is None else tally
    return _counted(_READERS[_kind(source)](source, tally), source, tally)


def source_state(source: SourceConfig) -> str:
    """A digest that changes when the corpus does: names, sizes and times of its files, or what the dataset says of itself."""
    kind = _kind(source)
    if kind == "hf":
        return records.dataset_state(source.path)
    if kind == "stdlib":
        root, files = corpus.stdlib_root(), list(corpus.stdlib_files())
    else:
        root = Path(source.path).expanduser()
        files = list_files(root) if root.is_dir() else [root]
    digest = hashlib.sha256()
    for file in files:
        facts = file.stat()
        digest.update(f"{file.relative_to(root)}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _counted(documents: Iterator[Document], source: SourceConfig, tally: Tally) -> Iterator[Document]:
    for document in documents:
        if not document.text:
            tally.empty += 1
            continue
        tally.documents += 1
        tally.text_bytes += len(document.text.encode("utf-8"))
        yield document
    if not tally.documents:
        left_out = f" ({tally.remarks()})" if tally.remarks() else ""
        raise DataError(f"no text was found in {source.path!r}{left_out}; give a folder or file that holds UTF-8 text")


def _kind(source: SourceConfig) -> str:
    if source.path == corpus.NAME:
        return "stdlib"
    if source.path.startswith("hf:"):
        return "hf"
    path = Path(source.path).expanduser()
    if not path.exists():
        raise DataError(_missing(path))
    if path.is_dir():
        return "folder"
    if not path.is_file():
        raise DataError(f"{path} is neither a file nor a folder; give one of these")
    if path.name.endswith((*JSON_LINES, ".json")):
        return "jsonl"
    return "parquet" if path.suffix == ".parquet" else "text"


def _missing(path: Path) -> str:
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    lost = path.absolute().relative_to(parent).parts[0]
    likely = nearest(lost, os.listdir(parent)) if parent.is_dir() else ""
    hint = f"; did you mean {parent / likely}?" if likely else f"; {parent} is empty"
    return f"{path} does not exist{hint} (also allowed: {corpus.NAME}, hf:NAME[:SPLIT])"


# --- readers ----------------------------------------------------------------------------------------------------------


def _read_folder(source: SourceConfig, tally: Tally) -> Iterator[Document]:
    root = Path(source.path).expanduser()
    for file in list_files(root):
        name = file.relative_to(root).as_posix()
        is_json_lines = file.name.endswith(JSON_LINES)
        if is_json_lines and records.first_line_has(file, source.text_key):
            yield from _named(records.read_json_lines(file, source.text_key), name)
        elif file.suffix == ".parquet":
            yield from _named(records.read_parquet(file, source.text_key), name)
        else:
            tally.plain_json += is_json_lines
            yield from _read_file_of_folder(file, name, source.separator, tally)


def _read_file_of_folder(file: Path, name: str, separator: str | None, tally: Tally) -> Iterator[Document]:
    text, problem = _decode(file)
    if text is not None:
        yield from _parts(text, name, separator)
    elif problem == "binary":
        tally.binary += 1
    else:
        tally.not_utf8 += 1


def _read_text(source: SourceConfig, _tally: Tally) -> Iterator[Document]:
    path = Path(source.path).expanduser()
    text, problem = _decode(path)
    if text is None:
        raise DataError(_not_text(path, problem))
    yield from _parts(text, path.name, source.separator)


def _read_json_lines(source: SourceConfig, _tally: Tally) -> Iterator[Document]:
    path = Path(source.path).expanduser()
    return _named(records.read_json_lines(path, source.text_key), path.name)


def _read_parquet(source: SourceConfig, _tally: Tally) -> Iterator[Document]:
    path = Path(source.path).expanduser()
    return _named(records.read_parquet(path, source.text_key), path.name)


def _read_dataset(source: SourceConfig, _tally: Tally) -> Iterator[Document]:
    return _named(records.read_dataset(source.path, source.text_key), source.path)


def _read_stdlib(source: SourceConfig, tally: Tally) -> Iterator[Document]:
    root = corpus.stdlib_root()
    for file in corpus.stdlib_files():
        yield from _read_file_of_folder(file, file.relative_to(root).as_posix(), source.separator, tally)


_READERS = {
    "stdlib": _read_stdlib,
    "hf": _read_dataset,
    "folder": _read_folder,
    "jsonl": _read_json_lines,
    "parquet": _read_parquet,
    "text": _read_text,
}


def _named(numbered: Iterator[tuple[int, str]], name: str) -> Iterator[Document]:
    return (Document(f"{name}#{number}", text) for number, text in numbered)


def _parts(text: str, name: str, separator: str | None) -> Iterator[Document]:
    """The text whole, or its parts between lines that are `separator` and nothing else; those lines belong to no part."""
    if separator is None:
        yield Document(name, text)
        return
    start, number = 0, 1
    for line in re.finditer(rf"^{re.escape(separator)}\r?(?:\n|\Z)", text, re.MULTILINE):
        if line.start() > start:
            yield Document(f"{name}#{number}", text[start : line.start()])
            number += 1
        start = line.end()
    if start < len(text):
        yield Document(f"{name}#{number}", text[start:])


# --- bytes → text -----------------------------------------------------------------------------------------------------


def _decode(file: Path) -> tuple[str | None, str]:
    """(text, "") or (None, what is wrong). A byte-order mark is taken off, and decides for UTF-16."""
    try:
        with file.open("rb") as handle:
            head = handle.read(HEAD_BYTES)
            if b"\0" in head and not head.startswith(UTF16_MARKS):
                return None, "binary"
            raw = head + handle.read()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}; make it readable or move it out of the corpus") from None
    try:
        return raw.decode("utf-16" if raw.startswith(UTF16_MARKS) else "utf-8-sig"), ""
    except UnicodeDecodeError as error:
        return None, "compressed" if raw.startswith(GZIP_MARK) else f"not UTF-8 at byte {error.start}"


def _not_text(path: Path, problem: str) -> str:
    if problem == "compressed":
        return f"{path} is compressed; unpack it first (`gunzip {path.name}`). Only .jsonl.gz is read as it is"
    if problem == "binary":
        return f"{path} is a binary file; byrote reads text: a folder, .txt or source code, .jsonl(.gz), .parquet"
    return f"{path} is {problem}; convert it first, for instance `iconv -f latin1 -t utf-8 {path.name} > new.txt`"
