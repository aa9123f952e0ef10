"""Shards hold the documents exactly, and survive a kill at any step."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from byrote.data import shards
from byrote.data.shards import MANIFEST, find_shard, open_shard, write_shard
from byrote.data.sources import Document
from byrote.errors import CapacityError, DataError
from byrote.tokenizer.bpe import Tokenizer


class Killed(BaseException):
    """Not an Exception, so nothing that handles errors can catch it: as close to a kill as one process comes."""


def write(folder: Path, documents: list[Document], tokenizer: Tokenizer, key: str = "k") -> shards.Shard:
    return write_shard(folder, documents, tokenizer, key=key, text_bytes=10_000)


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise Killed at the `step`-th operation that reaches the disk, before or after it is done."""
    count = 0

    def wrapped(operation: Callable) -> Callable:
        def operate(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == step:
                raise Killed
            result = operation(*args, **kwargs)
            count += 1
            if count == step:
                raise Killed
            return result

        return operate

    monkeypatch.setattr(os, "fsync", wrapped(os.fsync))
    monkeypatch.setattr(Path, "replace", wrapped(Path.replace))
    monkeypatch.setattr(Path, "unlink", wrapped(Path.unlink))
    monkeypatch.setattr(Tokenizer, "encode_batch", wrapped(Tokenizer.encode_batch))


def test_every_document_comes_back_between_begin_and_end(shard: shards.Shard, documents: list[Document], tokenizer: Tokenizer) -> None:
    assert shard.num_documents == len(documents)
    for number, document in enumerate(documents):
        tokens = shard.document(number).tolist()
        assert (tokens[0], tokens[-1]) == (tokenizer.begin_id, tokenizer.end_id)
        assert tokenizer.decode(tokens) == document.text
    assert shard.num_tokens == len(shard.tokens) == shard.offsets[-1]
    assert shard.manifest["text_bytes"] == sum(len(document.text.encode("utf-8")) for document in documents)


def test_the_size_of_batches_changes_nothing(
    tmp_path: Path, documents: list[Document], tokenizer: Tokenizer, shard: shards.Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 50)
    done: list[int] = []
    small = write_shard(tmp_path, documents, tokenizer, key="k", text_bytes=10_000, progress=done.append)
    assert small.checksum == shard.checksum
    assert len(done) > 5
    assert done == sorted(done)
    assert done[-1] == shard.manifest["text_bytes"]


def test_large_vocabularies_take_four_bytes(
    tmp_path: Path, documents: list[Document], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = write(tmp_path / "narrow", documents, tokenizer)
    monkeypatch.setattr(Tokenizer, "vocab_size", 65_537)
    wide = write(tmp_path / "wide", documents, tokenizer)
    assert (narrow.tokens.dtype, wide.tokens.dtype) == (np.dtype("<u2"), np.dtype("<u4"))
    assert np.array_equal(narrow.tokens, wide.tokens)


def test_a_shard_is_found_by_its_key_only(tmp_path: Path, documents: list[Document], tokenizer: Tokenizer) -> None:
    written = write(tmp_path, documents, tokenizer, key="mine")
    found = find_shard(tmp_path, "mine")
    assert found is not None
    assert np.array_equal(found.tokens, written.tokens)
    assert find_shard(tmp_path, "other") is None
    assert find_shard(tmp_path / "nowhere", "mine") is None


def test_a_kill_at_any_step_leaves_the_old_shard_or_the_new_one(tmp_path: Path, documents: list[Document], tokenizer: Tokenizer) -> None:
    old = write(tmp_path / "seen", documents[:20], tokenizer, key="old")
    outcomes = []
    for step in range(1, 100):
        folder = tmp_path / f"{step}"
        write(folder, documents[:20], tokenizer, key="old")
        with pytest.MonkeyPatch.context() as patch:
            kill_at(step, patch)
            try:
                write(folder, documents, tokenizer, key="new")
                break
            except Killed:
                pass
        left = open_shard(folder)
        left.verify()
        outcomes.append(left.manifest["key"])
        assert left.num_documents == (20 if left.manifest["key"] == "old" else len(documents))
        assert left.manifest["key"] == "new" or left.checksum == old.checksum
        again = write(folder, documents, tokenizer, key="new")
        assert sorted(path.name for path in folder.iterdir()) == sorted([MANIFEST, *(f["name"] for f in again.manifest["files"].values())])
    assert outcomes == sorted(outcomes, reverse=True)  # old up to one step, new from there on
    assert set(outcomes) == {"old", "new"}


def test_a_kill_during_the_first_writing_leaves_nothing_that_opens(tmp_path: Path, documents: list[Document], tokenizer: Tokenizer) -> None:
    opened = []
    for step in range(1, 100):
        folder = tmp_path / f"{step}"
        with pytest.MonkeyPatch.context() as patch:
            kill_at(step, patch)
            try:
                write(folder, documents, tokenizer)
                break
            except Killed:
                pass
        opened.append(find_shard(folder, "k") is not None)
        if opened[-1]:
            open_shard(folder).verify()
    assert len(opened) > 10
    assert opened == sorted(opened)


def test_a_manifest_or_file_cut_at_any_length_is_noticed(tmp_path: Path, documents: list[Document], tokenizer: Tokenizer) -> None:
    written = write(tmp_path, documents, tokenizer)
    tokens = tmp_path / written.manifest["files"]["tokens"]["name"]
    for path in (tokens, tmp_path / MANIFEST):
        whole = path.read_bytes()
        for length in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            assert find_shard(tmp_path, "k") is None
        path.write_bytes(whole)
    assert find_shard(tmp_path, "k") is not None


def test_one_changed_byte_is_found_by_verify(tmp_path: Path, documents: list[Document], tokenizer: Tokenizer) -> None:
    written = write(tmp_path, documents, tokenizer)
    path = tmp_path / written.manifest["files"]["tokens"]["name"]
    content = bytearray(path.read_bytes())
    content[17] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"is damaged: its checksum .* delete .* to write it again"):
        open_shard(tmp_path).verify()


def test_another_format_is_not_guessed_at(tmp_path: Path, documents: list[Document], tokenizer: Tokenizer) -> None:
    write(tmp_path, documents, tokenizer)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"format": "byrote-shard-9"}))
    with pytest.raises(DataError, match="byrote-shard-9"):
        open_shard(tmp_path)


def test_too_little_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, documents: list[Document], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("byrote.device.disk_free", lambda path: 9_999)
    with pytest.raises(CapacityError, match="the tokenised corpus needs"):
        write(tmp_path / "shard", documents, tokenizer)
    assert not (tmp_path / "shard").exists()


def test_a_disk_that_fills_up_keeps_the_old_shard_and_no_leftovers(
    tmp_path: Path, documents: list[Document], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write(tmp_path, documents[:9], tokenizer)
    before = sorted(tmp_path.iterdir())

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CapacityError, match="is full; free some space"):
        write(tmp_path, documents, tokenizer)
    assert sorted(tmp_path.iterdir()) == before
    assert open_shard(tmp_path).checksum == old.checksum


def test_no_documents_are_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="there is no document"):
        write(tmp_path, [], tokenizer)
    assert find_shard(tmp_path, "k") is None
