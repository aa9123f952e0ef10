"""`byrote generate RUN "prompt"`: the continuation on stdout as it is made, speed and seed on stderr."""

import argparse
import json
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from byrote.cli.loading import add_weights

HELP = "continue a prompt with a trained run"

EXAMPLES = """
examples:
  byrote generate runs/quickstart "def read_lines(path):"
  byrote generate runs/tiny_cpu "Once" --temperature 0 --max-tokens 64 --stop $'\\n\\n'
  cat notes.txt | byrote generate runs/tiny_cpu - --top-p 0.9 --seed 7 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from byrote.engine.request import SamplingParams

    default = SamplingParams()
    parser.epilog = EXAMPLES
    parser.add_argument("run", metavar="RUN", help="folder made by `byrote train` or `byrote quickstart`")
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue; - reads it from stdin")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", default=default.max_tokens, help="at most this many new tokens (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, metavar="T", default=default.temperature, help="0 is greedy (default: %(default)s)")
    parser.add_argument(
        "--top-k", type=int, metavar="K", default=default.top_k, help="choose among the K most probable; 0: all (default: %(default)s)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        default=default.top_p,
        help="choose among the most probable that reach share P (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text (default: a new one, printed on stderr)")
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end the output before TEXT; may be given several times"
    )
    parser.add_argument("--no-stream", action="store_true", help="print the text when it is complete")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    add_weights(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object when the text is complete")


def run(args: argparse.Namespace) -> int:
    from byrote.cli.loading import load_for_text
    from byrote.engine.request import SamplingParams
    from byrote.eval.sample import decode_pieces, generate_ids, prompt_ids
    from byrote.model.capture import capture_or_model

    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=secrets.randbits(32) if args.seed is None else args.seed,
        stop=tuple(args.stop),
    )
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    model, tokenizer = load_for_text(args.run, args.device, args.weights)
    ids = prompt_ids(tokenizer, prompt)
    _warn_if_long(len(ids) + params.max_tokens, model.config.max_positions)
    step, why_not = capture_or_model(model)
    counter = Counter(generate_ids(model, ids, params, end_ids=(tokenizer.end_id,), step=step))
    pieces = decode_pieces(tokenizer, counter, params.stop)
    text = "".join(pieces if args.json or args.no_stream else _echo(pieces))
    if args.json:
        facts = counter.facts(params.max_tokens) | {"captured": not why_not}
        print(json.dumps({"prompt": prompt, "text": text, "seed": params.seed} | facts, ensure_ascii=False))
        return 0
    print(text if args.no_stream else "")
    print(f"byrote: {counter.line()}, seed {params.seed}; {f'not captured: {why_not}' if why_not else 'captured step'}", file=sys.stderr)
    return 0


class Counter:
    """Passes ids on, and knows how many there were and how fast they came."""

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids = ids
        self._at_end = False  # stays so when a stop string ends the reading
        self.tokens, self.first_s, self.total_s = 0, 0.0, 0.0

    def __iter__(self) -> Iterator[int]:
        start = time.perf_counter()
        for token in self._ids:
            self.total_s = time.perf_counter() - start
            self.first_s = self.first_s or self.total_s
            self.tokens += 1
            yield token
        self._at_end = True

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first, which also had to read the prompt; None without any."""
        after = self.total_s - self.first_s
        return (self.tokens - 1) / after if self.tokens > 1 and after > 0 else None

    def facts(self, max_tokens: int) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "finish": "length" if self._at_end and self.tokens == max_tokens else "stop",
            "first_token_s": self.first_s,
            "total_s": self.total_s,
            "tokens_per_second": self.tokens_per_second,
        }

    def line(self) -> str:
        speed = "" if self.tokens_per_second is None else f", then {self.tokens_per_second:.1f} tokens/s"
        return f"{self.tokens} tokens, first after {self.first_s:.2f} s{speed}"


def _echo(pieces: Iterable[str]) -> Iterator[str]:
    for piece in pieces:
        print(piece, end="", flush=True)
        yield piece


def _warn_if_long(tokens: int, positions: int) -> None:
    if tokens > positions:
        print(f"byrote: up to {tokens} tokens, but model.max_positions is {positions}: expect worse text beyond", file=sys.stderr)
