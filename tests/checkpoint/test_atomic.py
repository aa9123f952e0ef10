"""Written beside and renamed: at every call that can fail, and in every order of crashes, a whole version stands."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from byrote.checkpoint.atomic import ASIDE, TEMPORARY, make_folder, remove_folder, replace_file, replacing_folder, standing, write_new

CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink")


class Faults:
    """Counts the calls of `os` that change a disk and lets the `at`-th fail; with `dead`, all after it too, as if the process were gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at, self.dead = 0, 0, False
        for name in CALLS:
            monkeypatch.setattr(os, name, self._faulty(getattr(os, name)))

    def _faulty(self, call: Callable) -> Callable:
        def faulty(*args, **kwargs):
            self.count += 1
            if self.at and (self.count == self.at or (self.dead and self.count > self.at)):
                raise OSError(errno.EIO, "injected")
            return call(*args, **kwargs)

        return faulty

    def trial(self, at: int, dead: bool, act: Callable[[], None]) -> bool:
        """Whether `act` failed when the `at`-th call did."""
        self.count, self.at, self.dead = 0, at, dead
        try:
            act()
        except OSError:
            return True
        finally:
            self.at = 0
        return False


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


def fill(target: Path, text: str) -> None:
    """A folder of two files and a folder, all saying `text`."""
    with replacing_folder(target) as folder:
        write_new(folder / "a", [text.encode(), b""])
        make_folder(folder / "inner")
        write_new(folder / "inner" / "b", [text.encode()])


def interrupted_fill(target: Path) -> None:
    with replacing_folder(target) as folder:
        write_new(folder / "a", [b"half"])
        raise KeyboardInterrupt


def version(target: Path) -> str:
    """What the standing version says, which must be whole."""
    folder = standing(target)
    texts = {path.read_text() for path in (folder / "a", folder / "inner" / "b")}
    assert len(texts) == 1 and len(list(folder.iterdir())) == 2
    return texts.pop()


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith((TEMPORARY, ASIDE))]


def attempts(faults: Faults, dead: bool, act: Callable[[], None]) -> Iterator[int]:
    """Lets `act` fail at its first call, its second …; yields after each failure, and ends when `act` got through."""
    at = 1
    while faults.trial(at, dead, act) or at <= faults.count:
        yield at
        at += 1
    assert at > 5, "nothing was tried"


@pytest.mark.parametrize("dead", [False, True], ids=["one call fails", "nothing works afterwards"])
def test_a_replaced_folder_is_the_old_or_the_new_one_whichever_call_fails(tmp_path: Path, faults: Faults, dead: bool) -> None:
    target = tmp_path / "target"
    fill(target, "old")
    for _ in attempts(faults, dead, lambda: fill(target, "new")):
        assert version(target) in ("old", "new")
        assert dead or target.exists(), "a writer that lives puts back what it moved"
        fill(target, "old")
        assert version(target) == "old" and not leftovers(tmp_path)
    assert version(target) == "new"


@pytest.mark.parametrize("dead", [False, True], ids=["one call fails", "nothing works afterwards"])
def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path: Path, faults: Faults, dead: bool) -> None:
    number = iter(range(1000))
    for at in attempts(faults, dead, lambda: fill(tmp_path / str(next(number)), "new")):
        target = tmp_path / str(at - 1)
        assert not standing(target).exists() or version(target) == "new"


@pytest.mark.parametrize("dead", [False, True], ids=["one call fails", "nothing works afterwards"])
def test_a_replaced_file_is_the_old_or_the_new_one_whichever_call_fails(tmp_path: Path, faults: Faults, dead: bool) -> None:
    target = tmp_path / "deep" / "file"
    replace_file(target, b"old")
    for _ in attempts(faults, dead, lambda: replace_file(target, b"new")):
        assert target.read_bytes() in (b"old", b"new")
        replace_file(target, b"old")
        assert not leftovers(target.parent)
    assert target.read_bytes() == b"new"


def test_a_removed_folder_is_never_seen_in_part(tmp_path: Path, faults: Faults) -> None:
    target = tmp_path / "target"
    for _ in attempts(faults, True, lambda: remove_folder(target) if target.exists() else fill(target, "it")):
        assert not target.exists() or version(target) == "it"


def test_an_error_inside_the_block_changes_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "target", "old")
    with pytest.raises(KeyboardInterrupt):
        interrupted_fill(tmp_path / "target")
    assert version(tmp_path / "target") == "old" and not leftovers(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to know what is synced")
def test_all_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    sync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (log.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))), sync(handle)))
    monkeypatch.setattr(os, "rename", lambda old, new: (log.append("rename"), rename(old, new)))
    fill(tmp_path / "deep" / "target", "new")
    assert log.pop(0) == tmp_path.name, "the new parent is an entry of its own parent"
    before, after = log[: log.index("rename")], log[log.index("rename") + 1 :]
    assert before.index("a") < len(before) - 1 and before.index("b") < before.index("inner", before.index("b"))
    assert before[-1].startswith(f"{TEMPORARY}target")
    assert after == ["deep"]


def test_leftovers_of_a_writer_that_is_still_writing_stay(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "slow") as slow:
        write_new(slow / "a", [b"slow"])
        fill(tmp_path / "quick", "quick")
        assert slow.exists()
    assert (tmp_path / "slow" / "a").read_bytes() == b"slow"
    assert not leftovers(tmp_path)


def test_the_last_of_several_writers_is_protected_too(tmp_path: Path) -> None:
    first, second = replacing_folder(tmp_path / "first"), replacing_folder(tmp_path / "second")
    first.__enter__()
    folder = second.__enter__()
    first.__exit__(None, None, None)
    fill(tmp_path / "third", "quick")
    assert folder.exists()
    second.__exit__(None, None, None)
    assert sorted(os.listdir(tmp_path)) == ["first", "second", "third"]


def test_without_locks_only_old_leftovers_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.EBADF, "this file system cannot lock folders")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    young, old = tmp_path / f"{TEMPORARY}young", tmp_path / f"{TEMPORARY}old"
    for folder in (young, old):
        folder.mkdir()
    os.utime(old, (0, 0))
    fill(tmp_path / "target", "new")
    assert young.exists() and not old.exists() and version(tmp_path / "target") == "new"


def test_what_only_looks_temporary_stays(tmp_path: Path) -> None:
    for name in (".tmp-mine", ".old-mine", "tmp"):
        (tmp_path / name).mkdir()
    fill(tmp_path / "target", "new")
    assert sorted(os.listdir(tmp_path)) == [".old-mine", ".tmp-mine", "target", "tmp"]


def test_files_are_as_readable_as_the_user_wants(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        fill(tmp_path / "target", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "target" / "a").stat().st_mode & 0o777 == 0o640
