"""The engine against transformers' `generate` on the V3-shaped bench model, fp32, greedy; all in turn in one run.

    python -m bench.bench_engine [--rounds 3] [--mtp RUN]

batch     16 requests of 128 + 128 tokens at once, against transformers one at a time: ratio of tokens per second
first     1,024 prompt tokens, first token: ratio of seconds
single    one request of 128 + 256 tokens
mtp       with --mtp, on a trained run that has MTP: one request at a time, `--drafts` a step against none, prompts apart. a: right
          drafts a step; v, d: seconds of reading with drafts, and of drafting, in readings without (rows of memory asked for ahead
          included); what was reached of (1 + a) / (v + d). The prompts are pieces of --text, which the run should not have seen.
          --ordinary: both without the captured step. --right SHARE: drafts are made and paid for, then exchanged for ones that are
          right so often, for what v and d would bring a model that drafts better
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.measure import report, spread, take_turns
from bench.models import bench_model
from byrote.checkpoint.huggingface import to_transformers
from byrote.checkpoint.local import load
from byrote.engine.engine import Engine, EngineConfig
from byrote.engine.request import SamplingParams
from byrote.model.state import DecodeState

PROMPT, NEW, LONG, REQUESTS, MTP_PROMPTS = 128, 128, 1024, 16, 8
GREEDY = SamplingParams(max_tokens=NEW, temperature=0.0)


def prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    return torch.randint(0, vocab_size, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


def drain(engine: Engine) -> dict[str, list[int]]:
    """Run all requests to their end; ids by request."""
    said: dict[str, list[int]] = {}
    while engine.has_work():
        for event in engine.step():
            if event.error is not None:
                raise event.error
            said.setdefault(event.request, []).extend(token.id for token in event.tokens)
    return said


def serve(engine: Engine, ids: list[list[int]], params: SamplingParams) -> list[list[int]]:
    names = [engine.add_request(one, params) for one in ids]
    said = drain(engine)
    return [said[name] for name in names]


def against_transformers(rounds: int) -> None:
    model = bench_model().eval()
    peer = to_transformers(model).eval()
    config = EngineConfig(prefix_cache=False)  # each round shall read its prompts
    engine, many = Engine(model, None, config), prompts(REQUESTS, PROMPT, model.config.vocab_size)
    long = prompts(1, LONG, model.config.vocab_size)
    said: dict[str, list[list[int]]] = {}

    def ours(name: str, ids: list[list[int]], new: int) -> Callable[[], None]:
        def work() -> None:
            said[name] = serve(engine, ids, replace(GREEDY, max_tokens=new))

        return work

    def theirs(ids: list[int], new: int) -> Callable[[], None]:
        def work() -> None:
            with torch.no_grad():
                tokens = torch.tensor([ids])
                out = peer.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0)
            said["peer"] = [out[0, len(ids) :].tolist()]

        return work

    contenders = {
        "batch 16": ours("batch", many, NEW),
        "single": ours("single", many[:1], 256),
        "first": ours("first", long, 1),
        "peer batch 1": theirs(many[0], NEW),
        "peer single": theirs(many[0], 256),
        "peer first": theirs(long[0], 1),
    }
    seconds = take_turns(contenders, rounds=rounds)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    report(
        "engine",
        {
            "batch_16_over_peer": (REQUESTS * NEW / median["batch 16"]) / (NEW / median["peer batch 1"]),
            "first_token_over_peer": median["first"] / median["peer first"],
            "single_over_peer": median["peer single"] / median["single"],
            "tokens_per_second": {
                "batch 16": REQUESTS * NEW / median["batch 16"],
                "single": 256 / median["single"],
                "peer": NEW / median["peer batch 1"],
                "peer single": 256 / median["peer single"],
            },
            "alone_equals_in_batch": said["batch"][0] == said["single"][0][:NEW],
            "captured": engine.runner.why_not or "yes",
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "sizes": {"prompt": PROMPT, "new": NEW, "single_new": 256, "long_prompt": LONG, "requests": REQUESTS, "precision": "fp32"},
        },
    )


class Stopwatch:
    """Seconds and calls of one method of an object."""

    def __init__(self, owner: object, name: str) -> None:
        self._work, self.seconds, self.calls = getattr(owner, name), 0.0, 0
        setattr(owner, name, self)

    def __call__(self, *args: Any, **more: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._work(*args, **more)
        finally:
            self.seconds += time.perf_counter() - start
            self.calls += 1

    @property
    def mean(self) -> float:
        return self.seconds / self.calls


def exchange_drafts(engine: Engine, answer_to: Callable[[list[int]], list[int]], share: float) -> None:
    """Every draft is made as before, then becomes what will be chosen with probability `share`, and another token otherwise."""
    draft, dice, vocab_size = engine.runner.draft, random.Random(0), engine.model.config.vocab_size

    def exchanged(state: DecodeState, tokens: Sequence[int], count: int) -> list[list[int]]:
        (choice,) = engine._loop.batch.choices
        made, answer = draft(state, tokens, count)[0], answer_to(choice.prompt)[len(choice.output) :]
        return [[token if dice.random() < share else (token + 1) % vocab_size for token in (answer + made)[:count]]]

    engine.runner.draft = exchanged  # type: ignore[method-assign]


def drafts_against_none(run: str, text: Path, rounds: int, drafts: int, count: int, new: int, captured: bool, right: float | None) -> None:
    model, tokenizer = load(run)
    assert tokenizer is not None, "the run was saved without a tokenizer"
    ids = tokenizer.encode(text.read_text(encoding="utf-8"))
    starts = range(0, len(ids) - PROMPT, len(ids) // count)
    several = [[tokenizer.begin_id, *ids[start : start + PROMPT]] for start in starts][:count]
    params = replace(GREEDY, max_tokens=new, ignore_end=True)
    config = EngineConfig(prefix_cache=False, max_drafts=drafts, captured=captured)
    engines = {how: Engine(model, None, replace(config, speculate=how)) for how in ("off", "always")}
    reading = {how: Stopwatch(engine._loop.batch, "run") for how, engine in engines.items()}
    asking = Stopwatch(engines["off"]._loop.batch, "ask")
    said: dict[str, list[list[int]]] = {}
    if right is not None:
        exchange_drafts(engines["always"], lambda prompt: said["off"][several.index(prompt)], right)
    drafting = Stopwatch(engines["always"].runner, "draft")
    prompts_in = {how: Stopwatch(engine._loop, "read_prompts") for how, engine in engines.items()}
    answering: dict[str, list[float]] = {how: [] for how in engines}

    def work(how: str) -> None:
        start = time.perf_counter() - prompts_in[how].seconds
        said[how] = [serve(engines[how], [one], params)[0] for one in several]
        answering[how].append(time.perf_counter() - prompts_in[how].seconds - start)

    take_turns({"off": lambda: work("off"), "always": lambda: work("always")}, rounds=rounds)
    seconds = {how: values[1:] for how, values in answering.items()}  # the first warmed up
    stats, plain = engines["always"].stats(), reading["off"].mean + asking.seconds / reading["off"].calls
    a, v, d = sum(stats.accepted) / drafting.calls, reading["always"].mean / plain, drafting.mean / plain
    speed_up = statistics.median(seconds["off"]) / statistics.median(seconds["always"])
    report(
        "speculation",
        {
            "speed_up": speed_up,
            "reached_of_bound": speed_up / ((1 + a) / (v + d)),
            "a": a,
            "v": v,
            "d": d,
            "accepted_by_position": [hit / max(tried, 1) for hit, tried in zip(stats.accepted, stats.drafted, strict=True)],
            "tokens_per_second": {how: len(several) * new / statistics.median(values) for how, values in seconds.items()},
            "captured": engines["off"].runner.why_not or "yes",
            "equal_answers": sum(a == b for a, b in zip(said["off"], said["always"], strict=True)),
            "seconds": {how: spread(values) for how, values in seconds.items()},
            "sizes": {
                "prompt": PROMPT,
                "new": new,
                "prompts": len(several),
                "drafts_exchanged_to_be_right": right,
                "drafts": drafts,
                "dim": model.config.dim,
                "run": Path(run).name,
            },
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mtp", metavar="RUN", help="measure drafts on this run instead")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="file whose pieces are the prompts (default: this one)")
    parser.add_argument("--drafts", type=int, default=1, help="a step (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=MTP_PROMPTS, help="with --mtp (default: %(default)s)")
    parser.add_argument("--new", type=int, default=NEW, help="tokens of an answer with --mtp (default: %(default)s)")
    parser.add_argument("--right", type=float, metavar="SHARE", help="exchange drafts so that this share of them is right")
    parser.add_argument("--ordinary", action="store_true", help="without the captured step")
    args = parser.parse_args()
    if args.mtp:
        drafts_against_none(args.mtp, args.text, args.rounds, args.drafts, args.prompts, args.new, not args.ordinary, args.right)
    else:
        against_transformers(args.rounds)


if __name__ == "__main__":
    main()
