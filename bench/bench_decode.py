"""Greedy decode, batch 1, fp32, prompt 128, 256 new tokens: captured steps, ordinary steps, and transformers' `generate`.

    python -m bench.bench_decode [--rounds 5]             the V3-shaped bench model, all three with the same weights
    python -m bench.bench_decode --preset tiny            one of byrote's own presets, which transformers cannot express

Ids must be equal where no two logits tie. Beside the speeds stands the limit that memory sets: the weights one token reads, over
the rate at which a sum over 256 MiB reads in the same run; and the share of a captured token that is spent in C.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from bench.measure import report, spread, take_turns
from bench.models import bench_model
from byrote.checkpoint.huggingface import to_transformers
from byrote.engine.request import SamplingParams
from byrote.eval.sample import generate_ids
from byrote.kernels.decode_step import cpu
from byrote.model.capture import capture
from byrote.model.presets import load_preset
from byrote.model.transformer import Model

PROMPT, NEW = 128, 256
READ_BYTES = 256 << 20


def contenders(model: Model, with_peer: bool, said: dict[str, list[int]]) -> dict[str, Callable[[], None]]:
    """Each leaves what it wrote in `said`."""
    prompt = torch.randint(0, 4096, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(max_tokens=NEW, temperature=0.0)
    steps = {"captured": capture(model), "ordinary": model}

    def ours(name: str) -> Callable[[], None]:
        return lambda: said.update({name: list(generate_ids(model, prompt, params, step=steps[name]))})

    found = {name: ours(name) for name in steps}
    if with_peer:
        peer = to_transformers(model).eval()
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True, "pad_token_id": 0}

        def theirs() -> None:
            with torch.no_grad():
                said["transformers"] = peer.generate(torch.tensor([prompt]), **options)[0, PROMPT:].tolist()

        found["transformers"] = theirs
    return found


def read_rate() -> float:
    """Bytes a second, the best of ten: what all threads together read from memory."""
    numbers = torch.ones(READ_BYTES // 4)
    seconds = take_turns({"read": numbers.sum}, rounds=10)["read"]
    return READ_BYTES / min(seconds)


class Clock:
    """Seconds spent in the captured step's C, counted while it stands in for `cpu.run`."""

    def __init__(self) -> None:
        self.seconds, self._run = 0.0, cpu.run

    def __call__(self, *arguments: object) -> None:
        start = time.perf_counter()
        self._run(*arguments)
        self.seconds += time.perf_counter() - start


def share_in_c(captured: Callable[[], None]) -> dict[str, float]:
    clock, start = Clock(), time.perf_counter()
    cpu.run = clock
    try:
        captured()
    finally:
        cpu.run = clock._run
    return {"c_ms_per_token": 1e3 * clock.seconds / (NEW - 1), "all_ms_per_token": 1e3 * (time.perf_counter() - start) / NEW}


def equal_up_to(said: dict[str, list[int]], name: str) -> int:
    pairs = zip(said["captured"], said[name], strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), NEW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--preset")
    arguments = parser.parse_args()
    model = (Model(load_preset(arguments.preset)) if arguments.preset else bench_model()).eval()
    said: dict[str, list[int]] = {}
    works = contenders(model, not arguments.preset, said)
    seconds = take_turns(works, rounds=arguments.rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    weight_bytes, rate = capture(model).weight_bytes, read_rate()
    report(
        "decode",
        {
            "model": arguments.preset or "bench",
            "tokens_per_second": {name: NEW / value for name, value in medians.items()},
            "ratio_of_captured_to": {name: value / medians["captured"] for name, value in medians.items()},
            "equal_ids_up_to": {name: equal_up_to(said, name) for name in said},
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "weight_bytes_per_token": weight_bytes,
            "read_limit": {"gb_per_second": rate / 1e9, "tokens_per_second": rate / weight_bytes},
            "captured": share_in_c(works["captured"]),
            "sizes": {"prompt": PROMPT, "new": NEW, "batch": 1, "precision": "fp32"},
        },
    )


if __name__ == "__main__":
    main()
