"""Where the table lives changes no number of a training: not its losses, not its rows, not after a resume, not after a move."""

import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from byrote.checkpoint.local import load
from byrote.checkpoint.manifest import read_manifest
from byrote.checkpoint.runs import latest, step_folder
from byrote.errors import CapacityError, CheckpointError, ConfigError, TrainingError
from byrote.memory.config import TableConfig
from byrote.memory.disk import DiskTable
from byrote.memory.place import find_cache, innermost
from byrote.memory.table import DeviceTable
from byrote.train.run import OptimConfig, RunConfig
from byrote.train.session import Run, train
from tests.tolerances import assert_bitwise
from tests.train.tiny_runs import rows_of, tiny_run, write_corpus

SMALL_CACHE = 4000  # bytes: far fewer rows than a batch reads
PLACES = {
    "host": TableConfig(store="host"),
    "host, one thing after another": TableConfig(store="host", read_ahead=False),
    "disk": TableConfig(store="disk"),
    "disk, hardly a cache": TableConfig(store="disk", cache_bytes=SMALL_CACHE),
    "disk, hardly a cache, one thing after another": TableConfig(store="disk", cache_bytes=SMALL_CACHE, read_ahead=False),
}
DISK = PLACES["disk, hardly a cache"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


def config(corpus: Path, table: TableConfig, *, dtype: str = "float32", rule: str = "rowwise", accumulate: int = 1, **options) -> RunConfig:
    optim = OptimConfig(lr=0.01, adam_lr=0.01, warmup_fraction=0.1, table_rule=rule)
    made = tiny_run(corpus, optim=optim, accumulate=accumulate, **options)
    engram = replace(made.model.engram, table_dtype=dtype)
    return replace(made, table=table, model=replace(made.model, engram=engram))


def table_of(run: Run) -> list[torch.Tensor]:
    store = run.model.memory.store
    return [part.clone() for part in store.gather(torch.arange(store.num_rows))]


def losses(folder: Path) -> list[dict]:
    return rows_of(folder)


def assert_same(run: Run, folder: Path, twin: Run, twin_folder: Path) -> None:
    assert losses(folder) == losses(twin_folder)
    for got, want in zip(table_of(run), table_of(twin), strict=True):
        assert_bitwise(got, want)
    for (name, got), want in zip(run.model.named_parameters(), twin.model.parameters(), strict=True):
        assert_bitwise(got, want), name


def interrupt_after(step: int):
    return lambda done, run: signal.raise_signal(signal.SIGINT) if done == step else None


KINDS = {"fp32": {}, "bf16": {"dtype": "bfloat16"}, "adam": {"rule": "adam", "accumulate": 2}}
TWINS: dict = {}


@pytest.fixture(params=KINDS)
def kind(request, corpus, tmp_path_factory):
    """A kind of run, trained with its table in memory once."""
    if request.param not in TWINS:
        folder = tmp_path_factory.mktemp("twin")
        TWINS[request.param] = (train(config(corpus, TableConfig(), **KINDS[request.param]), folder)[0], folder)
    return KINDS[request.param], *TWINS[request.param]


@pytest.mark.parametrize("place", PLACES)
def test_a_training_is_bitwise_the_same_wherever_its_table_lives(corpus, kind, place, tmp_path):
    options, twin, twin_folder = kind
    run, _ = train(config(corpus, PLACES[place], **options), tmp_path)
    assert isinstance(innermost(run.model.memory.store), DiskTable if "disk" in place else DeviceTable)
    assert_same(run, tmp_path, twin, twin_folder)
    if PLACES[place] == DISK:
        cache = find_cache(run.model.memory.store)
        assert 0 < cache.hit_rate < 1 and cache.cache_bytes <= SMALL_CACHE


def test_a_run_with_its_table_on_disk_resumes_bitwise(corpus, kind, tmp_path):
    options, twin, twin_folder = kind
    run, summary = train(config(corpus, DISK, **options), tmp_path, hooks=[interrupt_after(3)])
    assert summary.interrupted
    run.model.memory.store.close()
    run, _ = train(config(corpus, DISK, **options), tmp_path, resume=True)
    assert_same(run, tmp_path, twin, twin_folder)


MOVES = {"to disk": (TableConfig(), DISK), "to memory": (DISK, TableConfig()), "to the host": (DISK, PLACES["host"])}


@pytest.mark.parametrize("move", MOVES)
def test_a_table_may_move_between_two_sittings(corpus, kind, move, tmp_path):
    options, twin, twin_folder = kind
    before, after = MOVES[move]
    run, _ = train(config(corpus, before, **options), tmp_path, hooks=[interrupt_after(4)])
    run.model.memory.store.close()
    run, _ = train(config(corpus, after, **options), tmp_path, resume=True)
    assert_same(run, tmp_path, twin, twin_folder)


def test_a_checkpoint_of_a_table_on_disk_costs_what_changed(corpus, tmp_path):
    train(config(corpus, DISK, save_every=4), tmp_path)
    first, second = (step_folder(tmp_path, step) / "table" for step in (4, 8))
    shared = {path.name for path in first.glob("*.rows")} & {path.name for path in second.glob("*.rows")}
    assert shared, "the second checkpoint needs rows that the first one wrote"
    assert all(os.path.samefile(first / name, second / name) for name in shared)
    assert [read_manifest(folder.parent).table_generations for folder in (first, second)] == [(4,), (8,)]
    with_rows = DiskTable.open(second, read_only=True)
    assert 0 < with_rows.touched < with_rows.num_rows, "rows that no batch read take no room"


def test_the_model_of_a_checkpoint_reads_its_rows_from_where_they_lie(corpus, kind, tmp_path):
    options, _, twin_folder = kind
    run, _ = train(config(corpus, DISK, **options), tmp_path)
    loaded, from_memory = load(tmp_path).model, load(twin_folder).model
    tokens = torch.arange(26).view(2, 13) % loaded.config.vocab_size
    with torch.no_grad():
        assert_bitwise(loaded(tokens).logits, from_memory(tokens).logits)
    with pytest.raises(ConfigError, match="read-only"):
        loaded.memory.store.put(torch.tensor([0]), loaded.memory.store.gather(torch.tensor([0])))
    assert run.model.memory.store.digest() == loaded.memory.store.digest()


def test_an_altered_segment_is_found_when_a_checkpoint_is_loaded(corpus, tmp_path):
    train(config(corpus, DISK), tmp_path)
    segment = next((latest(tmp_path) / "table").glob("*.rows"))
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    with pytest.raises(CheckpointError, match="altered"):
        load(tmp_path)


def test_a_failing_step_leaves_data_and_rows_where_they_were(corpus, tmp_path):
    def spoil(done: int, run: Run) -> None:
        if done == 3:
            run.model.head.weight.data[0, 0] = math.nan

    with pytest.raises(TrainingError):
        train(config(corpus, DISK), tmp_path / "spoiled", hooks=[spoil])
    twin, _ = train(config(corpus, TableConfig()), tmp_path / "twin", hooks=[interrupt_after(3)])
    saved = DiskTable.open(step_folder(tmp_path / "spoiled", 3) / "table", read_only=True)
    for got, want in zip(saved.gather(torch.arange(saved.num_rows)), table_of(twin), strict=True):
        assert_bitwise(got, want)


def test_a_table_that_cannot_fit_names_the_way_out(corpus, tmp_path):
    made = config(corpus, TableConfig())
    huge = replace(made, model=replace(made.model, engram=replace(made.model.engram, rows_per_order=2**31)))
    with pytest.raises(CapacityError, match=r"--table\.store disk"):
        train(huge, tmp_path)


def test_two_runs_do_not_write_to_one_table(corpus, tmp_path):
    shared = TableConfig(store="disk", folder=str(tmp_path / "table"))
    run, _ = train(config(corpus, shared), tmp_path / "one")
    with pytest.raises(ConfigError, match="another run writes"):
        train(config(corpus, shared), tmp_path / "two")
    run.model.memory.store.close()
    train(config(corpus, shared), tmp_path / "two")
