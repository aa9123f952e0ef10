"""`byrote import HF_FOLDER RUN`: a DeepSeek-V3, V3.2 or V4 model in Hugging Face form becomes a byrote checkpoint."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byrote.console import Progress, format_bytes, format_count, print_table
from byrote.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from byrote.checkpoint.huggingface import Inspected
    from byrote.tokenizer.bpe import Tokenizer

HELP = "read a DeepSeek-V3, V3.2 or V4 model in Hugging Face form"

EXAMPLES = """
examples:
  byrote import downloads/my-v3 runs/my-v3                 then: byrote generate runs/my-v3 "Once"
  byrote import downloads/my-v3 runs/my-v3 --dry-run       check names, shapes and dtypes; read no weights, write nothing

Read are config.json, safetensors files and tokenizer.json, MTP layers included, under the names of DeepSeek's own files or of transformers.
Nothing is unpickled: .bin and .pt files are refused. Tensors in float32, bfloat16 and float16 keep their dtype and bits; FP8 and packed FP4
weights are decoded to config.json's torch_dtype, each by the scales beside it. Memory needed: the decoded model and one weight file.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("source", metavar="HF_FOLDER", help="folder with config.json and safetensors files")
    parser.add_argument("target", metavar="RUN", help="folder to write, which must not exist or be empty")
    parser.add_argument("--without-tokenizer", action="store_true", help="import the weights alone")
    parser.add_argument("--dry-run", action="store_true", help="print what would be imported; write nothing")
    parser.add_argument("--json", action="store_true", help="print the result on stdout as JSON")


def run(args: argparse.Namespace) -> int:
    import byrote
    from byrote.checkpoint.huggingface import import_hf, import_tokenizer, inspect_hf
    from byrote.device import check_disk

    with Progress("import") as live:
        found = inspect_hf(args.source, report=live.update)
    target = _new_folder(args.target)
    wanted = found.has_tokenizer and not args.without_tokenizer
    try:
        tokenizer = import_tokenizer(args.source, found.config) if wanted else None
    except (DataError, CheckpointError) as error:
        raise type(error)(f"{error}; --without-tokenizer imports the weights alone") from error
    if not args.dry_run:
        check_disk(target, found.num_bytes, f"the checkpoint {target}")
        with Progress("import") as live:
            model = import_hf(args.source, report=live.update)
            live.update(f"writing {target}")
            byrote.save(model, target, tokenizer=tokenizer)
            live.close(f"{target} is written")
    result = _result(args, target, found, tokenizer)
    if args.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        _print(result)
    return 0


def _new_folder(path: str) -> Path:
    target = Path(path).expanduser()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder; name a new one for the checkpoint")
    return target


def _result(args: argparse.Namespace, target: Path, found: "Inspected", tokenizer: "Tokenizer | None") -> dict[str, Any]:
    from byrote.config import to_dict

    return {
        "source": args.source,
        "target": str(target),
        "dry_run": args.dry_run,
        "tensors": len(found.headers),
        "parameters": found.num_parameters,
        "bytes": found.num_bytes,
        "dtypes": found.dtypes,
        "decoded": len(found.coded),
        "mtp_depth": found.config.mtp.depth if found.config.mtp else 0,
        "tokenizer": None if tokenizer is None else tokenizer.vocab_size,
        "notes": found.notes + ([] if tokenizer else ["no tokenizer comes along: give token ids, or put tokenizer files into HF_FOLDER"]),
        "config": to_dict(found.config),
    }


def _print(result: dict[str, Any]) -> None:
    config = result["config"]
    rows = [
        ("blocks", f"{config['num_layers']} of width {config['dim']}, {result['mtp_depth']} MTP"),
        ("parameters", format_count(result["parameters"])),
        ("tensors", f"{result['tensors']}, {', '.join(result['dtypes'])}, {format_bytes(result['bytes'])} in memory"),
        *([("decoded", f"{result['decoded']} of them, from FP8 or FP4")] if result["decoded"] else []),
        ("tokenizer", "none" if result["tokenizer"] is None else f"{result['tokenizer']} tokens"),
        ("written to", f"{result['target']}{' (not yet: --dry-run)' if result['dry_run'] else ''}"),
    ]
    print_table(rows)
    for note in result["notes"]:
        print(f"note: {note}")
