"""Files and folders that are there whole or not at all, whatever moment the process, or the machine, stops at.

A file system promises that a rename happens entirely or not at all, and nothing more. So everything is written beside its place
under a temporary name, forced to the disk, and renamed:

    mkdir .tmp-byrote-NAME-…   write the files in it   fsync each file, then the folder   rename to NAME   fsync the parent

A folder that stands in the way cannot be renamed over. It steps aside first, which takes two renames, and a crash between the two
leaves no NAME; then `.old-byrote-NAME` is the version that counts. `standing` knows this, and every reader asks it:

    stopped before the 1st rename      NAME is the old version                              (and a .tmp-byrote-… lies about)
    between the two                    .old-byrote-NAME is the old version                  (the same)
    after the 2nd                      NAME is the new version                              (and .old-byrote-NAME lies about)

What lies about is cleared by the next writer, unless it belongs to another process that is writing now. Writers hold a shared lock
on the parent folder; who can have it exclusively for a moment knows that nobody writes.
"""

import contextlib
import errno
import fcntl
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

TEMPORARY, ASIDE = ".tmp-byrote-", ".old-byrote-"
ABANDONED_AFTER_S = 24 * 3600  # for leftovers on file systems without locks
_LONGEST_WRITE = 1 << 26  # bytes a call: some systems refuse 2 GiB, and Ctrl-C is noticed between calls


def standing(target: Path) -> Path:
    """Where the whole version of folder `target` is: `target`, or what stepped aside for a writer that never finished."""
    return _aside(target) if not target.exists() and _aside(target).exists() else target


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill; when the block ends it is `target`, durably. If the block raises, nothing has happened."""
    make_folder(target.parent)
    with _writing_in(target.parent):
        fresh = _beside(target)
        try:
            os.mkdir(fresh)
            yield fresh
            _sync_tree(fresh)
            _swap(fresh, target)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise


def replace_file(target: Path, data: bytes) -> None:
    """`target` holds `data`, durably; until then it is what it was."""
    make_folder(target.parent)
    with _writing_in(target.parent):
        fresh = _beside(target)
        try:
            write_new(fresh, [data])
            _sync(fresh)
            os.replace(fresh, target)
            _sync(target.parent)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise


def remove_folder(folder: Path) -> None:
    """Delete `folder` in one step: no reader finds half of it."""
    with _writing_in(folder.parent):
        doomed = _beside(folder)
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)  # what cannot be deleted now is a leftover like any other


def write_new(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Create file `path` from `parts`. Durable once the folder around it is."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(handle, rest[:_LONGEST_WRITE]) :]
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """`folder` and the folders above it exist, durably."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):  # another process was faster
        os.mkdir(folder)
    _sync(folder.parent)


def _beside(target: Path) -> Path:
    return target.with_name(f"{TEMPORARY}{target.name}-{secrets.token_hex(4)}")


def _aside(target: Path) -> Path:
    return target.with_name(ASIDE + target.name)


def _swap(fresh: Path, target: Path) -> None:
    aside = _aside(target)
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
    try:
        os.rename(fresh, target)
    except BaseException:
        if aside.exists():
            os.rename(aside, target)
        raise
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(place, name))
        _sync(Path(place))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems cannot sync folders, and need not
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def _writing_in(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        least_age_s = _least_age(handle)
        if least_age_s is not None:
            _clear_leftovers(folder, least_age_s)
        with contextlib.suppress(OSError):  # no locks here: `_least_age` protects the other writers
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def _least_age(handle: int) -> float | None:
    """How many seconds old a leftover is at least; None while another process is writing, which owns some of what lies about."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError:
        return ABANDONED_AFTER_S
    return -math.inf


def _clear_leftovers(folder: Path, least_age_s: float) -> None:
    for entry in list(folder.iterdir()):
        if entry.name.startswith((TEMPORARY, ASIDE)) and time.time() - entry.lstat().st_mtime >= least_age_s:
            _clear(entry)


def _clear(entry: Path) -> None:
    target = entry.with_name(entry.name.removeprefix(ASIDE))
    if entry.name.startswith(ASIDE) and not target.exists():
        os.rename(entry, target)
    elif entry.is_dir():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)
