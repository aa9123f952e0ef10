"""The corpus that is already there: the source code of Python's own standard library.

Some 11 to 31 MB of well-kept source (builds differ: some leave the tests out), in the public eye and on every machine that can
run byrote at all, so that a first training needs no download. Taken are the .py files below `sysconfig`'s stdlib folder, less
installed packages, caches, and links that lead elsewhere.
"""

import functools
import platform
import sysconfig
from pathlib import Path
from typing import NamedTuple

from byrote.data.files import list_files
from byrote.errors import DataError

NAME = "python-stdlib"
FEWEST_FILES = 200  # a Python that keeps its library in a zip archive or compiled has fewer
LEAST_BYTES = 4_000_000


class CorpusFacts(NamedTuple):
    python: str  # implementation, version and build: the corpus differs between them
    num_files: int
    num_bytes: int


def stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


@functools.cache
def stdlib_files() -> tuple[Path, ...]:
    """The .py files of the standard library, sorted. Raises DataError where this Python does not carry them as source."""
    root = stdlib_root()
    files = tuple(file for file in list_files(root, links_out=False) if file.suffix == ".py") if root.is_dir() else ()
    num_bytes = sum(file.stat().st_size for file in files)
    if len(files) < FEWEST_FILES or num_bytes < LEAST_BYTES:
        raise DataError(
            f"this Python carries only {len(files)} source files ({num_bytes / 1e6:.1f} MB) of its standard library at {root}; "
            "train on text of your own instead: --data.sources FOLDER"
        )
    return files


def corpus_facts() -> CorpusFacts:
    """Which corpus this machine has, for every report that quotes a number measured on it."""
    build = " ".join((platform.python_implementation(), platform.python_version(), *platform.python_build()))
    files = stdlib_files()
    return CorpusFacts(build, len(files), sum(file.stat().st_size for file in files))
