"""Where the checkpoints of a run lie, which is the newest, which may go.

    RUN/run.json   RUN/metrics.jsonl   RUN/tokenizer/
    RUN/checkpoints/step-00001200/     the state after 1200 optimizer steps

A checkpoint is complete when its manifest is there, is whole, and agrees with the names and sizes of the files. Only that is looked
at here, because it costs nothing; what the files hold is checked when one is loaded.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from byrote.checkpoint.atomic import ASIDE, remove_folder, standing
from byrote.checkpoint.manifest import MANIFEST, UnknownFormat, check_files, read_manifest
from byrote.errors import CheckpointError
from byrote.memory.pack import TABLE as PACKED_TABLE

CHECKPOINTS, CONFIG = "checkpoints", "config.json"
_STEP = re.compile(rf"(?:{re.escape(ASIDE)})?(step-(\d+))")
_SHOWN = 12  # names an error lists


def step_folder(run: str | os.PathLike[str], step: int) -> Path:
    """The folder that belongs to the state after `step` optimizer steps."""
    return Path(run) / CHECKPOINTS / f"step-{step:08d}"


def is_step_folder(folder: Path) -> bool:
    """Whether `folder` is the place of a run's checkpoint."""
    return folder.parent.name == CHECKPOINTS and _STEP.fullmatch(folder.name) is not None


def latest(run: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return newest_complete(Path(run) / CHECKPOINTS)


def newest_complete(checkpoints: Path) -> Path | None:
    """The newest complete one of a folder of checkpoints; one of a newer format counts, and loading it says so."""
    return next((folder for folder in _steps(checkpoints) if defect(folder) is None), None)


def prune(run: str | os.PathLike[str], keep: int) -> None:
    """Delete all that is older than the newest complete checkpoint, except the `keep` newest complete ones (at least one stays)."""
    complete = [folder for folder in _steps(Path(run) / CHECKPOINTS) if defect(folder) is None][: max(keep, 1)]
    if complete:
        for folder in _steps(complete[0].parent):
            if _number(folder) < _number(complete[0]) and folder not in complete:
                remove_folder(folder)


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a run or a checkpoint lies there."""
    folder = standing(Path(path).expanduser())
    return (folder / CHECKPOINTS).is_dir() or (folder / CONFIG).is_file()


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of a run. Raises CheckpointError that lists what is there."""
    path = Path(path).expanduser()
    folder = standing(path)
    if (folder / PACKED_TABLE).is_file():
        raise CheckpointError(f"{path} is a pack; give the folder of a run, or of a checkpoint, that has a model in it")
    if (folder / MANIFEST).is_file():
        return folder
    if (folder / CHECKPOINTS).is_dir():
        newest = latest(folder)
        if newest is None:
            raise CheckpointError(f"{path} is a run without a complete checkpoint. {_defects(folder / CHECKPOINTS)}")
        return newest
    raise CheckpointError(f"{path} is not a checkpoint: {_found(folder)}. Give the folder of a run, or of a checkpoint with its {MANIFEST}")


def defect(folder: Path) -> str | None:
    """Why a checkpoint is not complete, as far as can be told without reading all of it; None if it is."""
    try:
        check_files(folder, read_manifest(folder), checksums=False)
    except UnknownFormat:
        return None
    except CheckpointError as error:
        return str(error)
    return None


def listing(names: Iterable[str]) -> str:
    """Names for an error message, shortened."""
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _steps(checkpoints: Path) -> list[Path]:
    """Folders of steps, the newest first, each where its whole version stands."""
    if not checkpoints.is_dir():
        return []
    names = {match[1] for match in map(_STEP.fullmatch, os.listdir(checkpoints)) if match}
    return sorted((standing(checkpoints / name) for name in names), key=_number, reverse=True)


def _number(folder: Path) -> int:
    match = _STEP.fullmatch(folder.name)
    assert match is not None, f"{folder} is not the folder of a step"
    return int(match[2])


def _defects(checkpoints: Path) -> str:
    reasons = [reason for folder in _steps(checkpoints) if (reason := defect(folder))]
    return reasons[0] if reasons else f"{CHECKPOINTS}/ {_contents(checkpoints)}. Train it first, or give another folder"


def _found(path: Path) -> str:
    if path.is_dir():
        return f"it {_contents(path)}"
    if path.exists():
        return f"it is a file of {path.stat().st_size:,} bytes"
    above = next(folder for folder in path.absolute().parents if folder.is_dir())
    return f"it does not exist; {above} {_contents(above)}"


def _contents(folder: Path) -> str:
    names = os.listdir(folder)
    return f"holds {listing(names)}" if names else "is empty"
