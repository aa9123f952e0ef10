"""How fast a disk answers what a table on it asks: small records at random places, many at once."""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from byrote.kernels.file_rows import read_records
from byrote.memory.file import expect_random_reads

PAGE = 4096
_FILE_PAGES, _RECORD, _READS = 1 << 13, 128, 256  # 32 MiB


def measure_reads(folder: Path, *, seconds: float = 0.3) -> float | None:
    """Records a second from a file of 32 MiB that is written there, dropped from the page cache and deleted again; None where a page
    cache cannot be dropped. A disk behind other caches answers faster than a table that is larger than they are will find it."""
    if not hasattr(os, "posix_fadvise"):
        return None
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".byrote-doctor-", buffering=0) as file:
        file.write(np.random.default_rng(0).bytes(_FILE_PAGES * PAGE))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        expect_random_reads(file.fileno())
        return _read_for(file.fileno(), seconds)


def _read_for(handle: int, seconds: float) -> float:
    """Every page is asked for at most once: what was read lies in the page cache again."""
    pages = np.random.default_rng(1).permutation(_FILE_PAGES // 2) * 2 * PAGE  # gaps, so that no two are read as one
    records_UB, done, start = torch.empty(_READS, _RECORD, dtype=torch.uint8), 0, time.perf_counter()
    while done < len(pages) and time.perf_counter() - start < seconds:
        read_records(handle, np.sort(pages[done : done + _READS]), records_UB)
        done += _READS
    return done / (time.perf_counter() - start)
