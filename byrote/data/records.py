"""Corpora in records: JSON lines, parquet, Hugging Face datasets. Every reader yields (record number from 1, text)."""

import gzip
import json
import types
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from byrote.config import nearest
from byrote.errors import ConfigError, DataError

INSTALL = 'pip install "byrote[data]"'
PARQUET_ROWS = 1024  # rows held in memory at a time


def read_json_lines(path: Path, key: str) -> Iterator[tuple[int, str]]:
    """The string under `key` of each line. Raises DataError naming file and line."""
    try:
        with _open(path) as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    yield number, _field(_parse(line, f"{path}:{number}"), key, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read to its end: {error}; fetch or write the file again") from None


def first_line_has(path: Path, key: str) -> bool:
    """Whether a file found in a folder is a corpus of records, not just some program's data."""
    try:
        with _open(path) as handle:
            record = json.loads(handle.readline())
    except (OSError, EOFError, zlib.error, ValueError):  # read as a text file then, and judged there
        return False
    return isinstance(record, dict) and key in record


def read_parquet(path: Path, key: str) -> Iterator[tuple[int, str]]:
    """The strings of column `key`, a thousand rows at a time."""
    pyarrow = _load_extra("pyarrow", f"reading {path.name}")
    parquet = _load_extra("pyarrow.parquet", f"reading {path.name}")
    try:
        file = parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{path} is no readable parquet file: {error}; fetch or write it again") from None
    with file:
        columns = file.schema_arrow.names
        if key not in columns:
            raise DataError(_no_key(str(path), key, columns))
        number = 0
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[key]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield number, _text(value, key, f"{path}:{number}")


def read_dataset(name: str, key: str) -> Iterator[tuple[int, str]]:
    """The strings of column `key` of the dataset `hf:NAME[:SPLIT]`."""
    dataset = _load_dataset(name)
    if key not in dataset.column_names:
        raise DataError(_no_key(name, key, dataset.column_names))
    for number, record in enumerate(dataset.select_columns([key]), start=1):
        yield number, _text(record[key], key, f"{name}:{number}")


def dataset_state(name: str) -> str:
    """What changes when the dataset does."""
    dataset = _load_dataset(name)
    return f"{name} {dataset.info.version} {dataset.num_rows} rows {dataset.info.dataset_size} bytes"


def _load_dataset(name: str) -> Any:
    datasets = _load_extra("datasets", f"reading {name}")
    _, dataset, *split = name.split(":", 2)
    try:
        return datasets.load_dataset(dataset, split=split[0] if split else "train")
    except (OSError, ValueError) as error:  # unknown name or split, no network, a wrong file
        raise DataError(f"the dataset {name} cannot be loaded: {error}; write it as hf:NAME or hf:NAME:SPLIT") from error


def _load_extra(module: str, purpose: str) -> types.ModuleType:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise ConfigError(f"{purpose} needs {module.split('.')[0]}, which is not installed ({error}); install it: {INSTALL}") from None


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is no line of JSON ({error.msg} at character {error.colno}); {_one_a_line()}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 at byte {error.start} of the line; convert the file first") from None
    if not isinstance(record, dict):
        raise DataError(f"{where} holds a JSON {type(record).__name__}, an object is needed; {_one_a_line()}")
    return record


def _one_a_line() -> str:
    return "each line must be one object; a file that is one JSON list becomes that with `jq -c '.[]' IN.json > OUT.jsonl`"


def _field(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise DataError(_no_key(where, key, list(record)))
    return _text(record[key], key, where)


def _no_key(where: str, key: str, present: Sequence[str]) -> str:
    likely = nearest(key, present)
    hint = f"it has {', '.join(present)}; set text_key, for instance to {likely!r}" if present else "it is empty"
    return f"{where} has no {key!r}: {hint}"


def _text(value: object, key: str, where: str) -> str:
    """The string itself; "" for null. Half a surrogate pair, which JSON can write and UTF-8 cannot, becomes U+FFFD."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} holds a value of type {type(value).__name__}, text is needed; set text_key to another field")
    if value.isascii():
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
