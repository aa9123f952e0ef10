"""The folder of a table on disk: its list of segments, who may write in it, and how it is replaced. What the list means: disk.py.

table.json is written beside and renamed, after the names of the segments it lists are on the disk; it carries its own checksum.
"""

import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from byrote.errors import CheckpointError, ConfigError
from byrote.memory.segment import Segment

TABLE, SUFFIX = "table.json", ".rows"
FORMAT = 1
_LOCK_WAIT_S = 1.0


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Until this returns, what stood in table.json counts."""
    beside = folder / f"{TABLE}.new"
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    with os.fdopen(handle, "wb") as file:
        file.write(json.dumps(about | {"checksum": checksum(about)}, indent=1).encode())
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)
    os.replace(beside, folder / TABLE)
    _sync_folder(folder)


def read_about(folder: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads((folder / TABLE).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / TABLE} cannot be read: {error}. Resume from another checkpoint") from error
    listed = about.pop("checksum", None) if isinstance(about, dict) else None
    if not isinstance(about, dict) or listed != checksum(about):
        raise CheckpointError(f"{folder / TABLE} was altered: its checksum does not agree with it. Resume from another checkpoint")
    if about["format"] != FORMAT:
        raise CheckpointError(f"{folder} has table format {about['format']}; this byrote reads {FORMAT}. Update byrote to open it")
    strange = [entry["name"] for entry in about["segments"] if not re.fullmatch(rf"\d+{re.escape(SUFFIX)}", entry["name"])]
    if strange:
        raise CheckpointError(f"{folder / TABLE} names {strange[0]!r}, which is no segment of a table. Resume from another checkpoint")
    return about


def checksum(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def make_room(folder: Path) -> None:
    """`folder` holds no table any more."""
    names = {name for name in os.listdir(folder) if not name.startswith(".")}
    strange = sorted(name for name in names if not name.startswith(TABLE) and not name.endswith(SUFFIX))
    if strange:
        raise ConfigError(f"a table cannot be made in {folder}: it holds {strange[0]}. Name another folder")
    for name in sorted(names, key=lambda name: name != TABLE):  # first what makes the rest a table
        (folder / name).unlink()


def link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def lock_folder(folder: Path) -> int:
    """An open handle that keeps other writers out of `folder`; −1 where the system has no such locks.

    A process that was killed gives its lock back a moment after it is gone, so a lock that is held is asked for again for a while.
    """
    import fcntl

    handle, until = os.open(folder, os.O_RDONLY), time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(0.01)
                continue
            os.close(handle)
            raise ConfigError(f"another run writes to the table in {folder}; stop it, or name another folder with --table.folder") from None
        except OSError:  # a file system without locks
            os.close(handle)
            return -1


def release(segments: list[Segment], lock: int | None) -> None:
    for segment in segments:
        segment.close()
    if lock is not None and lock >= 0:
        os.close(lock)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
