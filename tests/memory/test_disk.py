"""The table on disk: what it costs, what it keeps, and that neither a failing disk nor `kill -9` leaves half a generation.

This file is also the program that is killed: it imports torch once, and forks a writer whenever it is told to. Generation g of a writer
has one content, so a mixture of two would show.
"""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from byrote.errors import CapacityError, CheckpointError, ConfigError
from byrote.memory import disk
from byrote.memory.disk import DiskTable
from byrote.memory.table import DeviceTable, Slab
from byrote.memory.table_folder import TABLE, checksum
from tests.killing import Program, kill_at_call, program_of, serve

ROOT = Path(__file__).parents[2]
CALLS = ("open", "pwrite", "fsync", "replace", "unlink", "link", "mkdir")
N, E = 300, 3
OPTIONS = {"state_dim": 1, "std": 0.5, "seed": 3}
ALL = torch.arange(N)
SEGMENT_BYTES = 1000  # 50 records


def step(table, number: int) -> None:
    """What generation `number` changes: some rows again and again, some once."""
    generator = torch.Generator().manual_seed(number)
    rows = torch.cat((torch.arange(40), 40 + torch.randperm(N - 40, generator=generator)[:30])).sort()[0]
    table.put(rows, Slab(torch.full((70, E), float(number)), torch.full((70, 1), number / 2), torch.full((70,), number, dtype=torch.int32)))


def grown(folder: Path, first: int, last: int) -> None:
    """Generations first … last, each made durable, on what lies in `folder`."""
    table = DiskTable.open(folder) if (folder / TABLE).exists() else DiskTable.create(folder, N, E, **OPTIONS)
    for number in range(first, last + 1):
        step(table, number)
        table.flush(number)
    table.close()


def content(table) -> list[np.ndarray]:
    return [part.numpy().copy() for part in table.gather(ALL)]


def expected(generation: int) -> list[np.ndarray]:
    twin = DeviceTable(N, E, **OPTIONS)
    for number in range(1, generation + 1):
        step(twin, number)
    return content(twin)


def found(folder: Path) -> int:
    """The generation in `folder`, which must be whole."""
    table = DiskTable.open(folder)
    for got, want in zip(content(table), expected(table.generation), strict=True):
        assert (got == want).all(), f"generation {table.generation} is not what was written"
    table.verify()
    table.close()
    return table.generation


# --- the program that is killed ---------------------------------------------------------------------------------------


def no_fsync(handle: int) -> None:
    """What a process wrote survives it without; only a machine that stops needs more, and none does here. It is called all the same."""


def writer(folder: Path, first: int, last: int, call: int = 0) -> None:
    if call:
        kill_at_call(call, CALLS)
    grown(folder, first, last)


if __name__ == "__main__":
    disk._LEAST_SEGMENT, os.fsync = SEGMENT_BYTES, no_fsync
    serve(writer)


# --- what it is -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def small_segments_and_no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(disk, "_LEAST_SEGMENT", SEGMENT_BYTES)
    monkeypatch.setattr(os, "fsync", no_fsync)


def test_a_table_of_a_hundred_gigabytes_is_made_at_once_and_costs_nothing(tmp_path):
    table = DiskTable.create(tmp_path / "table", 400_000_000, 64, std=0.02)
    assert sum(path.stat().st_size for path in (tmp_path / "table").iterdir()) < 1000
    rows = torch.tensor([0, 123_456_789, 399_999_999])
    slab = table.gather(rows)
    assert slab.vectors_UE.std() > 0.01 and not slab.visits_U.any()
    table.put(rows, slab._replace(visits_U=slab.visits_U + 1))
    table.flush(1)
    table.close()
    again = DiskTable.open(tmp_path / "table")
    assert again.gather(rows).visits_U.tolist() == [1, 1, 1]
    assert again.touched == 3


def test_a_generation_costs_the_rows_that_changed(tmp_path):
    grown(tmp_path / "table", 1, 3)
    table = DiskTable.open(tmp_path / "table")
    before = {path.name for path in (tmp_path / "table").glob("*.rows")}
    table.put(torch.tensor([5]), table.gather(torch.tensor([5])))
    table.flush(4)
    new = [path for path in (tmp_path / "table").glob("*.rows") if path.name not in before]
    assert sum(path.stat().st_size for path in new) == table.format.bytes + 8


def test_what_was_not_flushed_is_gone_and_the_generation_before_is_whole(tmp_path):
    grown(tmp_path / "table", 1, 5)
    table = DiskTable.open(tmp_path / "table")
    step(table, 6)
    table.close()
    assert found(tmp_path / "table") == 5


