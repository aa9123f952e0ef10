"""Every store is the same table: whatever is read, put, read ahead, flushed or opened again, the bits are those of the table in memory."""

import itertools
import time
from pathlib import Path

import pytest
import torch

from byrote.errors import ConfigError, MemoryPackError
from byrote.memory import disk
from byrote.memory.cache import CachedTable
from byrote.memory.config import TableConfig
from byrote.memory.disk import DiskTable
from byrote.memory.file import FileTable
from byrote.memory.host import HostTable
from byrote.memory.place import find_cache, innermost, place_table
from byrote.memory.prefetch import BackgroundTable, overlay
from byrote.memory.records import RowFormat
from byrote.memory.table import DeviceTable, Slab
from tests.tolerances import assert_bitwise

N, E, S = 700, 5, 2
BYTES_A_ROW = 4 * E + 4 * S + 4 + 17
ALL = torch.arange(N)
DTYPES = [torch.float32, torch.bfloat16]


def options(dtype=torch.float32, std=0.5):
    return {"state_dim": S, "dtype": dtype, "std": std, "seed": 3}


def on_disk(folder: Path, **more) -> DiskTable:
    return DiskTable.create(folder / "table", N, E, **options(**more))


STORES = {
    "host": lambda folder, **more: HostTable(DeviceTable(N, E, **options(**more))),
    "disk": on_disk,
    "cached disk": lambda folder, **more: CachedTable(on_disk(folder, **more), 40 * BYTES_A_ROW),
    "disk cached whole": lambda folder, **more: CachedTable(on_disk(folder, **more), 1 << 20),
    "disk in the background": lambda folder, **more: BackgroundTable(HostTable(CachedTable(on_disk(folder, **more), 80 * BYTES_A_ROW))),
    "memory in the background": lambda folder, **more: BackgroundTable(DeviceTable(N, E, **options(**more))),
    "cached memory": lambda folder, **more: CachedTable(DeviceTable(N, E, **options(**more)), 24 * BYTES_A_ROW),
}


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """Of some 60 records, so that a few puts fill several and cleaning begins."""
    monkeypatch.setattr(disk, "_LEAST_SEGMENT", 2400)


def some_rows(count: int) -> torch.Tensor:
    return torch.randperm(N)[:count].sort()[0]


def some_slab(count: int, dtype: torch.dtype) -> Slab:
    return Slab(torch.randn(count, E).to(dtype), torch.randn(count, S), torch.randint(0, 99, (count,), dtype=torch.int32))


def assert_same(got: Slab, want: Slab) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert_bitwise(ours, theirs)


def put_in_both(store, twin, rows: torch.Tensor) -> None:
    slab = some_slab(len(rows), twin.dtype)
    store.put(rows, Slab(*(part.clone() for part in slab)))
    twin.put(rows, slab)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STORES)
def test_a_store_is_the_table_in_memory(name, dtype, tmp_path):
    store, twin = STORES[name](tmp_path, dtype=dtype), DeviceTable(N, E, **options(dtype))
    assert (store.num_rows, store.dim, store.state_dim, store.dtype, store.device.type) == (N, E, S, dtype, "cpu")
    assert_same(store.gather(ALL), twin.gather(ALL))
    for step in range(60):
        rows = some_rows((0, 1, 7, 100, 257)[step % 5])
        ticket = store.prefetch(rows)
        put_in_both(store, twin, some_rows(90))
        put_in_both(store, twin, some_rows(3))
        assert_same(ticket.wait(), twin.gather(rows))
        others = some_rows(50)
        assert_bitwise(store.read(others), twin.read(others))
        assert_same(store.gather(others), twin.gather(others))
        if step % 7 == 0:
            store.flush(step)
    assert_same(store.gather(ALL), twin.gather(ALL))
    store.close()


@pytest.mark.parametrize("name", STORES)
def test_a_table_of_zeros_starts_with_zeros(name, tmp_path):
    for got, want in zip(STORES[name](tmp_path, std=0.0).gather(ALL), DeviceTable(N, E, state_dim=S).gather(ALL), strict=True):
        assert_bitwise(got, want)  # in bits: 0 and −0 differ
        assert not got.any()


@pytest.mark.parametrize("name", STORES)
def test_changing_what_was_read_changes_no_store(name, tmp_path):
    store, twin = STORES[name](tmp_path), DeviceTable(N, E, **options())
    rows = some_rows(20)
    for _ in range(2):  # from the store, then from its cache
        for part in store.gather(rows):
            part.fill_(7)
    assert_same(store.gather(rows), twin.gather(rows))


