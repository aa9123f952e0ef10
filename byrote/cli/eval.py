"""`byrote eval RUN`: `--bits FILES…`, bits per byte of text a model has not seen, beside what `xz -9` needs for the same bytes;
`--needle`, what it finds again in long texts (`cli/needle.py`)."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byrote.cli import needle
from byrote.cli.loading import add_weights
from byrote.console import Progress, format_bytes, format_count, format_duration, print_table
from byrote.errors import ConfigError, DataError

if TYPE_CHECKING:
    from byrote.eval.bits import BitsResult

HELP = "judge a run: bits per byte of your files against xz -9, or needle tests"

EXAMPLES = """
examples:
  byrote eval runs/tiny_cpu --bits README.md src/*.py
  byrote eval runs/tiny_cpu --bits book.txt --context 2048 --stride 512 --json
  byrote eval runs/tiny_cpu --bits README.md --weights int8
  byrote eval runs/tiny_cpu --needle --kinds single,distractor --lengths 256,512
  byrote eval --hf FOLDER --needle --hay essays.txt --lengths 1024,4096 --samples 100

Bits per byte is comparable across tokenizers and with compressors; less is better. Every file is scored as one document, in
windows of --context tokens that move on by --stride. The total of xz is that of the files one after the other. With --weights int8 the
same is scored twice, as saved and with the weights that `--weights int8` serves: what these lose.

A needle test hides statements in hay and asks for them at the end; an answer counts if every token of it is right under greedy
decoding. Cells that are finished are kept in --out, and the same command goes on behind them.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("run", metavar="RUN", nargs="?", help="folder made by `byrote train` or `byrote quickstart`")
    test = parser.add_mutually_exclusive_group(required=True)
    test.add_argument("--bits", metavar="FILE", nargs="+", help="UTF-8 text files to score")
    test.add_argument("--needle", action="store_true", help="needle tests over depth and length")
    parser.add_argument("--context", type=int, default=1024, metavar="TOKENS", help="tokens a window sees (default: %(default)s)")
    parser.add_argument("--stride", type=int, default=512, metavar="TOKENS", help="new tokens scored in each window (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    add_weights(parser)
    parser.add_argument("--json", action="store_true", help="print the result on stdout as JSON")
    needle.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if (args.run is None) == (args.hf is None):
        raise ConfigError("give one model: the folder of a run, or with --needle also --hf FOLDER")
    if args.hf is not None and args.weights != "saved":
        raise ConfigError(f"--weights {args.weights} is for runs; a model of --hf is judged with the weights it was saved with")
    if args.needle:
        return needle.run(args)
    if args.hf is not None:
        raise ConfigError("--bits needs a run; --hf goes with --needle")
    texts = read_texts(args.bits)
    result = _result(args, texts, _score(args, texts, "saved"))
    if args.weights != "saved":
        _add_other(result, args.weights, _score(args, texts, args.weights))
    if args.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        _print(result)
    return 0


def _score(args: argparse.Namespace, texts: list[tuple[str, str]], weights: str) -> "BitsResult":
    from byrote.cli.loading import load_for_text
    from byrote.eval.bits import bits_per_byte

    model, tokenizer = load_for_text(args.run, args.device, weights)
    with Progress("scoring") as live:
        return bits_per_byte(
            model,
            tokenizer,
            texts,
            context=args.context,
            stride=args.stride,
            progress=lambda done, total: live.update(f"window {done} of {total}"),
        )


def _add_other(result: dict[str, Any], weights: str, scored: "BitsResult") -> None:
    """What the same texts cost with other weights, in every row: `int8_bits_per_byte`, and `int8_loss`, the difference."""
    each = [one.bits / one.num_bytes for one in scored.per_text]
    for row, bits in zip([*result["files"], result["total"]], [*each, scored.bits_per_byte], strict=True):
        row |= {f"{weights}_bits_per_byte": bits, f"{weights}_loss": bits - row["bits_per_byte"]}


def _result(args: argparse.Namespace, texts: list[tuple[str, str]], scored: "BitsResult") -> dict[str, Any]:
    from byrote.eval.bits import xz_bits_per_byte

    blobs = [text.encode("utf-8") for _, text in texts]
    files = [
        _row(one.name, one.num_bytes, one.bits / one.num_bytes, xz_bits_per_byte([blob]))
        for one, blob in zip(scored.per_text, blobs, strict=True)
    ]
    total = _row("total", sum(map(len, blobs)), scored.bits_per_byte, xz_bits_per_byte(blobs))
    settings = {"run": args.run, "context": args.context, "stride": args.stride, "seeds": 1}
    return settings | {"files": files, "total": total, "tokens": scored.tokens, "seconds": scored.seconds}


def _row(name: str, num_bytes: int, bits: float, xz: float) -> dict[str, Any]:
    return {"name": name, "bytes": num_bytes, "bits_per_byte": bits, "xz_bits_per_byte": xz, "ratio": bits / xz}


def _print(result: dict[str, Any]) -> None:
    rows = result["files"] + ([result["total"]] if len(result["files"]) > 1 else [])
    cells: list[tuple[str, ...]] = [
        (row["name"], format_bytes(row["bytes"]), f"{row['bits_per_byte']:.4f}", f"{row['xz_bits_per_byte']:.4f}", f"{row['ratio']:.3f}")
        for row in rows
    ]
    head: tuple[str, ...] = ("file", "size", "bits per byte", "xz -9", "ratio")
    if "int8_loss" in result["total"]:
        cells = [(*cell, f"{row['int8_bits_per_byte']:.4f}", f"{row['int8_loss']:+.4f}") for cell, row in zip(cells, rows, strict=True)]
        head = (*head, "with int8", "lost")
    print_table(cells, head)
    print(
        f"\n{result['run']} (one run, so one seed): {format_count(result['tokens'])} tokens in {format_duration(result['seconds'])}, "
        f"context {result['context']}, stride {result['stride']}"
    )


def read_texts(paths: list[str]) -> list[tuple[str, str]]:
    """(name, text) of every file, byte for byte. DataError for one that is missing, a folder, empty or no UTF-8 text."""
    return [(path, _read(Path(path))) for path in paths]


def _read(path: Path) -> str:
    if path.is_dir():
        raise DataError(f"{path} is a folder; --bits takes files: {path}/*")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check the name and the permissions") from error
    if not raw:
        raise DataError(f"{path} is empty: there is nothing to score. Leave it out")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is no UTF-8 text (byte {error.start} is {raw[error.start]:#04x}). Leave it out, or convert it with iconv"
        ) from None