def test_records_out_of_date_are_cleaned_away(tmp_path):
    table, twin = DiskTable.create(tmp_path / "table", N, E, **OPTIONS), DeviceTable(N, E, **OPTIONS)
    for number in range(1, 80):
        step(table, number)
        step(twin, number)
        assert table.records <= 2 * table.touched + 200, "the log stays within twice its content and a little"
        if number % 20 == 0:
            table.flush(number)
    table.flush(80)
    size = sum(path.stat().st_size for path in (tmp_path / "table").glob("*.rows"))
    assert size <= (2 * N + 200) * (table.format.bytes + 8)
    assert table.touched == N
    for got, want in zip(content(table), content(twin), strict=True):
        assert (got == want).all()
    table.close()
    again = DiskTable.open(tmp_path / "table")
    assert again.touched == table.touched == len(again.rows_touched()) and again.records == table.records
    for got, want in zip(content(again), content(twin), strict=True):
        assert (got == want).all()


def test_slots_are_used_again_so_a_table_never_runs_out(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_MOST_SLOTS", 1500)
    grown(tmp_path / "table", 1, 40)  # 2,800 records
    assert found(tmp_path / "table") == 40


def test_more_records_than_slots_is_an_error_that_loses_nothing(tmp_path, monkeypatch):
    grown(tmp_path / "table", 1, 3)
    monkeypatch.setattr(disk, "_MOST_SLOTS", 300)
    table = DiskTable.open(tmp_path / "table")
    with pytest.raises(CapacityError, match="rows_per_order"):
        deque((step(table, number) for number in range(4, 20)), maxlen=0)
    table.close()
    monkeypatch.undo()
    assert found(tmp_path / "table") == 3


def test_a_linked_copy_shares_the_segments_and_lives_on_alone(tmp_path):
    grown(tmp_path / "table", 1, 4)
    table = DiskTable.open(tmp_path / "table")
    digests = table.link_into(tmp_path / "copy")
    assert digests.keys() == {path.name for path in (tmp_path / "copy").glob("*.rows")}
    assert all(os.path.samefile(tmp_path / "table" / name, tmp_path / "copy" / name) for name in digests)
    for number in range(5, 40):
        step(table, number)
        table.flush(number)
    table.close()
    shutil.rmtree(tmp_path / "table")
    assert found(tmp_path / "copy") == 4


def test_without_hard_links_a_copy_is_a_copy(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    grown(tmp_path / "table", 1, 4)
    DiskTable.open(tmp_path / "table", read_only=True).link_into(tmp_path / "copy")
    shutil.rmtree(tmp_path / "table")
    assert found(tmp_path / "copy") == 4


def test_a_table_becomes_another_one_and_goes_on_from_there(tmp_path):
    grown(tmp_path / "saved", 1, 4)
    grown(tmp_path / "table", 1, 9)
    table = DiskTable.open(tmp_path / "table")
    table.adopt(tmp_path / "saved")
    step(table, 5)
    table.flush(5)
    table.close()
    assert found(tmp_path / "table") == 5
    assert found(tmp_path / "saved") == 4


@pytest.mark.parametrize("other", [(N + 1, E, {}), (N, E + 1, {}), (N, E, {"state_dim": 2}), (N, E, {"dtype": torch.bfloat16})])
def test_a_table_of_another_shape_is_not_taken_over(tmp_path, other):
    rows, dim, options = other
    DiskTable.create(tmp_path / "saved", rows, dim, **(OPTIONS | options))
    table = DiskTable.create(tmp_path / "table", N, E, **OPTIONS)
    step(table, 1)
    with pytest.raises(CheckpointError, match="the model needs"):
        table.adopt(tmp_path / "saved")
    for got, want in zip(content(table), expected(1), strict=True):
        assert (got == want).all()


def test_one_writer_at_a_time(tmp_path):
    table = DiskTable.create(tmp_path / "table", N, E, **OPTIONS)
    for another in (lambda: DiskTable.open(tmp_path / "table"), lambda: DiskTable.create(tmp_path / "table", N, E, **OPTIONS)):
        with pytest.raises(ConfigError, match="another run writes"):
            another()
    DiskTable.open(tmp_path / "table", read_only=True)
    table.close()
    DiskTable.open(tmp_path / "table").close()


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        DiskTable.create(tmp_path, N, E, **OPTIONS)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_rows_that_cannot_train_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="float16"):
        DiskTable.create(tmp_path / "table", N, E, dtype=torch.float16)


# --- damage -----------------------------------------------------------------------------------------------------------


def test_every_altered_byte_of_the_list_is_noticed(tmp_path):
    grown(tmp_path / "table", 1, 2)
    path, before = tmp_path / "table" / TABLE, expected(2)
    text = path.read_bytes()
    for place in range(len(text)):
        path.write_bytes(text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :])
        try:
            table = DiskTable.open(tmp_path / "table", read_only=True)
        except CheckpointError:
            continue
        for got, want in zip(content(table), before, strict=True):
            assert (got == want).all(), "white space may change, nothing else"


