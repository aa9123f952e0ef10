"""Checksums of large files: every byte is covered, and only what is read is checked."""

import hashlib
import itertools
import os
import random
from pathlib import Path

import pytest
import torch

from byrote.errors import MemoryPackError
from byrote.memory.blocks import BLOCK_BYTES, LEAF_BYTES, LEAVES, Checker, Sums, blocks, count_blocks, leaf_file_bytes

SIZES = (1, LEAF_BYTES, LEAF_BYTES + 1, BLOCK_BYTES, BLOCK_BYTES + 7)


def write(path: Path, data: bytes, parts: int = 5) -> tuple[str, ...]:
    """A file and its leaf sums, from parts of odd sizes; returns the sums of its blocks."""
    sums: Sums = []
    rng = random.Random(0)
    cut = sorted({0, len(data), *(rng.randrange(len(data)) for _ in range(parts))})
    path.write_bytes(b"".join(blocks((data[start:end] for start, end in itertools.pairwise(cut)), sums)))
    path.with_name(path.name + LEAVES).write_bytes(b"".join(leaves for _, leaves in sums))
    return tuple(block for block, _ in sums)


@pytest.mark.parametrize("size", SIZES)
def test_bytes_and_sums_do_not_depend_on_the_parts_they_come_in(tmp_path: Path, size: int) -> None:
    data = random.Random(1).randbytes(size)
    sums = write(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == data
    assert sums == write(tmp_path / "b", data, parts=0) and len(sums) == count_blocks(size)
    assert (tmp_path / f"a{LEAVES}").stat().st_size == leaf_file_bytes(size)
    leaf_sums = [hashlib.sha256(data[start : start + LEAF_BYTES]).digest() for start in range(0, size, LEAF_BYTES)]
    assert sums[0] == hashlib.sha256(b"".join(leaf_sums[: BLOCK_BYTES // LEAF_BYTES])).hexdigest()


def test_only_what_is_read_is_checked(tmp_path: Path) -> None:
    data = bytearray(random.Random(2).randbytes(10 * LEAF_BYTES))
    sums = write(tmp_path / "a", bytes(data))
    data[5 * LEAF_BYTES] ^= 1
    (tmp_path / "a").write_bytes(data)
    checker = Checker(tmp_path / "a", len(data), sums)
    checker.check(torch.tensor([0, 100, 9 * LEAF_BYTES - 50]), 100)
    assert checker.checked_bytes == 3 * LEAF_BYTES, "the last read reaches over two leaves"
    with pytest.raises(MemoryPackError, match="was altered: the checksum of bytes 81,920 to 98,304"):
        checker.check(torch.tensor([5 * LEAF_BYTES - 1]), 2)
    with pytest.raises(MemoryPackError, match="was altered"):
        list(checker.verify())


def test_verify_reads_everything_and_says_how_far_it_is(tmp_path: Path) -> None:
    data = random.Random(3).randbytes(2 * BLOCK_BYTES + 3)
    checker = Checker(tmp_path / "a", len(data), write(tmp_path / "a", data))
    assert list(checker.verify()) == [BLOCK_BYTES, 2 * BLOCK_BYTES, len(data)]
    assert checker.checked_bytes == len(data)


def test_what_was_checked_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(4).randbytes(LEAF_BYTES)
    checker = Checker(tmp_path / "a", len(data), write(tmp_path / "a", data))
    checker.check(torch.tensor([0]), 10)
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("read again"))
    checker.check(torch.tensor([0, 99]), 10)
    assert list(checker.verify()) == [len(data)]


@pytest.mark.parametrize("place", ["leaf sums", "a block's sum"])
def test_altered_sums_are_noticed_too(tmp_path: Path, place: str) -> None:
    data = random.Random(5).randbytes(3 * LEAF_BYTES)
    sums = write(tmp_path / "a", data)
    if place == "leaf sums":
        leaves = bytearray((tmp_path / f"a{LEAVES}").read_bytes())
        leaves[70] ^= 1  # of another leaf of the same block
        (tmp_path / f"a{LEAVES}").write_bytes(leaves)
    else:
        sums = ("0" * 64,)
    with pytest.raises(MemoryPackError, match="block 0 is not that of the manifest"):
        Checker(tmp_path / "a", len(data), sums).check(torch.tensor([0]), 1)


def test_a_file_that_shrinks_while_open_and_a_disk_that_fails_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(6).randbytes(2 * LEAF_BYTES)
    checker = Checker(tmp_path / "a", len(data), write(tmp_path / "a", data))
    os.truncate(tmp_path / "a", LEAF_BYTES + 9)
    with pytest.raises(MemoryPackError, match=r"was shortened while it was open: 16,375 bytes from 16,384 on are gone"):
        checker.check(torch.tensor([LEAF_BYTES]), 1)

    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(MemoryPackError, match="cannot be read at byte 0: Input/output error"):
        checker.check(torch.tensor([0]), 1)
