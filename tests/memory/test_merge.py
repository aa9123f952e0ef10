"""Merging, comparing and quantizing packs, against the same done number by number."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from byrote.checkpoint.packs import Contents, open_pack, open_pack_files, save_pack, write_pack
from byrote.errors import MemoryPackError
from byrote.memory.heavy import TopNgram
from byrote.memory.merge import Loss, Merged, check_mergeable, diff, merge, merge_top, quantize
from byrote.memory.pack import PackFiles
from byrote.model.pack import Pack, PackFacts
from tests.memory.packs import CONFIG, make_pack
from tests.tolerances import assert_bitwise


def saved(pack: Pack, folder: Path) -> PackFiles:
    return open_pack_files(save_pack(pack, folder))


def two(tmp_path: Path) -> tuple[PackFiles, PackFiles]:
    """Equal projections, other rows, other visits; one row that both trained and that came out the same."""
    a, b = make_pack(seed=1, name="A"), make_pack(seed=2, name="B")
    for pack in (a, b):
        pack.memory.store.vectors_NE[7] = 0.25
        pack.memory.store.visits_N[7] = 3
        pack.memory.store.visits_N[8] = 2**31 - 2
    return saved(a, tmp_path / "a"), saved(b, tmp_path / "b")


def test_merged_rows_are_weighted_by_visits_and_conflicts_counted(tmp_path: Path) -> None:
    a, b = two(tmp_path)
    merged = Merged()
    records_NB = torch.cat(list(merge(a, b, merged)))
    got, ours, theirs = a.manifest.table.format.decode(records_NB), *(pack.table.gather(torch.arange(a.table.num_rows)) for pack in (a, b))
    wanted = Merged()
    for row in range(a.table.num_rows):
        left, right = ours.vectors_UE[row], theirs.vectors_UE[row]
        n, m = int(ours.visits_U[row]), int(theirs.visits_U[row])
        if n and m:
            wanted.both += 1
            wanted.conflicts += not torch.equal(left, right)
            mean = torch.tensor([(n * x + m * y) / (n + m) for x, y in zip(left.tolist(), right.tolist(), strict=True)])
            assert_bitwise(got.vectors_UE[row], mean if not torch.equal(left, right) else left)
        else:
            wanted.only_a, wanted.only_b = wanted.only_a + (n > 0), wanted.only_b + (m > 0)
            wanted.neither += n == m == 0
            assert_bitwise(got.vectors_UE[row], right if m else left)
        assert int(got.visits_U[row]) == min(n + m, 2**31 - 1)
    assert merged == wanted and min(wanted.only_a, wanted.only_b, wanted.neither, wanted.both - wanted.conflicts) > 0


def test_merging_a_pack_with_itself_doubles_visits_and_changes_no_number(tmp_path: Path) -> None:
    a = saved(make_pack(), tmp_path / "a")
    merged = Merged()
    got = a.manifest.table.format.decode(torch.cat(list(merge(a, a, merged))))
    was = a.table.gather(torch.arange(a.table.num_rows))
    assert_bitwise(got.vectors_UE, was.vectors_UE)
    assert_bitwise(got.visits_U, 2 * was.visits_U)
    assert merged.conflicts == merged.only_a == merged.only_b == 0


def _other_facts(pack: Pack, **facts: str) -> Pack:
    pack.facts = PackFacts(**{name: getattr(pack.facts, name) for name in PackFacts.__dataclass_fields__} | facts)
    return pack


UNLIKE: dict[str, Callable[[], Pack]] = {
    "hash": lambda: make_pack(config=replace(CONFIG, hash_seed=1)),
    "layers ": lambda: make_pack(config=replace(CONFIG, layers=(0, 1), hash_layer_ids=(0, 2))),
    "module": lambda: make_pack(config=replace(CONFIG, gate="hard")),
    "tokenizer": lambda: _other_facts(make_pack(), tokenizer="c" * 64),
    "base": lambda: _other_facts(make_pack(), base="c" * 64),
    "table.dtype": lambda: make_pack(config=replace(CONFIG, table_dtype="bfloat16")),
    "table.dim": lambda: make_pack(config=replace(CONFIG, head_dim=6)),
    "layers.safetensors differs in 0.conv.gain": lambda: make_pack(projections=1),
}


@pytest.mark.parametrize("field", UNLIKE)
def test_packs_that_are_not_alike_are_refused_by_field_and_stacking_is_offered(tmp_path: Path, field: str) -> None:
    a, b = saved(make_pack(), tmp_path / "a"), saved(UNLIKE[field](), tmp_path / "b")
    with pytest.raises(MemoryPackError) as refused:
        check_mergeable(a, b)
    assert str(refused.value).startswith(field)
    assert f"byrote memory attach RUN {tmp_path / 'a'} {tmp_path / 'b'}" in str(refused.value)


def test_other_canonical_maps_are_refused(tmp_path: Path) -> None:
    pack = make_pack()
    pack.memory.set_canonical(torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]))
    with pytest.raises(MemoryPackError, match="the canonical maps differ"):
        check_mergeable(saved(make_pack(), tmp_path / "a"), saved(pack, tmp_path / "b"))


def quantized(files: PackFiles, folder: Path, loss: Loss) -> Path:
    form, records = quantize(files, loss)
    manifest = replace(files.manifest, table=replace(files.manifest.table, dtype=form.dtype, counted=form.counted))
    return write_pack(folder, manifest, Contents(files.weights, files.canonical_V, records))


def test_quantized_rows_take_264_bytes_for_256_numbers_and_report_what_that_costs(tmp_path: Path) -> None:
    pack = make_pack(config=replace(CONFIG, head_dim=256))
    files, loss = saved(pack, tmp_path / "a"), Loss()
    small = open_pack_files(quantized(files, tmp_path / "q", loss))
    assert small.manifest.table.format.bytes == 264 and not small.manifest.table.counted
    was, now = (one.table.read(torch.arange(files.table.num_rows)).double() for one in (files, small))
    assert loss.relative == pytest.approx(float((now - was).norm() / was.norm()), rel=1e-9)
    assert loss.largest_error == float((now - was).abs().max()) and loss.largest == float(was.abs().max())
    assert 0 < loss.relative < 2**-4, "three bits of mantissa"
    assert (tmp_path / "q" / "table.bin").stat().st_size < 0.26 * (tmp_path / "a" / "table.bin").stat().st_size


def test_a_quantized_pack_is_read_as_the_rounded_numbers_and_neither_merged_nor_trained(tmp_path: Path) -> None:
    files = saved(make_pack(), tmp_path / "a")
    small = open_pack_files(quantized(files, tmp_path / "q", Loss()))
    rows_U = torch.arange(files.table.num_rows)
    form = replace(files.manifest.table.format, dtype="fp8", counted=False)
    assert_bitwise(small.table.read(rows_U), form.decode_vectors(form.encode(files.table.read(rows_U))))
    with pytest.raises(MemoryPackError, match=r"table\.dtype is float32 in A and fp8 in B"):
        check_mergeable(files, small)
    with pytest.raises(MemoryPackError, match=r"table\.counted is false"):
        check_mergeable(small, small)
    assert open_pack(tmp_path / "q").config.table_dtype == "float32"


def test_a_difference_names_fields_weights_and_rows(tmp_path: Path) -> None:
    a, b = make_pack(name="A"), make_pack(name="B")
    b.memory.store.vectors_NE[3] += 0.5
    with torch.no_grad():
        b.layers["2"].value.weight[0, 0] += 2
    found = diff(saved(_other_facts(a, licence="X"), tmp_path / "a"), saved(b, tmp_path / "b"))
    assert found.fields == {"licence": ("X", "CC0-1.0")} and found.weights == {"2.value.weight": pytest.approx(2.0)}
    assert found.rows == 1 and found.rows_rms == pytest.approx(0.5)


def test_a_pack_differs_in_nothing_from_itself_and_other_hashes_cannot_be_compared(tmp_path: Path) -> None:
    a = saved(make_pack(), tmp_path / "a")
    assert diff(a, a) == ({}, {}, 0, 0.0)
    found = diff(a, saved(make_pack(config=replace(CONFIG, hash_seed=5)), tmp_path / "b"))
    assert found.fields == {"hash.seed": (0, 5)} and found.rows is None


def test_lists_of_ngrams_add_up() -> None:
    a, b = [TopNgram("x y", 2, 5), TopNgram("z z", 2, 4)], [TopNgram("z z", 2, 3), TopNgram("a", 3, 1)]
    assert merge_top(a, b, 2) == [TopNgram("z z", 2, 7), TopNgram("x y", 2, 5)]
