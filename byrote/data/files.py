"""Which files of a folder belong to a corpus."""

import os
from collections.abc import Iterator
from pathlib import Path

PASSED_OVER = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})  # caches and other people's packages
VENV_MARK = "pyvenv.cfg"  # a folder that holds this file is a virtual environment, whatever its name


def list_files(root: Path, *, links_out: bool = True) -> list[Path]:
    """All files below `root`, sorted by their path part by part.

    Passed over: hidden files and folders, caches, virtual environments. Links to folders are never followed (they may form a
    ring); links to files are, unless `links_out` is false and they lead out of `root`.
    """
    files = list(_walk(root))
    if links_out:
        return files
    inside = root.resolve()
    return [file for file in files if not file.is_symlink() or file.resolve().is_relative_to(inside)]


def _walk(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    if any(entry.name == VENV_MARK for entry in found):
        return
    for entry in found:
        if entry.name.startswith(".") or entry.name in PASSED_OVER:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        elif entry.is_file():
            yield Path(entry.path)
