"""`byrote export RUN HF_FOLDER`: a byrote checkpoint becomes a DeepSeek-V3, V3.2 or V4 model in Hugging Face form."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byrote.console import Progress, format_bytes, print_table
from byrote.errors import ConfigError

if TYPE_CHECKING:
    from byrote.checkpoint.huggingface import Export

HELP = "write a model as DeepSeek-V3, V3.2 or V4 in Hugging Face form"

EXAMPLES = """
examples:
  byrote export runs/my-v3 exports/my-v3                     readable by transformers and whatever reads DeepSeek's files
  byrote export runs/my-v3 exports/my-v3 --overwrite         replace an earlier export, in one piece
  byrote export runs/my-v3 exports/my-v3 --shard-gb 2        more, smaller files
  byrote export runs/my-v3 exports/my-v3 --dry-run           print what would be written

Attention decides the architecture: MLA is V3, DSA V3.2, CSA and HCA V4. V3 and V3.2 have one plain residual stream, V4 has mHC, and none
has memory: export works for models trained like that, and says which part is in the way of the others. MTP modules are written as the
release's. Weights keep their dtype and bits; they are not made FP8 or FP4.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("source", metavar="RUN", help="folder of a run or checkpoint")
    parser.add_argument("target", metavar="HF_FOLDER", help="folder to write")
    parser.add_argument(
        "--layout",
        choices=("release", "transformers"),
        default="release",
        help="names of DeepSeek's own files, or of transformers' class; it reads both (default: %(default)s)",
    )
    parser.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="largest size of one weight file (default: %(default)g)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model that HF_FOLDER holds")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written; write nothing")
    parser.add_argument("--json", action="store_true", help="print the result on stdout as JSON")


def run(args: argparse.Namespace) -> int:
    import byrote
    from byrote.checkpoint.huggingface import check_target, export_hf, plan_export

    if args.shard_gb <= 0:
        raise ConfigError(f"--shard-gb is {args.shard_gb:g}; it must be more than 0")
    target, max_bytes = check_target(args.target, args.overwrite), int(args.shard_gb * 1000**3)
    with Progress("export") as live:
        live.update(f"loading {args.source}")
        model, tokenizer = byrote.load(args.source, device="cpu")
        if args.dry_run:
            export = plan_export(model, tokenizer, layout=args.layout, max_shard_bytes=max_bytes)
        else:
            sizes = {"layout": args.layout, "max_shard_bytes": max_bytes}
            export = export_hf(model, tokenizer, target, overwrite=args.overwrite, report=live.update, **sizes)
        live.close(f"{target} {'would be' if args.dry_run else 'is'} written")
    result = _result(args, target, export, tokenizer is not None)
    if args.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        _print(result)
    return 0


def _result(args: argparse.Namespace, target: Path, export: "Export", has_tokenizer: bool) -> dict[str, Any]:
    return {
        "source": args.source,
        "target": str(target),
        "dry_run": args.dry_run,
        "files": export.files,
        "tensors": export.num_tensors,
        "bytes": export.num_bytes,
        "tokenizer": has_tokenizer,
        "config": export.config,
    }


def _print(result: dict[str, Any]) -> None:
    config = result["config"]
    layers = f"{config['num_hidden_layers']} layers and {config['num_nextn_predict_layers']} of MTP"
    rows = [
        ("model", f"{config['model_type']}, {layers}, {config['torch_dtype']}"),
        ("tensors", f"{result['tensors']}, {format_bytes(result['bytes'])}"),
        ("files", ", ".join(result["files"])),
        ("written to", f"{result['target']}{' (not yet: --dry-run)' if result['dry_run'] else ''}"),
    ]
    print_table(rows)
    if not result["tokenizer"]:
        print("note: this run has no tokenizer; put tokenizer.json and tokenizer_config.json into the folder before using it for text")
