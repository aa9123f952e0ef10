"""Reading records: both back ends give the bytes of the file, however the records lie, and notice a file that ends."""

import os

import numpy as np
import pytest
import torch

from byrote.kernels.file_rows import cpu, reference

BACK_ENDS = [reference, pytest.param(cpu, marks=pytest.mark.skipif(cpu.library() is None, reason="no C compiler here"))]
PATTERNS = {
    "none": np.zeros(0, np.int64),
    "one": np.array([17]),
    "side by side": np.arange(0, 400_000, 40),
    "near": np.arange(3, 300_000, 977),
    "far apart": np.arange(0, 3_000_000, 60_001),
    "in clumps": np.sort(np.concatenate([base + 40 * np.arange(9) for base in range(0, 2_900_000, 9_000)])),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "bytes"
    path.write_bytes(np.random.default_rng(0).bytes(3_000_041))
    return path


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("size", [1, 40])
def test_records_are_the_bytes_of_the_file(file, back_end, pattern, size):
    offsets, whole = PATTERNS[pattern], np.fromfile(file, np.uint8)
    got = torch.full((len(offsets), size), 99, dtype=torch.uint8)
    handle = os.open(file, os.O_RDONLY)
    back_end.read_records(handle, offsets, got)
    os.close(handle)
    assert (got.numpy() == whole[offsets[:, None] + np.arange(size)]).all()


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_records_larger_than_a_call_are_read_whole(file, back_end):
    size, whole = reference.LONGEST + 1234, np.fromfile(file, np.uint8)
    offsets = np.array([5, 5 + size, 2_000_000])
    got = torch.empty(3, size, dtype=torch.uint8)
    handle = os.open(file, os.O_RDONLY)
    back_end.read_records(handle, offsets, got)
    os.close(handle)
    assert (got.numpy() == whole[offsets[:, None] + np.arange(size)]).all()


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("count", [1, 1000])
def test_a_file_that_ends_inside_a_record_and_a_closed_file_are_errors(file, back_end, count):
    offsets = np.concatenate([np.arange(count - 1) * 3000, [3_000_010]])
    handle = os.open(file, os.O_RDONLY)
    with pytest.raises(OSError, match="ends"):
        back_end.read_records(handle, offsets, torch.empty(count, 40, dtype=torch.uint8))
    os.close(handle)
    with pytest.raises(OSError, match="Bad file descriptor"):
        back_end.read_records(handle, offsets[:-1] if count > 1 else np.array([0]), torch.empty(max(count - 1, 1), 40, dtype=torch.uint8))


class Log:
    """Rows in two files whose slots are 1..40 and 101..140, as a table on disk keeps them."""

    def __init__(self, folder, size=24):
        self.folder, self.size, self.records = folder, size, np.random.default_rng(0).integers(0, 256, (80, size), np.uint8)
        self.slot_N = np.concatenate([np.arange(1, 41), np.arange(101, 141)]).astype(np.uint32)
        parts = []
        for name, first, records in (("a", 1, self.records[:40]), ("b", 101, self.records[40:])):
            (folder / name).write_bytes(records.tobytes())
            parts.append((first, first + 40, os.open(folder / name, os.O_RDONLY)))
        self.parts_P3 = np.array(parts, np.int64)

    def pick(self, back_end, rows, wanted=16):
        to_UE = torch.zeros(len(rows), wanted // 4)
        whole = back_end.pick_records(torch.tensor(rows, dtype=torch.int64), self.slot_N, self.parts_P3, self.size, to_UE)
        return whole, to_UE.view(torch.uint8).numpy()


@pytest.fixture
def log(tmp_path):
    log = Log(tmp_path)
    yield log
    for handle in log.parts_P3[:, 2].tolist():
        os.close(handle)


@pytest.mark.parametrize("rows", [[], [0], [39, 40], [79, 3, 3, 55, 0], [*range(80), *range(80)]])
@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("in_page_cache", [True, False])
def test_picked_records_begin_with_the_bytes_of_the_files(log, back_end, rows, in_page_cache):
    if not in_page_cache and hasattr(os, "posix_fadvise"):
        for handle in log.parts_P3[:, 2].tolist():
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    whole, got = log.pick(back_end, rows)
    assert whole
    assert (got == log.records[rows, :16]).all()


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_a_row_without_record_a_row_outside_and_a_file_that_ends_are_told(log, back_end):
    log.slot_N[7] = 0
    assert not log.pick(back_end, [5, 7])[0]
    for outside in (-1, 80):
        with pytest.raises(IndexError, match="of a table of 80"):
            log.pick(back_end, [outside])
    os.truncate(log.folder / "b", 24 * 39 + 5)
    with pytest.raises(OSError, match="ends"):
        log.pick(back_end, [3, 79])
