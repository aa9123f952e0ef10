"""What a pack says, what opening one checks and what it leaves for later. `test_pack_fuzz.py` damages packs at random."""

import json
import os
from pathlib import Path

import pytest
import torch

from byrote.checkpoint.packs import open_pack, open_pack_files
from byrote.errors import MemoryPackError
from byrote.memory.blocks import LEAF_BYTES
from byrote.memory.card import added_sections
from byrote.memory.pack import CARD, LAYERS, MANIFEST, TABLE, fingerprint, manifest_bytes, read_manifest
from tests.memory.packs import CANONICAL_V, CONFIG, TOP, make_pack, write_small
from tests.memory.test_pack_fuzz import put, reseal, sealed
from tests.tolerances import assert_bitwise


def forge(folder: Path, change: dict[str, object]) -> None:
    """Set fields, dotted, of a manifest, and seal it."""
    data = json.loads((folder / MANIFEST).read_bytes())
    del data["digest"]
    for path, value in change.items():
        node = data
        *above, last = path.split(".")
        for key in above:
            node = node[int(key) if key.isdigit() else key]
        node[last] = value
    put(folder / MANIFEST, sealed(data))


def test_what_is_opened_is_what_was_written(tmp_path: Path) -> None:
    pack, opened = make_pack(), open_pack(write_small(tmp_path / "pack"))
    rows_U = torch.arange(pack.memory.store.num_rows)
    for name, tensor in pack.layers.state_dict().items():
        assert_bitwise(opened.layers.state_dict()[name], tensor)
    assert_bitwise(opened.memory.store.read(rows_U), pack.memory.store.vectors_NE)
    assert_bitwise(opened.memory.store.gather(rows_U).visits_U, pack.memory.store.visits_N)
    assert_bitwise(opened.memory.canonical_V, CANONICAL_V)
    assert (opened.facts, opened.vocab_size, opened.dim, opened.streams, opened.eps) == (
        pack.facts,
        pack.vocab_size,
        pack.dim,
        pack.streams,
        pack.eps,
    )
    tokens_BT, document_BT = torch.randint(11, (3, 9)), torch.tensor([[0] * 4 + [1] * 5, [-1] * 3 + [0] * 6, [0] * 9])
    got, want = opened.memory.fetch(tokens_BT, document_BT), pack.memory.fetch(tokens_BT, document_BT)
    assert_bitwise(got.layer(1), want.layer(1))
    assert_bitwise(got.rows_U, want.rows_U)
    assert open_pack_files(tmp_path / "pack").top == TOP


def test_the_same_pack_is_written_as_the_same_bytes(tmp_path: Path) -> None:
    a, b = write_small(tmp_path / "a"), write_small(tmp_path / "b")
    assert {path.name: path.read_bytes() for path in a.iterdir()} == {path.name: path.read_bytes() for path in b.iterdir()}


def test_a_manifest_is_read_back_as_it_was_and_no_other_text_says_it(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "pack")
    manifest, digest = read_manifest(folder)
    raw = (folder / MANIFEST).read_bytes()
    assert manifest_bytes(manifest) == raw and json.loads(raw)["digest"] == digest
    for same in (raw.replace(b": ", b":", 1), raw + b" ", raw[:-1], json.dumps(json.loads(raw)).encode()):
        put(folder / MANIFEST, same)
        with pytest.raises(MemoryPackError, match="digest does not agree"):
            read_manifest(folder)


def test_opening_reads_no_rows_and_reading_some_checks_only_those(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "pack", config=CONFIG.__class__(layers=(0,), rows_per_order=9000, head_dim=5, num_heads=2))
    last = (folder / TABLE).stat().st_size - 1
    data = bytearray((folder / TABLE).read_bytes())
    data[last] ^= 1
    put(folder / TABLE, bytes(data))
    files = open_pack_files(folder)
    assert files.checker.checked_bytes == 0
    files.table.read(torch.tensor([0, 1]))
    assert files.checker.checked_bytes == LEAF_BYTES
    with pytest.raises(MemoryPackError, match="was altered"):
        files.table.read(torch.tensor([0, files.table.num_rows - 1]))


def test_rows_in_the_file_cannot_be_trained_and_a_copy_in_memory_can(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "pack")
    rows_U, slab = torch.tensor([4]), open_pack(folder).memory.store.gather(torch.tensor([4]))
    with pytest.raises(Exception, match="read-only"):
        open_pack(folder).memory.store.put(rows_U, slab)
    copied = open_pack(folder, in_memory=True).memory.store
    assert_bitwise(copied.visits_N, make_pack().memory.store.visits_N)
    copied.put(rows_U, copied.gather(rows_U)._replace(vectors_UE=torch.ones(1, 5)))
    assert_bitwise(copied.read(rows_U), torch.ones(1, 5))


