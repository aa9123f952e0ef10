"""Corpora as users have them: mixed folders, odd encodings, records, and the usual mistakes."""

import gzip
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from byrote.data.config import DataConfig, SourceConfig
from byrote.data.sources import Document, Tally, read_documents, source_state
from byrote.errors import ConfigError, DataError


def read(path: object, **options: str) -> list[Document]:
    return list(read_documents(SourceConfig(path=str(path), **options)))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def json_lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_text_files_in_sorted_order_under_relative_names(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.txt", "a/y.md", "a.txt", "Ä/ü.txt"):
        write(tmp_path / name, f"in {name}")
    assert read(tmp_path) == [Document(name, f"in {name}") for name in ("a/y.md", "a/z.txt", "a.txt", "b.py", "Ä/ü.txt")]


def test_hidden_files_caches_and_virtual_environments_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "kept.txt", "kept")
    for name in (".git/config", ".env", "__pycache__/x.py", "node_modules/x.js", "lib/site-packages/x.py", "mine/pyvenv.cfg", "mine/x.py"):
        write(tmp_path / name, "not wanted")
    assert [document.name for document in read(tmp_path)] == ["kept.txt"]


def test_files_of_a_folder_that_are_no_text_are_counted_not_read(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "image.png", b"\x89PNG\r\n\x00\x00")
    write(tmp_path / "latin.txt", "café".encode("latin-1"))
    write(tmp_path / "empty.py", "")
    tally = Tally()
    assert list(read_documents(SourceConfig(path=str(tmp_path)), tally)) == [Document("a.txt", "text")]
    assert (tally.documents, tally.text_bytes, tally.binary, tally.not_utf8, tally.empty) == (1, 4, 1, 1, 1)
    assert tally.remarks() == "1 binary files skipped, 1 files skipped that are not UTF-8, 1 empty documents skipped"


def test_links_to_folders_are_not_followed_so_rings_end(tmp_path: Path) -> None:
    write(tmp_path / "a/x.txt", "x")
    (tmp_path / "a/ring").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a/broken.txt").symlink_to(tmp_path / "nowhere")
    assert [document.name for document in read(tmp_path)] == ["a/x.txt"]


def test_json_lines_in_a_folder_are_records_if_they_hold_the_key_and_text_otherwise(tmp_path: Path) -> None:
    write(tmp_path / "corpus.jsonl", json_lines({"text": "one"}, {"text": "two"}))
    other = json_lines({"level": 3})
    write(tmp_path / "log.jsonl", other)
    tally = Tally()
    found = list(read_documents(SourceConfig(path=str(tmp_path)), tally))
    assert found == [Document("corpus.jsonl#1", "one"), Document("corpus.jsonl#2", "two"), Document("log.jsonl", other)]
    assert tally.plain_json == 1


# --- text files -------------------------------------------------------------------------------------------------------


def test_text_comes_out_exactly_as_it_is_in_the_file(tmp_path: Path) -> None:
    text = "tab\there\r\nthen \x1e and \u2028 and 🦜\r\rend without newline"
    assert read(write(tmp_path / "a.txt", text)) == [Document("a.txt", text)]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_names_the_encoding_and_is_no_text(tmp_path: Path, encoding: str) -> None:
    assert read(write(tmp_path / "notes.txt", "grüße".encode(encoding)))[0].text == "grüße"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_separator_line_parts_a_file_into_documents(tmp_path: Path, newline: str) -> None:
    lines = ["---", "one", "still --- one", "---", "---", "two", "---"]
    path = write(tmp_path / "a.txt", newline.join(lines))
    first, second = f"one{newline}still --- one{newline}", f"two{newline}"
    assert read(path, separator="---") == [Document("a.txt#1", first), Document("a.txt#2", second)]


def test_a_separator_may_be_a_control_character_or_the_empty_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\n\x1e\ntwo\n\nthree")
    assert [document.text for document in read(path, separator="\x1e")] == ["one\n", "two\n\nthree"]
    assert [document.text for document in read(path, separator="")] == ["one\n\x1e\ntwo\n", "three"]


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_json_lines_give_the_field_that_holds_the_text(tmp_path: Path, name: str) -> None:
    content = (json_lines({"body": "one", "n": 1}) + "\n" + json_lines({"body": "two"}, {"body": None}, {"body": "half \ud83d"})).encode()
    path = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    assert read(path, text_key="body") == [Document(f"{name}#1", "one"), Document(f"{name}#3", "two"), Document(f"{name}#5", "half \ufffd")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"txt": "x"}', r"a\.jsonl:2 has no 'text': it has txt; set text_key, for instance to 'txt'"),
        ("{}", r"a\.jsonl:2 has no 'text': it is empty"),
        ('{"text": 3}', r"a\.jsonl:2: 'text' holds a value of type int, text is needed"),
        ('["text"]', r"a\.jsonl:2 holds a JSON list, an object is needed"),
        ('{"text": "x', r"a\.jsonl:2 is no line of JSON .*jq -c"),
        (b'{"text": "\xff"}', r"a\.jsonl:2 is not UTF-8 at byte 10"),
    ],
)
def test_a_wrong_record_is_named_by_file_and_line(tmp_path: Path, line: str | bytes, message: str) -> None:
    content = json_lines({"text": "fine"}).encode() + (line.encode() if isinstance(line, str) else line)
    path = write(tmp_path / "a.jsonl", content)
    with pytest.raises(DataError, match=message):
        read(path)


