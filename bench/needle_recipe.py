"""Retrieval against length: dense MLA, DSA and V4 attention, each with and without memory, trained on synthetic recall.

    python -m bench.needle_recipe [--out runs/needle-study] [--steps N] [--samples 40]

Trains the recipes `needle`, `needle_dsa` and `needle_v4` (two to four minutes each on one core; a run that was stopped goes on, a
finished one is taken as it is), asks every model for one of up to 32 pairs at five depths of texts of 16 to 2,048 tokens (training
went to 256), prints the table with 95 % intervals, writes it to bench/results/needle.jsonl and a picture to OUT.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import byrote
from bench.measure import report
from byrote.cli.main import main as cli
from byrote.console import print_table
from byrote.data.config import RecallConfig
from byrote.data.synthetic import alphabet
from byrote.eval.curves import Series, svg_lines
from byrote.eval.harness import ByroteLM
from byrote.eval.needle import RecallNeedles, Score, even_depths, grid, pooled, score_cells

KINDS = {"needle": "dense MLA", "needle_dsa": "DSA", "needle_v4": "V4"}
MEMORY = {"memory": [], "without": ["--model.engram", "none"]}
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)


def trained(recipe: str, memory: str, out: Path, options: list[str]) -> Path:
    """The folder of a finished run."""
    folder = out / f"{recipe}-{memory}"
    resume = ["--resume"] if (folder / "run.json").exists() else []
    if cli(["train", recipe, *MEMORY[memory], *options, "--out", str(folder), *resume]) != 0:
        raise SystemExit(f"{folder} was not trained to its end; the same command goes on from here")
    return folder


def judged(folder: Path, samples: int) -> dict[int, Score]:
    """Right answers by length, all depths together."""
    model, tokenizer = byrote.load(folder)
    assert tokenizer is not None, "byrote train keeps the tokenizer"
    saved = json.loads((folder / "run.json").read_text())["config"]["data"]["sources"][0]["recall"]
    sizes = RecallConfig(**saved)
    cells = grid(["multi-key"], LENGTHS, even_depths(5))
    source = RecallNeedles(sizes, alphabet(sizes, tokenizer))
    scores = dict(score_cells(ByroteLM(str(folder), model, tokenizer), source, cells, samples=samples))
    return {length: score for length in LENGTHS if (score := pooled(scores, length=length)) is not None}


def draw(results: dict[str, dict[int, Score]], file: Path) -> None:
    series = [Series(name, [(length, 100 * score.share) for length, score in found.items()]) for name, found in results.items()]
    file.write_text(
        svg_lines(series, title="Recall of one of up to 32 pairs", x_label="tokens (trained to 256)", y_label="per cent right", log_x=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/needle-study"))
    parser.add_argument("--steps", type=int, help="of each run (default: the recipe's)")
    parser.add_argument("--samples", type=int, default=40, help="texts for each length and depth")
    args = parser.parse_args()
    options = [] if args.steps is None else ["--train.steps", str(args.steps)]
    results: dict[str, dict[int, Score]] = {}
    facts: dict[str, Any] = {}
    for recipe, kind in KINDS.items():
        for memory in MEMORY:
            folder, name = trained(recipe, memory, args.out, options), f"{kind}, {'with' if memory == 'memory' else 'without'} memory"
            began = time.perf_counter()
            results[name] = judged(folder, args.samples)
            summary = json.loads((folder / "run.json").read_text())["summary"]
            facts[name] = {"train_seconds": summary["seconds"], "steps": summary["steps"], "judge_seconds": time.perf_counter() - began}
    print_table([(name, *found.values()) for name, found in results.items()], ("attention", *(f"{length:,}" for length in LENGTHS)))
    draw(results, args.out / "needle.svg")
    print(f"\nper cent right with 95 % intervals, {5 * args.samples} texts each, one seed; picture: {args.out / 'needle.svg'}")
    shares = {name: {length: (score.hits, score.samples) for length, score in found.items()} for name, found in results.items()}
    report("needle", {"right_of_samples_by_length": shares, "runs": facts, "seed": 0})


if __name__ == "__main__":
    main()