# --- the cache --------------------------------------------------------------------------------------------------------


class Counting(DeviceTable):
    """Remembers how many rows each call was about."""

    def __init__(self):
        super().__init__(N, E, **options())
        self.gathered, self.written = [], []

    def gather(self, rows_U):
        self.gathered.append(rows_U.tolist())
        return super().gather(rows_U)

    def put(self, rows_U, slab):
        assert rows_U.tolist() == sorted(set(rows_U.tolist())), "rows are unique and ascending in every call"
        self.written.append(rows_U.tolist())
        super().put(rows_U, slab)


def test_rows_that_are_kept_are_not_read_again_and_the_hit_rate_says_so():
    store = Counting()
    cache = CachedTable(store, 1 << 20)
    cache.gather(torch.arange(30))
    cache.gather(torch.arange(20, 50))
    assert store.gathered == [list(range(30)), list(range(30, 50))]
    assert (cache.hits, cache.lookups, cache.hit_rate) == (10, 60, 1 / 6)


def test_a_row_updated_many_times_is_written_once():
    store = Counting()
    cache = CachedTable(store, 1 << 20)
    for _ in range(9):
        cache.put(torch.tensor([3, 5]), some_slab(2, torch.float32))
    assert store.written == []
    cache.flush(1)
    cache.flush(2)
    assert store.written == [[3, 5]]


def test_a_cache_keeps_to_its_bytes_and_keeps_what_was_used_last():
    store = Counting()
    cache = CachedTable(store, 10 * 8 * BYTES_A_ROW)
    assert cache.cache_bytes == 10 * 8 * BYTES_A_ROW
    hot = torch.arange(40)
    for cold in torch.arange(40, N).split(10):
        cache.gather(hot)
        cache.gather(cold)
    assert sum(row < 40 for rows in store.gathered for row in rows) == 40, "hot rows were read once"


def test_with_room_for_all_rows_nothing_is_ever_lost():
    store = Counting()
    cache = CachedTable(store, 1 << 20)
    for rows in itertools.chain(ALL.split(9), ALL.split(100)):
        cache.gather(rows)
    assert sum(map(len, store.gathered)) == N


def test_a_cache_without_room_for_a_set_is_refused():
    with pytest.raises(ConfigError, match="no room"):
        CachedTable(Counting(), 100)


def test_a_failed_write_loses_no_row(monkeypatch):
    store, twin = Counting(), DeviceTable(N, E, **options())
    cache = CachedTable(store, 8 * BYTES_A_ROW)
    put_in_both(cache, twin, torch.arange(8))

    def fail(rows_U, slab):
        raise OSError("no space")

    monkeypatch.setattr(store, "put", fail)
    with pytest.raises(OSError, match="no space"):
        cache.gather(torch.arange(8, 16))
    monkeypatch.undo()
    assert_same(cache.gather(torch.arange(16)), twin.gather(torch.arange(16)))


# --- reading ahead ----------------------------------------------------------------------------------------------------


class Slow(DeviceTable):
    """Takes its time, and asserts that it is not disturbed meanwhile."""

    busy = False

    def _slowly(self, work, *arguments):
        assert not self.busy, "two callers at once"
        self.busy = True
        time.sleep(0.01)
        result = work(*arguments)
        self.busy = False
        return result

    def gather(self, rows_U):
        return self._slowly(super().gather, rows_U)

    def put(self, rows_U, slab):
        return self._slowly(super().put, rows_U, slab)


def test_a_slow_store_sees_one_caller_and_every_ticket_sees_every_put():
    store, twin = BackgroundTable(Slow(N, E, **options())), DeviceTable(N, E, **options())
    tickets = []
    for _ in range(8):
        rows = some_rows(300)
        tickets.append((store.prefetch(rows), rows))
        put_in_both(store, twin, some_rows(200))
        if len(tickets) > 3:
            ticket, asked = tickets.pop(0)
            assert_same(ticket.wait(), twin.gather(asked))
    assert_same(store.gather(ALL), twin.gather(ALL))
    for ticket, asked in tickets:
        assert_same(ticket.wait(), twin.gather(asked))
    store.close()


def test_the_same_batch_twice_running_reads_the_first_update():
    store, rows = BackgroundTable(Slow(N, E, **options())), some_rows(50)
    ticket, slab = store.prefetch(rows), some_slab(50, torch.float32)
    store.put(rows, slab)
    assert_same(ticket.wait(), slab)
    second = some_slab(50, torch.float32)
    store.put(rows, second)
    assert_same(store.prefetch(rows).wait(), second)


