"""`byrote extend RUN`: a trained run goes on with a longer context by YaRN, and is judged by position before and after."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from byrote.console import Progress, print_table
from byrote.errors import DataError

if TYPE_CHECKING:
    from byrote.train.run import RunConfig

HELP = "give a trained run a longer context (YaRN), and measure what it is worth"

EXAMPLES = """
examples:
  byrote extend runs/tiny_cpu --factor 4 --steps 100
  byrote extend runs/needle --factor 4 --steps 200 --out runs/needle-x4 --json
  byrote extend runs/needle --factor 4 --control                               # what the further training alone brings

The table has a line for each octave of positions, nats a token of the validation texts (a run on synthetic recall alone: a line for each
length, per cent right), before and after. The needles of the long run: byrote eval OUT --needle.
"""

SAMPLES = 100  # recall texts of each length
_COLUMNS = ("before", "after")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("run", metavar="RUN", help="folder made by `byrote train` or `byrote quickstart`")
    parser.add_argument("--factor", type=int, default=4, metavar="N", help="how many times as long, a power of two (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="steps of training on long rows (default: %(default)s)")
    parser.add_argument("--control", action="store_true", help="train the same steps without YaRN, to tell its gain from the training's")
    parser.add_argument("--out", metavar="DIR", help="folder of the long run (default: RUN-xN, of a control RUN-xN-control)")
    parser.add_argument("--resume", action="store_true", help="go on with the long run in --out")
    parser.add_argument("--json", action="store_true", help="print the result on stdout as JSON")


def run(args: argparse.Namespace) -> int:
    from byrote.cli.train import INTERRUPTED, check_folder
    from byrote.cli.training import train_with_progress
    from byrote.recipes.extend import extended

    start = args.run.rstrip("/")
    before = _config_of(Path(start))
    after = extended(before, start, args.factor, args.steps, yarn=not args.control)
    out = Path(args.out or f"{start}-x{args.factor}{'-control' * args.control}")
    check_folder(out, args.resume)
    measure = _loss if after.data.texts else _recall
    with Progress() as progress:
        progress.update("judging the run as it is")
        columns = [measure(start, start, after)]  # first, as it may refuse: no text may be long enough
        _, summary, _ = train_with_progress(after, out, resume=args.resume, progress=progress)
        if summary.interrupted:
            return INTERRUPTED
        progress.update("judging the long run")
        columns.append(measure(str(out), start, after))
    lines = [{"at": at, "n": n} | {name: column[at][0] for name, column in zip(_COLUMNS, columns)} for at, (_, n) in columns[0].items()]
    if args.json:
        print(json.dumps({"run": str(out), "steps": summary.steps, "lines": lines}, ensure_ascii=False))
        return 0
    unit = "nats a token" if after.data.texts else "per cent right"
    print_table([(line["at"], *(f"{line[name]:.3f}" for name in _COLUMNS), line["n"]) for line in lines], ("positions", *_COLUMNS, "n"))
    print(f"\n{unit}; one run, one seed. The long run: {out}")
    return 0


def _config_of(folder: Path) -> "RunConfig":
    from byrote.config import from_dict
    from byrote.train.run import RunConfig

    try:
        return from_dict(RunConfig, json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} is no run: run.json cannot be read ({error}); give a folder made by `byrote train`") from None


def _loss(folder: str, start: str, after: "RunConfig") -> dict[str, tuple[float, int]]:
    """Octave → (nats a token, tokens), of the texts that the run in `start` held back."""
    from byrote.cli.loading import load_for_text
    from byrote.console import read_json_lines
    from byrote.eval.positions import loss_by_position

    model, tokenizer = load_for_text(folder, "cpu")
    texts = [row["text"] for row in read_json_lines(Path(start) / "data" / "validation.jsonl")]
    octaves = loss_by_position(model, tokenizer, texts, after.data.sequence_length)
    return {f"{octave.first}–{octave.last}": (octave.loss, octave.tokens) for octave in octaves}


def _recall(folder: str, _start: str, after: "RunConfig") -> dict[str, tuple[float, int]]:
    """Length → (per cent right, texts)."""
    from byrote.cli.loading import load_for_text
    from byrote.data.config import RecallConfig
    from byrote.data.synthetic import alphabet, lengths
    from byrote.eval.harness import ByroteLM
    from byrote.eval.needle import RecallNeedles, even_depths, grid, pooled, score_cells

    model, tokenizer = load_for_text(folder, "cpu")
    sizes = after.data.sources[0].recall or RecallConfig()
    source = RecallNeedles(sizes, alphabet(sizes, tokenizer))
    cells = grid(["multi-key"], lengths(sizes, after.data.sequence_length), even_depths(5))
    scores = dict(score_cells(ByroteLM(folder, model, tokenizer), source, cells, samples=SAMPLES // 5))
    found = {cell.length: pooled(scores, length=cell.length) for cell in cells}
    return {f"{length}": (100 * score.share, score.samples) for length, score in found.items() if score is not None}