@pytest.mark.parametrize("harm", ["missing", "short", "altered", "ids outside", "elsewhere"])
def test_a_damaged_segment_is_named(tmp_path, harm):
    grown(tmp_path / "table", 1, 2)
    segment = sorted((tmp_path / "table").glob("*.rows"))[0]
    data = bytearray(segment.read_bytes())
    if harm == "missing":
        segment.unlink()
    elif harm == "short":
        segment.write_bytes(data[:-1])
    elif harm == "altered":
        data[3] ^= 1
        segment.write_bytes(data)
    elif harm == "ids outside":
        data[-8:] = (N).to_bytes(8, "little")
        segment.write_bytes(data)
    else:
        about = json.loads((tmp_path / "table" / TABLE).read_text())
        del about["checksum"]
        about["segments"][0]["name"] = "../00000001.rows"
        (tmp_path / "table" / TABLE).write_text(json.dumps(about | {"checksum": checksum(about)}))
    with pytest.raises(CheckpointError, match=r"\d+\.rows"):
        DiskTable.open(tmp_path / "table", read_only=True).verify()


def test_a_table_of_a_newer_byrote_says_so(tmp_path):
    DiskTable.create(tmp_path / "table", N, E, **OPTIONS).close()
    about = json.loads((tmp_path / "table" / TABLE).read_text()) | {"format": 2}
    del about["checksum"]
    (tmp_path / "table" / TABLE).write_text(json.dumps(about | {"checksum": checksum(about)}))
    with pytest.raises(CheckpointError, match="Update byrote"):
        DiskTable.open(tmp_path / "table")


# --- failing disks and killed writers ---------------------------------------------------------------------------------


def test_an_error_of_any_call_leaves_a_whole_generation(tmp_path, monkeypatch):
    """Every call fails in turn, with the disk full; afterwards the table goes on, and what was durable is found again."""
    grown(tmp_path / "start", 1, 6)
    for failing in itertools.count(1):
        folder, count = tmp_path / str(failing), itertools.count(1)
        shutil.copytree(tmp_path / "start", folder)

        def faulty(call: Callable, failing=failing, count=count) -> Callable:
            def wrapped(*arguments, **named):
                if next(count) == failing:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return call(*arguments, **named)

            return wrapped

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, faulty(getattr(os, name)))
            try:
                grown(folder, 7, 8)
                failed = False
            except (OSError, CheckpointError):  # the latter of a segment that cannot be opened
                failed = True
        generation = found(folder)
        assert 6 <= generation <= 8
        grown(folder, generation + 1, 9)
        assert found(folder) == 9
        shutil.rmtree(folder)
        if not failed:
            break
    assert failing > 20 and generation == 8, "the calls of two generations were tried"


def test_a_put_that_fails_can_be_made_again(tmp_path, monkeypatch):
    table = DiskTable.create(tmp_path / "table", N, E, **OPTIONS)
    step(table, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "bad sector")))
        with pytest.raises(OSError, match="bad sector"):
            step(table, 2)
    step(table, 2)
    table.flush(2)
    table.close()
    assert found(tmp_path / "table") == 2


def test_writes_that_come_in_pieces_are_completed(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: pwrite(handle, data[:100], at))
    grown(tmp_path / "table", 1, 3)
    assert found(tmp_path / "table") == 3


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    with program_of(__file__) as running:
        yield running


def kill_at_random(program: Program, folder: Path, times: int) -> None:
    moments, generation = random.Random(times), 0
    for _ in range(times):
        pid = program.start(folder, generation + 1, generation + 10**6)
        time.sleep(moments.uniform(0.0, 0.08))
        os.kill(pid, signal.SIGKILL)
        assert program.signal() == signal.SIGKILL
        if (folder / TABLE).exists():
            before, generation = generation, found(folder)
            assert generation >= before, "what was durable is gone"
        if generation > 400:  # the twin is made anew each time; keep it short
            shutil.rmtree(folder)
            generation = 0


def test_killed_at_a_random_moment_the_table_is_a_whole_generation(program, tmp_path):
    kill_at_random(program, tmp_path / "table", 20)


def test_killed_at_any_call_the_table_is_a_whole_generation(program, tmp_path):
    grown(tmp_path / "start", 1, 6)
    for call in itertools.count(1):
        folder = tmp_path / str(call)
        shutil.copytree(tmp_path / "start", folder)
        program.start(folder, 7, 8, call)
        killed = program.signal() == signal.SIGKILL
        assert found(folder) in ((6, 7, 8) if killed else (8,))
        shutil.rmtree(folder)
        if not killed:
            break
    assert call > 20, "the calls of two generations were tried"


@pytest.mark.torture
def test_killed_a_thousand_times_the_table_is_a_whole_generation(program, tmp_path):
    kill_at_random(program, tmp_path / "table", 1000)
