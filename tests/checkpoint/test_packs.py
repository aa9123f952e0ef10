"""Packs on the disk: written whole or not at all whatever fails, and noted down for a run.

This file is also the program that is killed (`tests/checkpoint/test_kill.py` has the idea): a writer puts one number into every weight
and row, so that a mixture of two packs would show.
"""

import errno
import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from byrote.checkpoint.atomic import ASIDE, TEMPORARY
from byrote.checkpoint.local import load, save
from byrote.checkpoint.packs import (
    AttachedPacks,
    attached_packs,
    note_for,
    note_packs,
    open_pack,
    open_pack_files,
    packs_file,
    save_pack,
)
from byrote.errors import CapacityError, MemoryPackError
from byrote.model.config import EngramConfig
from byrote.model.pack import Pack, PackFacts, attach, base_fingerprint, detach, new_pack
from byrote.model.transformer import Model
from tests.killing import Program, kill_at_call, program_of, serve
from tests.model.tiny_models import ENGRAM, VOCAB, build, text, whole
from tests.tolerances import assert_bitwise

ROOT = Path(__file__).parents[2]
CALLS = ("fsync", "rename", "mkdir", "rmdir", "unlink")
SMALL = EngramConfig(layers=(0,), rows_per_order=11, head_dim=2, num_heads=1, max_order=2)


def numbered(number: int) -> Pack:
    """A pack that says `number` everywhere."""
    pack = new_pack(SMALL, dim=4, vocab_size=7, facts=PackFacts(name=str(number), tokenizer="0" * 64, base="0" * 64))
    for parameter in pack.parameters():
        parameter.data.fill_(number)
    pack.memory.store.vectors_NE.fill_(number)
    pack.memory.store.visits_N.fill_(number)
    return pack


def write(folder: Path, number: int) -> None:
    save_pack(numbered(number), folder / "pack", overwrite=True)


def found(folder: Path) -> int:
    """The number that everything in the pack says."""
    pack = open_pack(folder / "pack", in_memory=True)
    store = pack.memory.store
    tensors = [*pack.parameters(), store.vectors_NE, store.visits_N]
    numbers = {value for tensor in tensors for value in tensor.unique().tolist()} | {float(pack.facts.name)}
    assert len(numbers) == 1, f"the pack is a mixture of {numbers}"
    return int(numbers.pop())


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith((TEMPORARY, ASIDE))]


# --- the program that is killed ---------------------------------------------------------------------------------------


def writer(folder: Path, first: int, last_call: int = 0) -> None:
    """Writes pack after pack; with `last_call`, one only, up to that call."""
    if last_call:
        kill_at_call(last_call, CALLS)
        write(folder, first)
    else:
        for number in itertools.count(first):
            write(folder, number)


if __name__ == "__main__":
    serve(writer)


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    with program_of(__file__) as running:
        yield running


