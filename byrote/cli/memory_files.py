"""`byrote memory inspect | verify | diff | quantize | merge`: packs as files, without any model."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byrote.console import Progress, format_bytes, print_table
from byrote.errors import MemoryPackError

if TYPE_CHECKING:
    from byrote.memory.heavy import TopNgram
    from byrote.memory.merge import Loss, Merged
    from byrote.memory.pack import PackFiles


def count(text: str) -> int:
    """A number of things on the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of n-grams; give 1 or more")
    return int(text)


def _add_pack(parser: argparse.ArgumentParser, name: str = "pack", metavar: str = "PACK") -> None:
    parser.add_argument(name, metavar=metavar, help="folder of a pack")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result on stdout as JSON")


def add_writing(parser: argparse.ArgumentParser) -> None:
    """Options of every action that writes a pack."""
    parser.add_argument("--overwrite", action="store_true", help="replace the pack that OUT holds, in one piece")
    _add_json(parser)


def shown(live: Progress) -> Callable[[int, int], None]:
    """Bytes done, on the live line."""
    return lambda done, total: live.update(f"{format_bytes(done)} of {format_bytes(total)}")


# --- inspect and verify -----------------------------------------------------------------------------------------------


def show_pack(files: "PackFiles", as_json: bool) -> int:
    """What a pack is, on stdout."""
    manifest = files.manifest
    result: dict[str, Any] = {"pack": str(files.folder), "digest": files.digest, "bytes": sum(file.bytes for file in manifest.files)}
    result |= asdict(replace(manifest, table=replace(manifest.table, blocks=()))) | {"top": len(files.top)}
    result["table"]["blocks"] = len(manifest.table.blocks)
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return 0
    hash_, table = manifest.hash, manifest.table
    rows = [
        ("name", manifest.name),
        ("provenance", manifest.provenance or "not stated"),
        ("licence", manifest.licence),
        ("before blocks", ", ".join(map(str, manifest.layers))),
        ("table", f"{table.rows:,} rows of {table.dim}, {table.dtype}{', with visits' if table.counted else ''}"),
        ("n-grams", f"orders 2..{hash_.max_order}, {hash_.num_heads} heads, {hash_.canonical_vocab:,} classes, seed {hash_.seed}"),
        ("for a model of", f"width {manifest.module.dim}, {manifest.module.streams} streams, {manifest.vocab_size:,} tokens"),
        ("base", manifest.base),
        ("tokenizer", manifest.tokenizer),
        ("n-grams as text", len(files.top) or "none"),
        ("size", format_bytes(result["bytes"])),
        ("digest", files.digest),
    ]
    print_table(rows)
    return 0


def add_verify(parser: argparse.ArgumentParser) -> None:
    _add_pack(parser)
    _add_json(parser)


def verify(args: argparse.Namespace) -> int:
    """Everything but the rows was checked by opening."""
    from byrote.checkpoint.packs import open_pack_files

    with Progress("verify") as live:
        files = open_pack_files(args.pack)
        for done in files.checker.verify():
            shown(live)(done, files.checker.num_bytes)
        live.close(f"{args.pack} is whole")
    result = {"pack": args.pack, "ok": True, "digest": files.digest, "bytes": sum(file.bytes for file in files.manifest.files)}
    print(
        json.dumps(result)
        if args.json
        else f"{args.pack}: {len(files.manifest.files) + 1} files, {result['bytes']:,} bytes, all as written"
    )
    return 0


def top_of_pack(path: str, count: int) -> list["TopNgram"]:
    from byrote.checkpoint.packs import open_pack_files

    top = open_pack_files(path).top
    if not top:
        raise MemoryPackError(f"{path} lists no n-grams: it was packed with --no-text, or its run counted none")
    return top[:count]


# --- diff -------------------------------------------------------------------------------------------------------------


def add_diff(parser: argparse.ArgumentParser) -> None:
    _add_pack(parser, "a", "A")
    _add_pack(parser, "b", "B")
    _add_json(parser)


def diff(args: argparse.Namespace) -> int:
    from byrote.checkpoint.packs import open_pack_files
    from byrote.memory import merge as merging

    a, b = open_pack_files(args.a), open_pack_files(args.b)
    with Progress("diff") as live:
        live.update("comparing rows")
        found = merging.diff(a, b)
    if args.json:
        print(json.dumps(found._asdict(), indent=2, ensure_ascii=False))
        return 0
    rows = [(name, str(ours), str(theirs)) for name, (ours, theirs) in found.fields.items()]
    rows += [(name, "", "another shape" if far is None else f"differs by up to {far:.3g}") for name, far in found.weights.items()]
    if found.rows is None:
        rows.append(("rows", "", "not comparable: the hashes differ"))
    elif found.rows:
        rows.append(("rows", f"{found.rows:,} of {a.table.num_rows:,} differ", f"by {found.rows_rms:.3g} (root mean square)"))
    print_table(rows or [("the same", "", "")], ("", "A", "B"))
    return 0


