"""The standard library as a corpus, on whatever Python runs the tests."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from byrote.data import corpus
from byrote.data.config import SourceConfig
from byrote.data.sources import Tally, read_documents, source_state
from byrote.errors import DataError


@pytest.fixture
def other_stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    corpus.stdlib_files.cache_clear()
    yield tmp_path / "lib"
    corpus.stdlib_files.cache_clear()


def test_the_standard_library_is_read_as_source_without_installed_packages() -> None:
    tally = Tally()
    names = [document.name for document in read_documents(SourceConfig(path="python-stdlib"), tally)]
    assert {"json/decoder.py", "ast.py"} <= set(names)
    assert all(name.endswith(".py") and not name.startswith("/") for name in names)
    assert not any(part in name.split("/") for name in names for part in ("site-packages", "dist-packages", "__pycache__"))
    facts = corpus.corpus_facts()
    assert facts.num_files == tally.documents + tally.empty + tally.not_utf8 + tally.binary
    assert 0.9 * facts.num_bytes < tally.text_bytes <= facts.num_bytes
    assert facts.python.startswith(("CPython 3.", "PyPy 3."))


def test_the_state_of_the_standard_library_stays_the_same() -> None:
    source = SourceConfig(path="python-stdlib")
    assert source_state(source) == source_state(source)


def test_links_out_of_the_standard_library_are_not_followed(other_stdlib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "FEWEST_FILES", 1)
    monkeypatch.setattr(corpus, "LEAST_BYTES", 1)
    other_stdlib.mkdir()
    outside = other_stdlib.parent / "site.py"
    outside.write_text("outside = 1")
    (other_stdlib / "inside.py").write_text("inside = 1")
    (other_stdlib / "link_in.py").symlink_to(other_stdlib / "inside.py")
    (other_stdlib / "link_out.py").symlink_to(outside)
    assert [file.name for file in corpus.stdlib_files()] == ["inside.py", "link_in.py"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_python_without_sources_asks_for_other_text(other_stdlib: Path, exists: bool) -> None:
    if exists:
        other_stdlib.mkdir()
        (other_stdlib / "os.py").write_text("x = 1")
    with pytest.raises(DataError, match=r"carries only [01] source files .* --data\.sources FOLDER"):
        corpus.corpus_facts()