def kill_writers(program: Program, folder: Path, kills: int, seed: int) -> None:
    """Kill as many writers, each at a random moment; after every one a pack stands, whole, and is not older than before."""
    moments, stands = random.Random(seed), 1
    write(folder, 1)
    for _ in range(kills):
        pid = program.start(folder, stands + 1)
        time.sleep(moments.uniform(0.0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert program.signal() == signal.SIGKILL
        before, stands = stands, found(folder)
        assert stands >= before
    write(folder, stands + 1)
    assert found(folder) == stands + 1 and not leftovers(folder)


def test_killed_at_a_random_moment_a_whole_pack_stands(program: Program, tmp_path: Path) -> None:
    kill_writers(program, tmp_path, 20, seed=0)


@pytest.mark.torture
def test_killed_a_thousand_times_a_whole_pack_stands(program: Program, tmp_path: Path) -> None:
    kill_writers(program, tmp_path, 1000, seed=1)


def test_killed_at_every_call_a_whole_pack_stands(program: Program, tmp_path: Path) -> None:
    write(tmp_path, 1)
    killed = 0
    program.start(tmp_path, 2, killed + 1)
    while program.signal() == signal.SIGKILL:
        killed += 1
        assert found(tmp_path) in (killed, killed + 1)
        write(tmp_path, killed + 1)
        program.start(tmp_path, killed + 2, killed + 1)
    assert killed > 10 and found(tmp_path) == killed + 2 and not leftovers(tmp_path)


# --- faults -----------------------------------------------------------------------------------------------------------


class Faults:
    """Lets the `at`-th call of `os` that changes a disk fail; with `dead`, all after it too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at, self.dead, self.code = 0, 0, False, errno.EIO
        for name in (*CALLS, "open", "write", "replace"):
            monkeypatch.setattr(os, name, self._faulty(getattr(os, name)))

    def _faulty(self, call: Callable) -> Callable:
        def faulty(*args, **kwargs):
            self.count += 1
            if self.at and (self.count == self.at or (self.dead and self.count > self.at)):
                raise OSError(self.code, "injected")
            return call(*args, **kwargs)

        return faulty

    def trial(self, at: int, act: Callable[[], None]) -> Exception | None:
        """What `act` raised when the `at`-th call failed."""
        self.count, self.at = 0, at
        try:
            act()
        except Exception as error:
            return error
        finally:
            self.at = 0
        return None


@pytest.mark.parametrize("dead", [False, True], ids=["one call fails", "nothing works afterwards"])
def test_whichever_call_fails_the_old_or_the_new_pack_stands_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: bool) -> None:
    write(tmp_path, 1)
    faults, at = Faults(monkeypatch), 1
    faults.dead = dead
    while (error := faults.trial(at, lambda: write(tmp_path, 2))) or at <= faults.count:
        assert error is None or isinstance(error, MemoryPackError), error
        assert found(tmp_path) in (1, 2)
        write(tmp_path, 1)
        assert found(tmp_path) == 1 and not leftovers(tmp_path)
        at += 1
    assert at > 20 and found(tmp_path) == 2


def test_a_read_that_fails_is_a_pack_error_and_the_next_one_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 3)
    for at in itertools.count(1):
        with monkeypatch.context() as patched:
            faults = Faults(patched)
            error = faults.trial(at, lambda: open_pack_files(tmp_path / "pack"))
        if error is None:
            break
        assert isinstance(error, MemoryPackError), error
        assert found(tmp_path) == 3
    assert at > 4


def test_a_full_disk_says_what_was_needed_and_that_nothing_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from byrote import device

    write(tmp_path, 1)
    faults = Faults(monkeypatch)
    faults.code = errno.ENOSPC
    error = faults.trial(9, lambda: write(tmp_path, 2))
    assert isinstance(error, CapacityError) and "is what it was" in str(error) and found(tmp_path) == 1
    monkeypatch.setattr(device, "disk_free", lambda _: 10)
    with pytest.raises(CapacityError, match=r"the pack new needs .* Nothing was changed on disk"):
        save_pack(numbered(1), tmp_path / "new")


def test_only_a_pack_is_replaced_and_only_when_asked(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(MemoryPackError, match=r"exists.*--overwrite"):
        save_pack(numbered(2), tmp_path / "pack")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    with pytest.raises(MemoryPackError, match="is not replaced, as it is no whole pack"):
        save_pack(numbered(2), tmp_path / "mine", overwrite=True)
    assert found(tmp_path) == 1 and (tmp_path / "mine" / "thesis.tex").read_text() == "dear"


# --- packs of a run ---------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, Model]:
    """A checkpoint of a model without memory, and packs a and b for it."""
    model = build(whole(engram=None))
    save(model, tmp_path / "model")
    for name, seed in (("a", 1), ("b", 2)):
        facts = PackFacts(name=name, tokenizer="0" * 64, base=base_fingerprint(model))
        config = replace(ENGRAM, hash_seed=seed)
        save_pack(new_pack(config, dim=16, streams=3, vocab_size=VOCAB, init_std=0.2, seed=seed, facts=facts), tmp_path / name)
    return tmp_path / "model", model


def noted(model: Path, *packs: Path, own: bool = True) -> None:
    note_packs(model, AttachedPacks(own=own, packs=tuple(note_for(model, pack, None, any_base=False) for pack in packs)))


@torch.no_grad()
def logits(model: Model) -> torch.Tensor:
    return model(text(2, 9)).logits


def test_loading_attaches_what_was_noted_and_nothing_else(base: tuple[Path, Model], tmp_path: Path) -> None:
    path, model = base
    plain = logits(model)
    assert_bitwise(logits(load(path).model), plain)
    noted(path, tmp_path / "a", tmp_path / "b")
    attach(model, open_pack(tmp_path / "a"))
    attach(model, open_pack(tmp_path / "b"))
    assert_bitwise(logits(load(path).model), logits(model))
    assert_bitwise(logits(load(path, packs=False).model), plain)
    noted(path, tmp_path / "b")
    detach(model, "a")
    assert_bitwise(logits(load(path).model), logits(model))
    noted(path)
    assert_bitwise(logits(load(path).model), plain)


def test_a_moved_tree_still_finds_its_packs(base: tuple[Path, Model], tmp_path: Path) -> None:
    noted(base[0], tmp_path / "a")
    wanted = logits(load(base[0]).model)
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)
    assert_bitwise(logits(load(moved / "model").model), wanted)


def test_another_pack_in_the_place_of_an_attached_one_is_refused(base: tuple[Path, Model], tmp_path: Path) -> None:
    noted(base[0], tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "old")
    with pytest.raises(MemoryPackError, match=r"attached as 'a': byrote memory detach"):
        load(base[0])
    (tmp_path / "b").rename(tmp_path / "a")
    with pytest.raises(MemoryPackError, match="is another pack than the one attached as 'a'"):
        load(base[0])


def test_a_runs_own_memory_can_be_silenced(tmp_path: Path) -> None:
    model = build(whole())
    save(model, tmp_path / "model")
    noted(tmp_path / "model", own=False)
    silent = load(tmp_path / "model").model
    assert silent.memory is None and not torch.allclose(logits(silent), logits(model))
    noted(tmp_path / "model")
    assert_bitwise(logits(load(tmp_path / "model").model), logits(model))


def test_packs_of_a_run_are_noted_in_it_and_those_of_a_lone_checkpoint_beside_it(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert packs_file(tmp_path / "run") == packs_file(tmp_path / "run" / "checkpoints" / "step-00000001") == tmp_path / "run" / "packs.json"
    assert packs_file(tmp_path / "model") == tmp_path / "model.packs.json"
    assert attached_packs(tmp_path / "run") == AttachedPacks()


@pytest.mark.parametrize("content", ["{", '{"format": 2}', '{"packs": [{"name": 1}]}', "[]", '{"pack": []}'])
def test_a_damaged_note_is_refused_with_what_to_do(tmp_path: Path, content: str) -> None:
    packs_file(tmp_path / "model").write_text(content)
    with pytest.raises(MemoryPackError, match=r"model\.packs\.json"):
        attached_packs(tmp_path / "model")
