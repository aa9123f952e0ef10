"""What it costs to keep the memory table elsewhere than in RAM: training, decoding, looking up; and whether its size matters.

    python -m bench.bench_stores [training] [decode] [scaling] [limit] [lookup]      (none named: all)
                                 [--rounds 12] [--folder DIR]                        DIR: on the disk to be measured; 27 GB for lookup

training   steps of `tiny_cpu`, contenders in turn: RAM; disk with room in the cache for the whole table; disk with a cache of a tenth
           of it. The disk ones once with reading ahead, once one thing after another.
decode     one token at a time through the captured step, rows of every token read from RAM, or from disk; wall clock, and the CPU time of
           the thread, which neighbours on the machine disturb less (nothing waits: the file is in the page cache).
scaling    the same steps on disk with 1e5, 1e7 and 2e8 rows (2e8 × 64 float32: 51 GB that nobody writes).
limit      steps of a 20 GB table on disk, every row of it written before and none of it in the page cache, in a process of 2 GiB
           (RLIMIT_DATA, and where root may make one a memory control group, which bounds the page cache too): reading ahead, one
           thing after another, and the same steps in RAM without a limit. Losses and touched rows must be the same bits. 21 GB of disk.
lookup     rows of 128 bytes at random, 65,536 a call, from 1e5, 1e7 and 2e8 rows in one flat file whose every block was written, page
           cache dropped for the largest, beside what the machine can do: `index_select` on a warm buffer; threads of `os.preadv`.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.bench_memory import batches
from bench.measure import report, spread, take_turns
from byrote.kernels.counter_random import normal_rows
from byrote.memory.cache import CachedTable
from byrote.memory.config import TableConfig
from byrote.memory.disk import DiskTable
from byrote.memory.file import FileTable
from byrote.memory.host import HostTable
from byrote.memory.place import MakeTable, find_cache, innermost, place_table
from byrote.memory.prefetch import BackgroundTable
from byrote.memory.records import RowFormat
from byrote.memory.table import DeviceTable, Slab, TableStore
from byrote.model.capture import capture_or_model
from byrote.model.transformer import Model
from byrote.recipes import load_recipe
from byrote.train.loop import Trainer
from byrote.train.run import RunConfig

GB, GIB = 10**9, 2**30
ROW = RowFormat(dim=32)  # 128 bytes
LOOKUPS = 1 << 16
LIMIT_BYTES, LIMIT_TABLE = 2 * GIB, 20 * GB
LIMITED = ("disk, read ahead", "disk, synchronous", "RAM")


def with_rows(config: RunConfig, rows: int | None, **engram: Any) -> RunConfig:
    """The recipe with about `rows` rows in all of its table."""
    memory = config.model.engram
    assert memory is not None
    size = {} if rows is None else {"rows_per_order": rows // (memory.heads_per_layer * len(memory.layers))}
    return replace(config, model=replace(config.model, engram=replace(memory, **size, **engram)))


def stepper(config: RunConfig, make_table: MakeTable, data: list) -> tuple[Callable[[], Any], Trainer]:
    """A function that trains one step, the rows of the next one asked for before it, as a run does."""
    training = Trainer(Model(config.model, make_table=make_table), config, total_steps=1000)
    state = {"step": 0, "pending": training.read_ahead(data[:1])}

    def step() -> Any:
        index, pending = state["step"], state["pending"]
        state.update(step=index + 1, pending=training.read_ahead([data[(index + 1) % len(data)]]))
        return training.step(index % 1000, [data[index % len(data)]], pending)

    return step, training


def drop_page_cache(path: Path) -> bool:
    """Whether the system was made to forget what it read of a file, or of the files of a folder."""
    os.sync()
    for file in (path.iterdir() if path.is_dir() else [path]) if hasattr(os, "posix_fadvise") else []:
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")
        return True
    return False


# --- training ---------------------------------------------------------------------------------------------------------


def training(folder: Path, rounds: int) -> dict[str, Any]:
    config, made = load_recipe("tiny_cpu"), {}
    data = batches(config, 16)
    engram = config.model.engram
    assert engram is not None
    whole = 330 * engram.rows_per_order * engram.heads_per_layer  # bytes with directory, and some
    places = {
        "RAM": TableConfig(),
        "disk, fits, read ahead": TableConfig(store="disk", cache_bytes=whole),
        "disk, fits, synchronous": TableConfig(store="disk", cache_bytes=whole, read_ahead=False),
        "disk, a tenth fits, read ahead": TableConfig(store="disk", cache_bytes=whole // 10),
        "disk, a tenth fits, synchronous": TableConfig(store="disk", cache_bytes=whole // 10, read_ahead=False),
    }
    for number, (name, place) in enumerate(places.items()):
        made[name] = stepper(config, place_table(place, folder / f"training{number}"), data)
        for _ in range(20):  # every row of the data is touched, caches are warm
            made[name][0]()
        if cache := find_cache(made[name][1].model.memory.store):
            cache.hits = cache.lookups = 0
    seconds = take_turns({name: step for name, (step, _) in made.items()}, rounds=rounds, warm_up=1)
    caches = {name: find_cache(trainer.model.memory.store) for name, (_, trainer) in made.items()}
    result = {
        "step_seconds": {name: spread(values) for name, values in seconds.items()},
        "tokens_per_second_of_ram": {
            name: statistics.median(ram / other for ram, other in zip(seconds["RAM"], values, strict=True))
            for name, values in seconds.items()
        },
        "hit_rate": {name: round(cache.hit_rate, 4) for name, cache in caches.items() if cache},
        "rows_touched_per_step": made["RAM"][0]().rows_touched,
    }
    for _, trainer in made.values():
        trainer.model.memory.store.close()
    return result


def scaling(folder: Path, rounds: int) -> dict[str, Any]:
    config = load_recipe("tiny_cpu")
    data = batches(config, 16)
    sizes = {"1e5 rows": 10**5, "1e7 rows": 10**7, "2e8 rows": 2 * 10**8}
    made = {}
    for name, rows in sizes.items():
        made[name] = stepper(with_rows(config, rows), place_table(TableConfig(store="disk"), folder / f"scaling{rows}"), data)
    seconds = take_turns({name: step for name, (step, _) in made.items()}, rounds=rounds, warm_up=18)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for _, trainer in made.values():
        trainer.model.memory.store.close()
    return {
        "step_seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio_2e8_to_1e5": medians["2e8 rows"] / medians["1e5 rows"],
    }


# --- decode -----------------------------------------------------------------------------------------------------------


def decode(folder: Path, rounds: int) -> dict[str, Any]:
    return {recipe: decode_of(recipe, folder / recipe, 16 * rounds) for recipe in ("tiny_cpu", "small")}


def decode_of(recipe: str, folder: Path, tokens: int) -> dict[str, Any]:
    """Seconds a token from stores with the same rows, every one of them written."""
    config = load_recipe(recipe).model
    model = Model(config).eval()
    assert model.memory is not None and config.engram is not None
    ram = model.memory.store
    shape, options = (ram.num_rows, ram.dim), {"std": config.engram.table_std, "dtype": ram.dtype}
    stores = {"RAM": ram}
    for name, cache in (("disk", 1), ("disk, hot rows in RAM", 1 << 28)):
        place = TableConfig(store="disk", cache_bytes=max(cache, 10**5))
        stores[name] = place_table(place, folder / str(cache))(*shape, **options)
    for name in ("disk", "disk, hot rows in RAM"):
        for rows_U in torch.arange(ram.num_rows).split(1 << 16):
            stores[name].put(rows_U, ram.gather(rows_U))
        stores[name].flush(1)
    stores["disk"] = HostTable(innermost(stores["disk"]))  # as `byrote.load` opens it: no cache, no thread
    clocks = decode_in_turn(model, stores, warm_up=16, tokens=tokens)
    return {"tokens": tokens} | {clock: beside_ram(seconds) for clock, seconds in clocks.items()}


def beside_ram(seconds: dict[str, list[float]]) -> dict[str, Any]:
    pairs = {name: [taken - ram for taken, ram in zip(values, seconds["RAM"], strict=True)] for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    overhead = {name: statistics.median(values) for name, values in pairs.items()}
    return {
        "microseconds_per_token": {name: 1e6 * value for name, value in medians.items()},
        "overhead_microseconds": {name: 1e6 * value for name, value in overhead.items()},
        "overhead_quartiles": {name: [1e6 * value for value in statistics.quantiles(values)[::2]] for name, values in pairs.items()},
        "speed_of_ram": {name: medians["RAM"] / (medians["RAM"] + value) for name, value in overhead.items()},
    }


@torch.inference_mode()
def decode_in_turn(model: Model, stores: dict[str, Any], *, warm_up: int, tokens: int) -> dict[str, dict[str, list[float]]]:
    """Clock → store → seconds of every token, each spoken with every store before the next one, so that a machine that drifts drifts
    for all; which store comes first changes from token to token."""
    step = capture_or_model(model)[0]
    states, token = {name: model.new_state(1) for name in stores}, torch.zeros(1, 1, dtype=torch.int64)
    clocks: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in stores} for clock in clocks}
    names = list(stores)
    for number in range(warm_up + tokens):
        said = set()
        for name in names[number % len(names) :] + names[: number % len(names)]:
            model.memory.store = stores[name]
            start = {clock: read() for clock, read in clocks.items()}
            spoken = step(token, state=states[name]).logits[:, -1:].argmax(-1)
            for clock, read in clocks.items():
                seconds[clock][name].append(read() - start[clock])
            said.add(int(spoken))
        assert len(said) == 1, "every store must say the same"
        token = (spoken + 1 + number) % model.config.vocab_size  # not the same few tokens again and again
    return {clock: {name: values[warm_up:] for name, values in taken.items()} for clock, taken in seconds.items()}


# --- more table than memory -------------------------------------------------------------------------------------------


def limit(folder: Path, rounds: int) -> dict[str, Any]:
    """All in processes of their own, one after the other and a second time in the other order."""
    seconds = write_table(folder / "full")
    outcomes: dict[str, list[dict[str, Any]]] = {place: [] for place in LIMITED}
    for place in (*LIMITED, *reversed(LIMITED)):
        drop_page_cache(folder / "full")
        command = [sys.executable, "-m", "bench.bench_stores", "--limited", place, "--folder", str(folder), "--rounds", str(rounds)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{place} ended with {done.returncode}: {done.stderr[-2000:]}"
        outcomes[place].append(json.loads(done.stdout.splitlines()[-1]))
    for name in ("losses", "rows", "touched"):
        assert len({str(one[name]) for ones in outcomes.values() for one in ones}) == 1, f"{name} differ: {outcomes}"
    steps = {place: [taken for one in ones for taken in one["step_seconds"]] for place, ones in outcomes.items()}
    medians = {place: statistics.median(values) for place, values in steps.items()}
    return {
        "bitwise_equal": True,
        "table_bytes": LIMIT_TABLE,
        "limit_bytes": LIMIT_BYTES,
        "seconds_to_write_it": seconds,
        "step_seconds": {place: spread(values) for place, values in steps.items()},
        "medians_of_each_run": {place: [statistics.median(one["step_seconds"]) for one in ones] for place, ones in outcomes.items()},
        "speed_of_ram": {place: medians["RAM"] / value for place, value in medians.items()},
        "hit_rate": {place: ones[0]["hit_rate"] for place, ones in outcomes.items()},
        "limits": outcomes[LIMITED[0]][0]["limits"],
        "peak_bytes": {place: ones[0]["peak_bytes"] for place, ones in outcomes.items()},
        "rows_touched": outcomes["RAM"][0]["touched"],
    }


def limited_config() -> RunConfig:
    return with_rows(load_recipe("tiny_cpu"), LIMIT_TABLE // 256, table_std=0.0)


def write_table(folder: Path) -> float:
    """A table in which every row has a record; seconds it took."""
    memory, start = Model(limited_config().model).memory, time.perf_counter()
    assert memory is not None
    table = DiskTable.create(folder, memory.store.num_rows, memory.store.dim)
    for rows_U in torch.arange(table.num_rows).split(1 << 17):
        table.put(rows_U, written(rows_U, table.dim))
    table.flush(1)
    table.close()
    return time.perf_counter() - start


def written(rows_U: torch.Tensor, dim: int) -> Slab:
    return Slab(normal_rows(rows_U, dim, std=0.02), torch.zeros(len(rows_U), 1), torch.zeros(len(rows_U), dtype=torch.int32))


def limited(place: str, folder: Path, steps: int) -> None:
    """Train, and print what came of it. In RAM rows are zero but for those the batches touch, so that it takes the pages of these alone."""
    limits = [] if place == "RAM" else set_limits()
    config = limited_config()
    data = batches(config, steps + 1)

    def opened(*_: int, **__: Any) -> TableStore:
        store = HostTable(CachedTable(DiskTable.open(folder / "full"), TableConfig().cache_bytes))
        return BackgroundTable(store) if place == LIMITED[0] else store

    step, trainer = stepper(config, DeviceTable if place == "RAM" else opened, data)
    store, memory, seconds, losses = trainer.model.memory.store, trainer.model.memory, [], []
    touched = [torch.unique(memory.global_rows(batch.tokens_BT, batch.document_BT)) for batch in data]
    for rows_U in touched if place == "RAM" else []:
        store.put(rows_U, written(rows_U, store.dim))
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(step().losses["next_token"].item().hex())
        seconds.append(time.perf_counter() - start)
    cache, digest = find_cache(store), hashlib.sha256()
    hit_rate = None if cache is None else cache.hit_rate
    for rows_U in touched[:steps]:
        for part in store.gather(rows_U):
            digest.update(part.numpy().tobytes())
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = {
        "losses": losses,
        "rows": digest.hexdigest(),
        "touched": sum(map(len, touched[:steps])),
        "limits": limits,
        "peak_bytes": peak,
    }
    print(json.dumps(outcome | {"hit_rate": hit_rate, "step_seconds": seconds[3:]}))
    store.close()


def set_limits() -> list[str]:
    """Hold this process to LIMIT_BYTES; returns by what means."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
    means = ["RLIMIT_DATA"]
    for root, file in ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max")):
        with contextlib.suppress(OSError):
            group = root / f"byrote-bench-{os.getpid()}"
            group.mkdir()
            (group / file).write_text(str(LIMIT_BYTES))
            (group / "cgroup.procs").write_text(str(os.getpid()))
            return [*means, f"control group ({file})"]
    return means


