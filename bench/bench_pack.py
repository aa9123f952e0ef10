"""Cold start with a large pack: from calling `byrote.load()` in a warm process, page cache dropped, to the first token.

    python -m bench.bench_pack [--gigabytes 20] [--rounds 5] [--folder FOLDER]

Writes a pack of that size (every row of it) for a model of `tiny_cpu`'s shape, drops model and pack from the page cache before every
round, and times loading and the first token after prompts of 8, 64 and 512 random tokens, whose rows lie all over the table. Beside
it, in the same run: the same with a pack of 20 MB, and with `--verify` what reading and checking every byte takes. The folder is
removed at the end.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import byrote
from bench.measure import report, spread
from byrote.checkpoint.packs import AttachedPacks, note_for, note_packs, open_pack_files, save_pack
from byrote.device import check_disk
from byrote.memory.records import RowFormat
from byrote.memory.table import Slab
from byrote.model.config import EngramConfig
from byrote.model.pack import PackFacts, base_fingerprint, new_pack
from byrote.model.transformer import Model
from byrote.recipes import load_recipe

PROMPTS = (8, 64, 512)
SMALL_BYTES = 20_000_000
ENGRAM = EngramConfig(layers=(0, 1), rows_per_order=1, head_dim=128, num_heads=8, max_order=3, tokenizer_compression=False, table_std=0.0)


class MadeTable:
    """Rows to be written once: random numbers, the same ones again every 32,768 rows. Nothing else is kept in memory."""

    def __init__(self, num_rows: int, dim: int, *, state_dim: int, dtype: torch.dtype, std: float, seed: int) -> None:
        self.num_rows, self.dim, self.state_dim, self.dtype = num_rows, dim, state_dim, dtype
        self.device = self.index_device = torch.device("cpu")
        self._part = torch.randn(1 << 15, dim) * 0.02

    def to(self, device: torch.device | str) -> None:
        assert torch.device(device).type == "cpu"

    def gather(self, rows_U: Tensor) -> Slab:
        vectors_UE = self._part[: len(rows_U)]
        return Slab(vectors_UE, torch.zeros(len(rows_U), self.state_dim), torch.ones(len(rows_U), dtype=torch.int32))


def write(folder: Path, num_bytes: int, base: Model) -> int:
    """A model of its own with one pack noted for it; returns the rows of the table."""
    heads = ENGRAM.heads_per_layer * len(ENGRAM.layers)
    rows = num_bytes // RowFormat(dim=ENGRAM.head_dim, counted=True).bytes
    facts = PackFacts(name="bench", tokenizer="0" * 64, base=base_fingerprint(base), provenance="random numbers", licence="CC0-1.0")
    size = {"dim": base.config.dim, "streams": base.config.residual.streams, "vocab_size": base.config.vocab_size}
    pack = new_pack(replace(ENGRAM, rows_per_order=rows // heads), **size, facts=facts, make_table=MadeTable)
    began = time.monotonic()

    def say(done: int, total: int) -> None:
        if done % (1 << 30) == 0 or done == total:
            print(f"{done / 1e9:.0f} of {total / 1e9:.0f} GB written in {time.monotonic() - began:.0f} s", file=sys.stderr)

    save_pack(pack, folder / "pack", report=say)
    byrote.save(base, folder / "model")
    note_packs(folder / "model", AttachedPacks(packs=(note_for(folder / "model", folder / "pack", None, any_base=False),)))
    return pack.memory.store.num_rows


def drop_caches(folder: Path) -> None:
    """Nothing below `folder` is in memory: the system is asked file by file, and as a whole where it may be."""
    os.sync()
    for path in (path for path in folder.rglob("*") if path.is_file()):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    if os.access("/proc/sys/vm/drop_caches", os.W_OK):
        Path("/proc/sys/vm/drop_caches").write_text("3")


@torch.no_grad()
def cold_start(folder: Path, prompt: int, seed: int) -> tuple[float, float, int]:
    """(seconds of load, seconds from load to the first token, bytes of the table that were read and checked)."""
    tokens_BT = torch.randint(4096, (1, prompt), generator=torch.Generator().manual_seed(seed))
    drop_caches(folder)
    began = time.perf_counter()
    model = byrote.load(folder / "model").model
    loaded = time.perf_counter()
    int(model(tokens_BT, state=model.new_state()).logits[0, -1].argmax())
    ended = time.perf_counter()
    files = model.packs["bench"].files
    assert files is not None
    return loaded - began, ended - began, files.checker.checked_bytes


def measured(folder: Path, rounds: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for prompt in PROMPTS:
        runs = [cold_start(folder, prompt, seed) for seed in range(rounds)]
        load, total, checked = (list(column) for column in zip(*runs, strict=True))
        result[f"prompt {prompt}"] = {"load_seconds": spread(load), "first_token_seconds": spread(total), "checked_bytes": max(checked)}
        print(f"prompt {prompt}: {result[f'prompt {prompt}']}", file=sys.stderr)
    return result


def verify_seconds(folder: Path, rounds: int = 2) -> dict[str, Any]:
    """Seconds to check every byte, and only to read them in order, in turn."""
    seconds: dict[str, list[float]] = {"verify": [], "read in order": []}
    for _ in range(rounds):
        for name, taken in seconds.items():
            drop_caches(folder)
            began = time.perf_counter()
            assert list(open_pack_files(folder / "pack").checker.verify()) if name == "verify" else read_all(folder / "pack" / "table.bin")
            taken.append(time.perf_counter() - began)
    return {name: spread(taken) for name, taken in seconds.items()}


def read_all(path: Path) -> int:
    block, total = bytearray(1 << 22), 0
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(block):
            total += got
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where the pack is written for the time of the run")
    parser.add_argument("--verify", action="store_true", help="time the check of every byte, beside reading them in order")
    parser.add_argument("--no-cold-start", action="store_true", help="leave the cold starts out")
    args = parser.parse_args()
    check_disk(args.folder or tempfile.gettempdir(), int(args.gigabytes * 1.02e9), "this bench")
    base = Model(replace(load_recipe("tiny_cpu").model, engram=None)).eval()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-pack-") as place:
        small, large = Path(place, "small"), Path(place, "large")
        write(small, SMALL_BYTES, base)
        measured(small, 1)  # the process is warm from here on
        result: dict[str, Any] = {} if args.no_cold_start else {"20 MB": measured(small, args.rounds)}
        rows = write(large, int(args.gigabytes * 1e9), base)
        result |= {} if args.no_cold_start else {f"{args.gigabytes:g} GB": measured(large, args.rounds)}
        table = (large / "pack" / "table.bin").stat().st_size
        if args.verify:
            result["seconds"] = verify_seconds(large)
            result["gb_per_second"] = {name: table / 1e9 / taken["median"] for name, taken in result["seconds"].items()}
    whole_system = os.access("/proc/sys/vm/drop_caches", os.W_OK)
    report("pack", result | {"table_bytes": table, "rows": rows, "row_numbers": ENGRAM.head_dim, "whole_page_cache_dropped": whole_system})


if __name__ == "__main__":
    main()