REFUSED = {
    "format is 2; this byrote reads format 1": {"format": 2},
    "hash.canonical_vocab is 99": {"hash.canonical_vocab": 99},
    "hash.pad is 7": {"hash.pad": 7},
    "hash.seed is -1": {"hash.seed": -1},
    "hash.rows_per_order is 10000": {"hash.rows_per_order": 10000},
    "table.rows is": {"hash.rows_per_order": 5},
    "table.dtype is 'float64'": {"table.dtype": "float64"},
    "table.blocks is 'a list of 0'": {"table.blocks": []},
    "tokenizer is 'gpt2'": {"tokenizer": "gpt2"},
    "layers is (0, 0)": {"layers": [0, 0]},
    "hash.layers is (0,)": {"hash.layers": [0]},
    "module.gate is 'open'": {"module.gate": "open"},
    "files[0].name is '../CARD.md'; it must be a plain name": {"files.0.name": "../CARD.md"},
    "files[0].name is '/etc/passwd'; it must be a plain name": {"files.0.name": "/etc/passwd"},
    "files[0].name is 'weights.pt'": {"files.0.name": "weights.pt"},
    "CARD.md has": {"files.0.bytes": 5},
    "0.conv.gain as (2, 4); layers and module of the manifest make it (2, 8)": {"module.dim": 8},
    "vocab_size 12": {"vocab_size": 12},
}


@pytest.mark.parametrize("expected", REFUSED)
def test_a_forged_manifest_is_refused_by_the_field_that_is_wrong(tmp_path: Path, expected: str) -> None:
    folder = write_small(tmp_path / "pack")
    forge(folder, REFUSED[expected])
    with pytest.raises(MemoryPackError) as refused:
        open_pack(folder)
    assert expected in str(refused.value)


def test_what_is_no_pack_is_refused_with_what_to_give(tmp_path: Path) -> None:
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(MemoryPackError, match="Give the folder of a pack"):
            open_pack(place)
    (tmp_path / MANIFEST).write_bytes(b'{"files": []}')
    with pytest.raises(MemoryPackError, match="it names no format"):
        open_pack(tmp_path)


def test_nothing_is_unpickled_even_when_it_is_listed(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "pack")
    reseal(folder, LAYERS, b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.")
    with pytest.raises(MemoryPackError, match=r"layers\.safetensors is not a safetensors file"):
        open_pack(folder)


def test_the_manifest_may_not_be_a_link(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "pack")
    os.rename(folder / MANIFEST, tmp_path / "elsewhere")
    (folder / MANIFEST).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MemoryPackError, match="cannot be read"):
        open_pack(folder)


def test_the_card_says_what_the_pack_gives_away_and_keeps_what_its_maker_added(tmp_path: Path) -> None:
    card = (write_small(tmp_path / "with") / CARD).read_text()
    silent = (write_small(tmp_path / "without", top=False) / CARD).read_text()
    for text in (card, silent):
        assert "test whether a phrase was in the corpus" in text and "CC0-1.0" in text and "a" * 64 in text
        assert added_sections(text) == "## Measured\n\nnothing"
    assert '"of the"' in card and "lists the 2 most visited n-grams" in card
    assert "of the" not in silent.partition("What this pack reveals")[0] and '"of the"' not in silent
    assert not (tmp_path / "without" / "top.json").exists()


def test_a_fingerprint_tells_names_shapes_dtypes_and_numbers_apart_but_not_order() -> None:
    tensors = {"a": torch.arange(10_000.0), "b": torch.zeros(3, 2), "empty": torch.zeros(0)}
    prints = [fingerprint(tensors.items()), fingerprint(reversed(tensors.items()))]
    assert prints[0] == prints[1]
    others = [
        {**tensors, "b": torch.zeros(2, 3)},
        {**tensors, "b": torch.zeros(3, 2, dtype=torch.float64)},
        {"a": tensors["a"], "c": tensors["b"], "empty": tensors["empty"]},
        {**tensors, "a": torch.cat((tensors["a"][:-1], torch.ones(1)))},
    ]
    assert len({prints[0], *(fingerprint(other.items()) for other in others)}) == 5