# --- looking up -------------------------------------------------------------------------------------------------------


def lookup(folder: Path, rounds: int) -> dict[str, Any]:
    path, rows = folder / "rows.bin", 2 * 10**8
    write_rows(path, rows)
    sizes = {f"{count:.0e}".replace("e+0", "e"): count for count in (10**5, 10**7, rows)}
    result = {name: lookup_of(path, count, rounds, cold=count == rows) for name, count in sizes.items()}
    path.unlink()
    return {"rows_per_second": result, "row_bytes": ROW.bytes, "rows_a_call": LOOKUPS}


def write_rows(path: Path, rows: int) -> None:
    """Every block of the file holds data."""
    assert shutil.disk_usage(path.parent).free > rows * ROW.bytes + 5 * GB, f"{path.parent} lacks {rows * ROW.bytes / GB:.0f} GB"
    block = np.random.default_rng(0).standard_normal((1 << 17, ROW.dim), np.float32)
    with open(path, "wb", buffering=0) as file:
        for start in range(0, rows, len(block)):
            block[:, 0] = np.arange(start, start + len(block))
            file.write(block[: rows - start].tobytes())
        os.fsync(file.fileno())


def lookup_of(path: Path, rows: int, rounds: int, *, cold: bool) -> dict[str, Any]:
    """Rows a second, each round at rows never asked for before; the file is cold, or all of it in the page cache."""
    table, rng = FileTable(path, rows, ROW), np.random.default_rng(rows)
    wanted = lambda: np.unique(rng.integers(0, rows, LOOKUPS))  # noqa: E731
    counts: dict[str, list[float]] = {"gather": [], "preadv threads": []}
    cold = drop_page_cache(path) and cold
    warm = None if cold else torch.from_numpy(np.fromfile(path, np.float32, rows * ROW.dim)).view(rows, ROW.dim)
    counts |= {} if warm is None else {"index_select": []}
    work = {
        "gather": table.read,
        "preadv threads": lambda rows_U: preadv_threads(path, rows_U.numpy()),
        "index_select": lambda rows_U: warm[rows_U],
    }
    with ThreadPoolExecutor(32) as pool:
        preadv_threads.pool = pool  # type: ignore[attr-defined]
        for _ in range(rounds):
            for name, taken in counts.items():
                rows_U = torch.from_numpy(wanted())
                start = time.perf_counter()
                got = work[name](rows_U)
                taken.append(len(rows_U) / (time.perf_counter() - start))
                if name == "gather":
                    assert torch.equal(got[:, 0], rows_U.float()), "these are not the rows that were asked for"
    table.close()
    limit = "preadv threads" if cold else "index_select"
    medians = {name: statistics.median(values) for name, values in counts.items()}
    return {"page_cache": "dropped" if cold else "warm", **{name: spread(values) for name, values in counts.items()}} | {
        "of_the_limit": medians["gather"] / medians[limit]
    }


def preadv_threads(path: Path, rows_U: np.ndarray) -> None:
    """The plainest way to keep the disk busy: 32 threads, one call a row."""
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)

    def work(first: int) -> None:
        buffer = bytearray(ROW.bytes)
        for row in rows_U[first::32].tolist():
            os.preadv(handle, [buffer], row * ROW.bytes)

    list(preadv_threads.pool.map(work, range(32)))  # type: ignore[attr-defined]
    os.close(handle)


PARTS = {"training": training, "decode": decode, "scaling": scaling, "limit": limit, "lookup": lookup}


@contextlib.contextmanager
def working_folder(parent: str | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="byrote-bench-", dir=parent) as name:
        yield Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--folder")
    parser.add_argument("--limited", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.limited:
        limited(args.limited, Path(args.folder), args.rounds)
        return
    for name in args.parts or PARTS:
        with working_folder(args.folder) as folder:
            report("stores", {"part": name, **PARTS[name](folder, args.rounds)})
        gc.collect()


if __name__ == "__main__":
    main()
