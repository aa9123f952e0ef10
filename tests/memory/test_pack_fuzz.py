"""Ten thousand damaged packs: each is refused with a MemoryPackError, or what is read from it is what was written.

Three kinds of damage. Bytes: any file, as a bad disk or a broken download would leave it. Folders: files missing, added, exchanged,
linked. Forgeries: a manifest with other values and correct checksums, which no checksum can refuse, so that every value must be looked
at; what opens then must be readable without any other error.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from byrote.checkpoint.packs import open_pack, open_pack_files
from byrote.errors import MemoryPackError
from byrote.memory.blocks import LEAVES
from byrote.memory.pack import CANONICAL, CARD, LAYERS, MANIFEST, TABLE, TOP, close_files
from byrote.model.pack import pack_from
from tests.memory.packs import write_small

FILES = (MANIFEST, CARD, TABLE, TABLE + LEAVES, LAYERS, CANONICAL, TOP)
BYTES, FORGERIES, SMALL = 6400, 3200, 400


def content(folder: Path) -> tuple[Any, ...]:
    """Everything that can be read of a pack."""
    files = open_pack_files(folder)
    try:
        slab = files.table.gather(torch.arange(files.table.num_rows))
        pack = pack_from(files, files.table)
        tensors = [*slab, *pack.layers.state_dict().values(), pack.memory.canonical_V]
        return (files.manifest, files.top, (folder / CARD).read_bytes(), [None if t is None else t.numpy().tobytes() for t in tensors])
    finally:
        close_files(files)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("fuzz") / "pack")


def put(path: Path, data: bytes) -> None:
    """Overwrite in place: emptying a file first makes some file systems wait for the disk."""
    with open(path, "r+b") as file:
        file.write(data)
        file.truncate()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to three small changes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at:at] = rng.randbytes(rng.choice((1, 2, 8)))
        elif kind == 2:
            del changed[at : at + rng.choice((1, 4, 100))]
        elif kind == 3:
            del changed[at:]
        elif kind == 4:
            changed[at : at + 16] = bytes(len(changed[at : at + 16]))
        else:
            changed += changed[at : at + 64]
    return bytes(changed)


def test_a_pack_with_damaged_bytes_is_refused_or_read_correctly(pack: Path) -> None:
    rng, whole, refused = random.Random(0), content(pack), 0
    for number in range(BYTES):
        path = pack / FILES[number % len(FILES)]
        data = path.read_bytes()
        put(path, damaged(data, rng))
        try:
            assert content(pack) == whole
        except MemoryPackError:
            refused += 1
        finally:
            put(path, data)
    assert refused > 0.9 * BYTES and content(pack) == whole


# --- forgeries --------------------------------------------------------------------------------------------------------

ODD = (0, 1, -1, 2, 3, 7, 255, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, float("inf"), float("nan"), 1e-300, 10**400)
ODD_OTHERS = (
    None,
    True,
    False,
    "",
    "x",
    "../x",
    "/etc/passwd",
    "a" * 64,
    "float32",
    "fp8",
    "hard",
    [],
    [0],
    [1, 1],
    [-1],
    {},
    {"a": 1},
    "\ud800",
)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a JSON document lies."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [*([path] if path else []), *(place for key, value in inner for place in places(value, (*path, key)))]


def forge(data: dict[str, Any], rng: random.Random) -> None:
    """Put another value somewhere, take one away, or add one."""
    *above, last = rng.choice(places(data))
    node: Any = data
    for key in above:
        node = node[key]
    kind = rng.randrange(10)
    if kind == 0:
        del node[last]
    elif kind == 1 and isinstance(node, dict):
        node["extra"] = 1
    elif isinstance(node[last], int) and kind < 5:
        node[last] += rng.choice((-1, 1, 2, 10**6))
    else:
        node[last] = rng.choice((*ODD, *ODD_OTHERS, node[last]))


def sealed(data: dict[str, Any]) -> bytes:
    """A manifest whose digest agrees with what it says."""

    def text(value: dict[str, Any]) -> bytes:
        fields = [f"{json.dumps(name)}: {json.dumps(part, sort_keys=True, ensure_ascii=False)}" for name, part in sorted(value.items())]
        return ("{\n" + ",\n".join(fields) + "\n}\n").encode("utf-8", "surrogatepass")

    return text(data | {"digest": hashlib.sha256(text(data)).hexdigest()})


def reseal(folder: Path, name: str, content: bytes) -> None:
    """Put `content` in the place of a small file, and say so in the manifest."""
    put(folder / name, content)
    data = json.loads((folder / MANIFEST).read_bytes())
    del data["digest"]
    for file in data["files"]:
        if file["name"] == name:
            file |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    put(folder / MANIFEST, sealed(data))


def opens(folder: Path) -> bool:
    """Whether all of it can be read; any other answer than yes or a MemoryPackError is a bug."""
    try:
        content(folder)
    except MemoryPackError:
        return False
    return True


def test_the_seal_of_these_tests_is_that_of_packs(pack: Path) -> None:
    data = json.loads((pack / MANIFEST).read_bytes())
    del data["digest"]
    assert sealed(data) == (pack / MANIFEST).read_bytes()


def test_a_forged_manifest_is_refused_or_readable(pack: Path) -> None:
    rng, raw = random.Random(1), (pack / MANIFEST).read_bytes()
    opened = 0
    for _ in range(FORGERIES):
        data = json.loads(raw)
        del data["digest"]
        for _ in range(rng.choice((1, 1, 2))):
            forge(data, rng)
        put(pack / MANIFEST, sealed(data))
        opened += opens(pack)
    put(pack / MANIFEST, raw)
    assert 0 < opened < FORGERIES / 2, "names, licences and seeds may be forged; sizes and shapes may not"


def test_forged_small_files_are_refused_or_readable(pack: Path) -> None:
    rng, manifest = random.Random(2), (pack / MANIFEST).read_bytes()
    for name in (LAYERS, CANONICAL, TOP, CARD):
        data = (pack / name).read_bytes()
        for _ in range(SMALL // 4):
            reseal(pack, name, damaged(data, rng))
            opens(pack)
        put(pack / name, data)
        put(pack / MANIFEST, manifest)


def _exchange(folder: Path) -> None:
    os.rename(folder / LAYERS, folder / "x")
    os.rename(folder / CANONICAL, folder / LAYERS)
    os.rename(folder / "x", folder / CANONICAL)


def _link(folder: Path) -> None:
    shutil.move(folder / TABLE, folder.parent / "outside")
    (folder / TABLE).symlink_to(folder.parent / "outside")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "an unlisted file": lambda folder: (folder / "readme.txt").write_text("hello"),
    "a hidden file": lambda folder: (folder / ".hidden").write_text("hello"),
    "a pickle": lambda folder: (folder / "weights.pt").write_bytes(b"\x80\x04."),
    "a folder": lambda folder: (folder / "more").mkdir(),
    "two files exchanged": _exchange,
    "a link out of the folder": _link,
    "a folder in the place of a file": lambda folder: ((folder / CARD).unlink(), (folder / CARD).mkdir()),
    **{f"{name} missing": lambda folder, name=name: (folder / name).unlink() for name in FILES},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_folder_that_is_not_as_listed_is_refused(pack: Path, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    folder = tmp_path / "pack"
    shutil.copytree(pack, folder)
    damage(folder)
    with pytest.raises(MemoryPackError):
        open_pack(folder)