def test_a_torn_gzip_file_is_an_error_of_the_tree(tmp_path: Path) -> None:
    whole = gzip.compress(json_lines(*({"text": f"line {n}"} for n in range(1000))).encode())
    for content in (whole[: len(whole) // 2], b"no gzip at all"):
        with pytest.raises(DataError, match="cannot be read to its end"):
            read(write(tmp_path / "a.jsonl.gz", content))


def test_parquet_gives_a_column_in_batches(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"row {n}" for n in range(2500)]
    texts[7] = None
    parquet.write_table(pyarrow.table({"id": list(range(2500)), "body": texts}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", text_key="body")
    assert found == [Document(f"a.parquet#{n + 1}", text) for n, text in enumerate(texts) if text]
    assert [document.text for document in read(tmp_path, text_key="body")] == [document.text for document in found]
    with pytest.raises(DataError, match="no 'text': it has id, body"):
        read(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no readable parquet file"):
        read(write(tmp_path / "torn.parquet", "PAR1 and then nothing"))


class FakeDataset:
    """As much of a Hugging Face dataset as the reader touches."""

    column_names = ("body", "url")
    num_rows = 2
    info = types.SimpleNamespace(version="1.0.0", dataset_size=6)

    def select_columns(self, columns: list[str]) -> Iterator[dict[str, str]]:
        assert columns == ["body"]
        return iter([{"body": "one"}, {"body": "two"}])


def fake_datasets(asked: list[tuple[str, str]]) -> types.ModuleType:
    def load_dataset(name: str, split: str) -> FakeDataset:
        asked.append((name, split))
        if split == "lost":
            raise ValueError("Unknown split 'lost'")
        return FakeDataset()

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    return module


def test_a_hugging_face_dataset_is_read_by_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(asked))
    assert read("hf:org/name", text_key="body") == [Document("hf:org/name#1", "one"), Document("hf:org/name#2", "two")]
    read("hf:org/name:train[:1%]", text_key="body")
    assert asked == [("org/name", "train"), ("org/name", "train[:1%]")]
    with pytest.raises(DataError, match="Unknown split 'lost'; write it as hf:NAME or hf:NAME:SPLIT"):
        read("hf:org/name:lost")
    with pytest.raises(DataError, match="no 'text': it has body, url"):
        read("hf:org/name")


@pytest.mark.parametrize(("module", "name"), [("datasets", "hf:any"), ("pyarrow", "a.parquet")])
def test_a_missing_extra_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    path = name if name.startswith("hf:") else write(tmp_path / name, "PAR1")
    with pytest.raises(ConfigError, match=rf'needs {module}, which is not installed .* pip install "byrote\[data\]"'):
        read(path)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_missing_path_is_refused_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path / "corpus/notes.txt", "x")
    with pytest.raises(DataError, match=r"notez\.txt does not exist; did you mean .*corpus/notes\.txt\?"):
        read_documents(SourceConfig(path=str(tmp_path / "corpus/notez.txt")))
    with pytest.raises(DataError, match=r"did you mean .*corpus\?"):
        read_documents(SourceConfig(path=str(tmp_path / "corpsu/a/b.txt")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x7fELF\x00\x00", "is a binary file; byrote reads text"),
        (gzip.compress(b"text" * 10, mtime=0).replace(b"\0", b"\1"), "is compressed; unpack it first"),
        (b"fine, then caf" + b"\xe9 au lait", "not UTF-8 at byte 14; convert it first, for instance `iconv"),
    ],
)
def test_a_file_that_is_no_text_is_refused_when_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "a.txt", content))


@pytest.mark.parametrize("files", [{}, {"a.txt": b""}, {"a.bin": b"\0\1"}])
def test_a_corpus_without_text_is_an_error(tmp_path: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(DataError, match="no text was found"):
        read(tmp_path)


def test_configurations_that_cannot_be_trained_on_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        DataConfig(sources=())
    with pytest.raises(ConfigError, match="must be positive"):
        SourceConfig(path="x", weight=0.0)
    with pytest.raises(ConfigError, match=r"data\.sequence_length is 0"):
        DataConfig(sources=(SourceConfig(path="x"),), sequence_length=0)


# --- state ------------------------------------------------------------------------------------------------------------


def test_the_state_of_a_source_changes_with_its_files_and_only_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SourceConfig(path=str(tmp_path))
    write(tmp_path / "a.txt", "one")
    states = [source_state(source)]
    assert source_state(source) == states[0]
    write(tmp_path / "a.txt", "longer")
    states.append(source_state(source))
    write(tmp_path / "b.txt", "more")
    states.append(source_state(source))
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    states.append(source_state(source))
    states.append(source_state(SourceConfig(path=str(tmp_path / "a.txt"))))
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets([]))
    states.append(source_state(SourceConfig(path="hf:name")))
    assert len(set(states)) == len(states)