def test_a_put_that_fails_in_the_background_is_raised_and_not_forgotten(tmp_path):
    table = on_disk(tmp_path)
    store = BackgroundTable(table)
    table.read_only = True
    store.put(torch.tensor([1]), some_slab(1, torch.float32))
    with pytest.raises(ConfigError, match="read-only"):
        store.flush(1)


def test_a_ticket_that_nobody_waits_for_costs_nothing():
    store = BackgroundTable(DeviceTable(N, E, **options()))
    store.prefetch(some_rows(9))
    store.flush(0)
    assert not list(store._tickets)


@pytest.mark.parametrize(("rows", "put"), [([], [1]), ([1], []), ([2, 4, 6], [1, 3, 7]), ([2, 4, 6], [4]), ([5], [1, 5, 9]), ([1, 9], [9])])
def test_an_overlay_changes_the_rows_both_hold(rows, put):
    rows, put = torch.tensor(rows, dtype=torch.int64), torch.tensor(put, dtype=torch.int64)
    slab, new = some_slab(len(rows), torch.float32), some_slab(len(put), torch.float32)
    want = [
        [(new if row in put else slab)[part][(put if row in put else rows).tolist().index(row)] for row in rows.tolist()]
        for part in range(3)
    ]
    overlay(rows, slab, put, new)
    for got, expected in zip(slab, want, strict=True):
        assert all(ours.equal(theirs) for ours, theirs in zip(got, expected, strict=True))


# --- a flat file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
def test_a_flat_file_is_the_table_it_was_written_from(dtype, tmp_path):
    format, vectors = RowFormat(dim=E, dtype=dtype), torch.randn(N, E)
    (tmp_path / "rows").write_bytes(b"head" + format.encode(vectors).numpy().tobytes())
    table = FileTable(tmp_path / "rows", N, format, offset=4)
    rows = some_rows(257)
    assert_bitwise(table.read(rows), format.decode_vectors(format.encode(vectors[rows])))
    assert_same(table.prefetch(rows).wait(), table.gather(rows))
    assert table.gather(rows).visits_U.tolist() == [0] * 257
    with pytest.raises(ConfigError, match="read-only"):
        table.put(rows, table.gather(rows))


def test_rows_are_checked_before_they_are_read(tmp_path):
    format, asked = RowFormat(dim=E), []
    (tmp_path / "rows").write_bytes(format.encode(torch.randn(N, E)).numpy().tobytes())
    table = FileTable(tmp_path / "rows", N, format, check=lambda rows: asked.append(rows.tolist()))
    table.read(torch.tensor([3, 600]))
    assert asked == [[3, 600]]


def test_a_flat_file_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "rows").write_bytes(bytes(N * 4 * E - 1))
    with pytest.raises(MemoryPackError, match=r"13,999 bytes.*14,000"):
        FileTable(tmp_path / "rows", N, RowFormat(dim=E))


def test_the_digest_of_a_flat_file_is_of_its_rows(tmp_path):
    content = RowFormat(dim=E).encode(torch.randn(N, E)).numpy().tobytes()
    digests = []
    for name, data in (("a", content), ("b", content), ("c", bytes(len(content)))):
        (tmp_path / name).write_bytes(data)
        digests.append(FileTable(tmp_path / name, N, RowFormat(dim=E)).digest())
    assert digests[0] == digests[1] != digests[2]


# --- where a table is put ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_ahead", [True, False])
@pytest.mark.parametrize("store", ["device", "host", "disk"])
def test_a_table_is_made_where_the_configuration_says(store, read_ahead, tmp_path):
    config = TableConfig(store=store, cache_bytes=9000, read_ahead=read_ahead)
    table = place_table(config, tmp_path / "here")(N, E, **options())
    assert isinstance(innermost(table), DiskTable if store == "disk" else DeviceTable)
    assert isinstance(table, BackgroundTable) == (read_ahead and store != "device")
    assert (find_cache(table) is not None) == (store == "disk")
    assert (tmp_path / "here").exists() == (store == "disk")
    assert_same(table.gather(ALL), DeviceTable(N, E, **options()).gather(ALL))


def test_what_cannot_be_configured_is_refused():
    with pytest.raises(ConfigError, match="'nvme'; allowed: device, host, disk"):
        TableConfig(store="nvme")
    with pytest.raises(ConfigError, match="cache_bytes"):
        TableConfig(cache_bytes=0)


def test_rows_from_a_file_land_on_the_cpu_unless_wrapped(tmp_path):
    with pytest.raises(ConfigError, match="HostTable"):
        on_disk(tmp_path).to("cuda")