# --- quantize and merge -----------------------------------------------------------------------------------------------


def add_quantize(parser: argparse.ArgumentParser) -> None:
    _add_pack(parser)
    parser.add_argument("out", metavar="OUT", help="folder to write; visits are left out, and the pack can no longer be trained or merged")
    add_writing(parser)


def quantize(args: argparse.Namespace) -> int:
    from byrote.checkpoint.packs import Contents, open_pack_files, write_pack
    from byrote.memory import merge as merging

    files, loss = open_pack_files(args.pack), merging.Loss()
    if files.manifest.table.dtype == "fp8":
        raise MemoryPackError(f"{args.pack}: table.dtype is fp8 already")
    form, records = merging.quantize(files, loss)
    manifest = replace(files.manifest, table=replace(files.manifest.table, dtype=form.dtype, counted=form.counted))
    with Progress("quantize") as live:
        contents = Contents(files.weights, files.canonical_V, records, files.top, lambda: _quantized_card(files, loss))
        target = write_pack(Path(args.out), manifest, contents, overwrite=args.overwrite, report=shown(live))
        live.close(f"{target} is written")
    before, after = (table.rows * table.format.bytes for table in (files.manifest.table, manifest.table))
    result = {"pack": str(target), "table_bytes": after, "table_bytes_before": before, "relative_error": loss.relative}
    result |= {"largest_error": loss.largest_error, "largest_number": loss.largest}
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    lost = f"{100 * loss.relative:.3g} % (root mean square), at most {loss.largest_error:.3g} where numbers reach {loss.largest:.3g}"
    print_table([("table", f"{format_bytes(before)} → {format_bytes(after)}, {form.bytes} bytes a row"), ("error", lost)])
    return 0


def add_merge(parser: argparse.ArgumentParser) -> None:
    _add_pack(parser, "a", "A")
    _add_pack(parser, "b", "B")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--name", metavar="NAME", help="what the merged pack is called (default: A+B)")
    add_writing(parser)


def merge(args: argparse.Namespace) -> int:
    from byrote.checkpoint.packs import Contents, open_pack_files, write_pack
    from byrote.memory import merge as merging

    a, b, merged = open_pack_files(args.a), open_pack_files(args.b), merging.Merged()
    records = merging.merge(a, b, merged)
    names = (a.manifest.name, b.manifest.name)
    manifest = replace(
        a.manifest,
        name=args.name or "+".join(names),
        provenance="; ".join(f"{pack.manifest.name}: {pack.manifest.provenance or 'not stated'}" for pack in (a, b)),
        licence=" and ".join(dict.fromkeys((a.manifest.licence, b.manifest.licence))),
    )
    top = merging.merge_top(a.top, b.top, max(len(a.top), len(b.top)))
    with Progress("merge") as live:
        contents = Contents(a.weights, a.canonical_V, records, top, lambda: _merged_card(a, b, merged))
        target = write_pack(Path(args.out), manifest, contents, overwrite=args.overwrite, report=shown(live))
        live.close(f"{target} is written")
    if args.json:
        print(json.dumps({"pack": str(target)} | asdict(merged), indent=2))
        return 0
    print_table([(what.replace("_", " "), count) for what, count in asdict(merged).items()], ("rows", "count"))
    return 0


def _quantized_card(files: "PackFiles", loss: "Loss") -> str:
    before = f"{_card_of(files)}\n\n" * bool(_card_of(files))
    lost = f"The rows of {files.digest} in FP8: relative error {loss.relative:.4g}, largest error {loss.largest_error:.4g}."
    return f"{before}## Quantized\n\n{lost} What was measured was measured before."


def _merged_card(a: "PackFiles", b: "PackFiles", merged: "Merged") -> str:
    rows = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in asdict(merged).items())
    return f"## Merged\n\nA is {a.manifest.name} ({a.digest}), B is {b.manifest.name} ({b.digest}). Rows: {rows}."


def _card_of(files: "PackFiles") -> str:
    """The sections that the maker of a pack added to its card."""
    from byrote.memory.card import added_sections
    from byrote.memory.pack import CARD, read_small

    return added_sections(read_small(files.folder / CARD, 1 << 30).decode("utf-8", "replace"))
