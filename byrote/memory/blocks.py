"""Large files with checksums that are checked where, and when, they are first read.

A table of 20 GB must open at once, and yet no number of it may be used unchecked. So the file is summed as a tree of two levels:

    leaf    16 KiB of the file          SHA-256, kept in NAME.leaves, 32 bytes a leaf
    block   4 MiB = 256 leaves          SHA-256 of the block's 256 leaf sums; kept by whoever lists the file (a pack's manifest)

The first read of a row checks its leaf (16,384 bytes, 11 µs) against the leaf sums of the block, and those (8 KiB) against the block's
sum. With sums of whole blocks alone, the first token of a text would have to read and sum 4 MiB for every row it looks up. `verify`
walks all blocks.

Example: rows of 264 bytes, row 1,000: bytes 264,000 .. 264,264 lie in leaf 16, so leaf 16 is read, whole, and its sum must be bytes
512 .. 544 of the block's leaf sums.

A file may be renamed or deleted while it is open; the open one stays. What was checked and is then altered on the disk is not noticed
until the pack is opened again.
"""

import hashlib
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from byrote.errors import MemoryPackError

BLOCK_BYTES, LEAF_BYTES, SUM_BYTES = 1 << 22, 1 << 14, 32
LEAVES = ".leaves"
_LEAVES_OF_BLOCK = BLOCK_BYTES // LEAF_BYTES
_DEPTH = 16  # reads in flight

Sums = list[tuple[str, bytes]]  # of each block: its sum, in hexadecimal, and the sums of its leaves


def blocks(parts: Iterable[bytes | memoryview], sums: Sums) -> Iterator[bytes]:
    """The bytes of `parts` in whole blocks (the last may be shorter), whose sums are appended to `sums` on the way."""
    waiting = bytearray()
    for part in parts:
        waiting += part
        whole = len(waiting) - len(waiting) % BLOCK_BYTES
        yield from (_summed(bytes(waiting[start : start + BLOCK_BYTES]), sums) for start in range(0, whole, BLOCK_BYTES))
        del waiting[:whole]
    if waiting:
        yield _summed(bytes(waiting), sums)


def _summed(block: bytes, sums: Sums) -> bytes:
    leaves = b"".join(hashlib.sha256(block[start : start + LEAF_BYTES]).digest() for start in range(0, len(block), LEAF_BYTES))
    sums.append((hashlib.sha256(leaves).hexdigest(), leaves))
    return block


def count_blocks(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK_BYTES)


def leaf_file_bytes(num_bytes: int) -> int:
    """Size of the leaf sums of a file of `num_bytes`."""
    return -(-num_bytes // LEAF_BYTES) * SUM_BYTES


class Checker:
    """Checks parts of the file `path` before somebody reads them. `block_sums` come from a manifest that was checked itself.

    Raises MemoryPackError where a sum does not agree or the disk fails. Threads may check at the same time.
    """

    def __init__(self, path: Path, num_bytes: int, block_sums: tuple[str, ...]) -> None:
        self.path, self.num_bytes, self._block_sums = path, num_bytes, block_sums
        self._checked = torch.zeros(-(-num_bytes // LEAF_BYTES), dtype=torch.bool, device="cpu")
        self._leaf_sums: dict[int, bytes] = {}  # of the blocks seen so far
        self._leaf_path = path.with_name(path.name + LEAVES)
        self._file = _open(path)
        self._leaf_file = _open(self._leaf_path, self._file)
        self.close = weakref.finalize(self, _close, self._file, self._leaf_file)
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def check(self, starts_U: Tensor, size: int) -> None:
        """Bytes [start, start + size) for every start; `size` is at most a leaf."""
        ends = torch.cat((starts_U, starts_U + (size - 1))) // LEAF_BYTES
        self._check_leaves(torch.unique(ends[~self._checked[ends]]))

    def verify(self) -> Iterator[int]:
        """Check all that was not read yet, block by block, each in one read; yields how many bytes are done."""
        for block, _ in enumerate(self._threads().map(self._check_block, range(count_blocks(self.num_bytes)))):
            yield min((block + 1) * BLOCK_BYTES, self.num_bytes)

    @property
    def checked_bytes(self) -> int:
        """How much of the file has been read and found right."""
        return min(int(self._checked.sum()) * LEAF_BYTES, self.num_bytes)

    def _check_leaves(self, leaves: Tensor) -> None:
        if len(leaves) < 2:
            self._check_some(leaves)
            return
        list(self._threads().map(self._check_some, leaves.tensor_split(min(_DEPTH, len(leaves)))))

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(_DEPTH, thread_name_prefix="pack")
            return self._pool

    def _check_block(self, block: int) -> None:
        leaves = torch.arange(block * _LEAVES_OF_BLOCK, min((block + 1) * _LEAVES_OF_BLOCK, len(self._checked)))
        if self._checked[leaves].all():
            return
        start = block * BLOCK_BYTES
        data = memoryview(self._read(self._file, self.path, start, min(BLOCK_BYTES, self.num_bytes - start)))
        if b"".join(hashlib.sha256(data[at : at + LEAF_BYTES]).digest() for at in range(0, len(data), LEAF_BYTES)) == self._sums_of(block):
            self._checked[leaves] = True
        else:
            self._check_some(leaves)  # names the leaf

    def _check_some(self, leaves: Tensor) -> None:
        for leaf in leaves.tolist():
            self._check_leaf(leaf)

    def _check_leaf(self, leaf: int) -> None:
        start, (block, within) = leaf * LEAF_BYTES, divmod(leaf, _LEAVES_OF_BLOCK)
        data = self._read(self._file, self.path, start, min(LEAF_BYTES, self.num_bytes - start))
        if hashlib.sha256(data).digest() != self._sums_of(block)[within * SUM_BYTES : (within + 1) * SUM_BYTES]:
            raise MemoryPackError(
                f"{self.path} was altered: the checksum of bytes {start:,} to {start + len(data):,} (block {block}) does not agree. "
                "Get the pack again"
            )
        self._checked[leaf] = True

    def _sums_of(self, block: int) -> bytes:
        """The leaf sums of a block, themselves checked."""
        if block not in self._leaf_sums:
            first = block * _LEAVES_OF_BLOCK
            leaves = min(_LEAVES_OF_BLOCK, len(self._checked) - first)
            sums = self._read(self._leaf_file, self._leaf_path, first * SUM_BYTES, leaves * SUM_BYTES)
            if hashlib.sha256(sums).hexdigest() != self._block_sums[block]:
                raise MemoryPackError(
                    f"{self._leaf_path} was altered: the checksum of block {block} is not that of the manifest. Get the pack again"
                )
            self._leaf_sums[block] = sums
        return self._leaf_sums[block]

    @staticmethod
    def _read(handle: int, path: Path, start: int, count: int) -> bytes:
        data = b""
        try:
            while len(data) < count and (more := os.pread(handle, count - len(data), start + len(data))):
                data += more
        except OSError as error:
            raise MemoryPackError(
                f"{path} cannot be read at byte {start:,}: {error.strerror}. Check the disk, or get the pack again"
            ) from error
        if len(data) < count:
            raise MemoryPackError(f"{path} was shortened while it was open: {count - len(data):,} bytes from {start:,} on are gone")
        return data


def _open(path: Path, *others: int) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        _close(*others)
        raise MemoryPackError(f"{path} cannot be opened: {error.strerror}. Get the pack again") from error


def _close(*handles: int) -> None:
    for handle in handles:
        os.close(handle)
