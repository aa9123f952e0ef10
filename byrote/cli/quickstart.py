"""`byrote quickstart`: from nothing to a trained model, a report and a prompt, on the Python library of this machine."""

import argparse
import json
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byrote.console import Progress, format_count, format_duration, print_table, read_json_lines
from byrote.errors import ConfigError

if TYPE_CHECKING:
    from byrote.cli.training import Validator
    from byrote.eval.report import GatedText, Sample
    from byrote.train.run import RunConfig
    from byrote.train.session import Run, TrainSummary

HELP = "train a complete small model on this machine's Python library in a few minutes"

EXAMPLES = """
examples:
  byrote quickstart                        about five minutes; writes runs/quickstart
  byrote quickstart --seconds 20           a quick look
  byrote quickstart                        again: goes on where it was stopped, or shows the result

Ctrl-C saves; the same command goes on from there.
"""

_PROMPTS = ("def read_lines(path):\n", "import ", "class Queue:\n    def __init__(self")
_SAMPLE_TOKENS = 80
_SHADED_TOKENS = 220
_PROBE_TOKENS = 512
_PROBE_LINES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("--seconds", type=float, metavar="S", help="wall clock of the training alone (default: that of the recipe, 225)")
    parser.add_argument("--out", default="runs/quickstart", metavar="DIR", help="folder of the run (default: runs/quickstart)")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or mps (default: cpu, the recipe's)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of weights and data order (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    config = _config(args)
    from byrote.cli.training import train_with_progress

    with Progress() as progress:
        resume = (out / "run.json").exists()
        finished, summary, validator = train_with_progress(config, out, resume=resume, progress=progress)
        if summary.interrupted:
            print(f"Saved. To go on: byrote quickstart --out {out}")
            return 130
        progress.update("comparing with silenced memory and xz")
        bits = _bits(finished, validator)
        progress.update("writing the report")
        report = _write_report(finished, summary, bits)
    _print_result(out, finished, summary, bits, report, as_json=args.json)
    return 0


def _config(args: argparse.Namespace) -> "RunConfig":
    from byrote.recipes import load_recipe

    config = load_recipe("tiny_cpu")
    train = config.train
    if args.seconds is not None:
        if not 0 < args.seconds < math.inf:
            raise ConfigError(f"--seconds is {args.seconds:g}; give a positive number, such as 20 or 225")
        train = replace(train, seconds=args.seconds)
    if args.device is not None:
        train = replace(train, device=args.device)
    data = config.data
    if args.seed is not None:
        train, data = replace(train, seed=args.seed), replace(data, seed=args.seed)
    return replace(config, train=train, data=data)


def _bits(run: "Run", validator: "Validator") -> dict[str, float]:
    """Bits per byte of the validation texts: the model, the model with zeroed memory, xz (where this Python has it)."""
    from byrote.eval.bits import xz_bits_per_byte

    bits = {"model": validator.score(run).bits_per_byte}
    if run.model.memory is not None:
        bits["without_memory"] = validator.score_without_memory(run).bits_per_byte
    if find_spec("_lzma") is not None:  # some builds of Python leave it out: no reason to lose the run
        bits["xz"] = xz_bits_per_byte([document.text.encode("utf-8") for document in run.prepared.validation])
    return bits


# ── report ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _write_report(run: "Run", summary: "TrainSummary", bits: dict[str, float]) -> Path:
    from byrote.checkpoint.atomic import replace_file
    from byrote.eval.probes import composite_gain, expert_loads, mtp_acceptance
    from byrote.eval.report import Report, render

    rows = read_json_lines(run.out / "metrics.jsonl")
    lines = _probe_lines(run)
    page = render(
        Report(
            title="byrote quickstart",
            facts=_facts(run, summary, bits),
            train=[row for row in rows if row["kind"] == "train"],
            validation=[row for row in rows if row["kind"] == "validation"],
            bits=_bars(bits),
            bits_note=_note(run),
            gated=_gated(run),
            gains=composite_gain(run.model, lines[0]),
            loads=expert_loads(run.model, lines),
            acceptance=mtp_acceptance(run.model, lines),
            samples=_samples(run),
        )
    )
    path = run.out / "report.html"
    replace_file(path, page.encode("utf-8", "replace"))  # a file's name may hold bytes that are no text
    return path


def _bars(bits: dict[str, float]) -> list[Any]:
    from byrote.eval.report import Bar

    labels = {"model": "this model", "without_memory": "the same, memory zeroed", "xz": "xz -9"}
    return [Bar(labels[name], value) for name, value in bits.items()]


def _note(run: "Run") -> str:
    held, train = run.prepared.facts["validation"], run.config.train
    return (
        f"{held['documents']} files, {held['bytes']:,} bytes, never trained on: {held['rule']}. "
        f"Each token sees {train.eval_context - train.eval_stride} to {train.eval_context} tokens of its file (all there are before that). "
        "xz compresses the same files, one after the other. One run, one seed."
    )


def _facts(run: "Run", summary: "TrainSummary", bits: dict[str, float]) -> list[tuple[str, str]]:
    facts = run.prepared.facts
    table = [
        ("corpus", f"{facts['training']['documents']:,} files, {facts['training']['bytes'] / 1e6:.1f} MB"),
        ("Python", facts.get("python", {}).get("python", "—")),
        (
            "parameters",
            f"{format_count(summary.parameters)} trained densely, {format_count(summary.memory_parameters)} in the memory table",
        ),
        ("training", f"{summary.steps:,} steps, {format_count(summary.tokens)} tokens in {format_duration(summary.seconds)}"),
        ("speed", f"{summary.tokens_per_second:,.0f} tokens/s on {run.device}"),
        ("bits per byte", f"{bits['model']:.3f}"),
    ]
    if "without_memory" in bits:
        table.append(("… with memory zeroed", f"{bits['without_memory']:.3f}"))
    xz = (
        f"{bits['xz']:.3f} ({bits['model'] / bits['xz']:.2f} × of it)"
        if "xz" in bits
        else "not measured: this Python was built without lzma"
    )
    return [*table, ("xz -9", xz)]


def _probe_lines(run: "Run") -> list[list[int]]:
    """Beginnings of validation files, as token ids."""
    texts = sorted((document.text for document in run.prepared.validation), key=len, reverse=True)[:_PROBE_LINES]
    return [[run.tokenizer.begin_id, *ids[: _PROBE_TOKENS - 1]] for ids in run.tokenizer.encode_batch(texts)]


def _gated(run: "Run") -> list["GatedText"]:
    """The beginnings of two validation files, each token with its mean gate."""
    from byrote.eval.probes import memory_gates
    from byrote.eval.report import GatedText

    if run.model.memory is None:
        return []
    longest = sorted(run.prepared.validation, key=lambda document: len(document.text), reverse=True)
    shown = []
    for document in longest[1:3] or longest[:1]:
        ids = [run.tokenizer.begin_id, *run.tokenizer.encode(document.text)[:_SHADED_TOKENS]]
        gates = memory_gates(run.model, ids).mean(dim=(1, 2)).tolist()
        pieces = [run.tokenizer.token_bytes(token).decode("utf-8", "replace") for token in ids[1:]]
        shown.append(GatedText(document.name, pieces, gates[1:]))
    return shown


def _samples(run: "Run") -> list["Sample"]:
    from byrote.engine.request import SamplingParams
    from byrote.eval.report import Sample
    from byrote.eval.sample import generate

    params = SamplingParams(max_tokens=_SAMPLE_TOKENS, temperature=0.7, top_p=0.95, seed=0)
    run.model.eval()
    return [Sample(prompt, "".join(generate(run.model, run.tokenizer, prompt, params))) for prompt in _PROMPTS]


# ── the last words ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _print_result(out: Path, run: "Run", summary: "TrainSummary", bits: dict[str, float], report: Path, *, as_json: bool) -> None:
    if as_json:
        result = {
            "run": str(out),
            "report": str(report),
            "steps": summary.steps,
            "tokens": summary.tokens,
            "seconds": round(summary.seconds, 1),
        }
        print(json.dumps(result | {"bits_per_byte": bits, "ratio_to_xz": bits["model"] / bits["xz"] if "xz" in bits else None}))
        return
    print()
    print_table(_facts(run, summary, bits))
    print("\nNext:")
    print(f"  open {report}                                   what it learnt, in pictures")
    print(f'  byrote generate {out} "def main("               let it write')
    print(f"  byrote eval {out} --bits FILE…                  score your own files against xz")
