"""Weights of int8 against fp32: speed of decoding, memory after loading, and what a trained run loses.

    python -m bench.bench_int8 [--rounds 5]          greedy decode, batch 1, captured, prompt 64 + 64 tokens, on two random models: the
                                                     V3-shaped bench model and the shape of recipe `small` (without its table), in turn
    python -m bench.bench_int8 --memory              bytes that loading adds, afterwards and at most (pages of the mapped
                                                     checkpoint included), and its seconds; each in a process of its own
    python -m bench.bench_int8 --run RUN             bits per byte of a run's validation texts, and what 64 and 32 columns to a scale
                                                     (fake: rounded weights as fp32) would change

Beside the speeds stands the limit of memory: the weights one token reads over the rate at which a sum over 256 MiB reads.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import byrote
from bench.bench_decode import read_rate
from bench.measure import report, spread, take_turns
from bench.models import bench_config
from byrote.eval.bits import bits_per_byte
from byrote.eval.sample import SamplingParams, generate_ids
from byrote.kernels import int8
from byrote.model.capture import capture
from byrote.model.config import ModelConfig
from byrote.model.presets import load_preset
from byrote.model.quantize import quantize, to_quantize
from byrote.model.transformer import Model

PROMPT, NEW = 64, 64
SHAPES: dict[str, Callable[[], ModelConfig]] = {
    "bench": bench_config,
    "small": lambda: replace(load_preset("small"), engram=None, mtp=None),
}
LOAD = """
import json, sys, time, torch, byrote
import byrote.checkpoint.local
def resident(what):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1])
before, start = resident("VmRSS"), time.perf_counter()
model, _ = byrote.load(sys.argv[1], weights=sys.argv[2])
seconds = time.perf_counter() - start
print(json.dumps({"resident": resident("VmRSS") - before, "peak": resident("VmHWM") - before, "seconds": seconds}))
"""


def decode(name: str, rounds: int) -> None:
    models = {"fp32": Model(SHAPES[name]()).eval()}
    models["int8"] = copy.deepcopy(models["fp32"])
    quantize(models["int8"])
    steps, said = {weights: capture(model) for weights, model in models.items()}, dict[str, list[int]]()
    prompt = torch.randint(0, 4096, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(max_tokens=NEW, temperature=0.0)

    def work(weights: str, tokens: int) -> Callable[[], None]:
        one = replace(params, max_tokens=tokens)
        return lambda: said.update({weights: list(generate_ids(models[weights], prompt, one, step=steps[weights]))})

    contenders = {f"{weights} {kind}": work(weights, tokens) for weights in models for kind, tokens in (("first", 1), ("all", NEW))}
    seconds, rate = take_turns(contenders, rounds=rounds), read_rate()
    median = {key: statistics.median(values) for key, values in seconds.items()}
    speeds = {weights: (NEW - 1) / (median[f"{weights} all"] - median[f"{weights} first"]) for weights in models}
    report(
        "int8",
        {
            "model": name,
            "decode_over_fp32": speeds["int8"] / speeds["fp32"],
            "tokens_per_second": speeds,
            "first_token_over_fp32": median["int8 first"] / median["fp32 first"],
            "weight_bytes_per_token": {weights: step.weight_bytes for weights, step in steps.items()},
            "read_limit": {weights: rate / step.weight_bytes for weights, step in steps.items()},
            "seconds": {key: spread(values) for key, values in seconds.items()},
            "sizes": {"prompt": PROMPT, "new": NEW, "batch": 1},
        },
    )


def memory(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        byrote.save(Model(SHAPES[name]()), f"{folder}/model")
        added = {}
        for weights in ("saved", "int8"):
            command = [sys.executable, "-c", LOAD, f"{folder}/model", weights]
            added[weights] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    report("int8_memory", {"model": name, "bytes": added, "share": added["int8"]["resident"] / added["saved"]["resident"]})


def rounded(weight: Tensor, columns: int | None) -> Tensor:
    """The weight as int8 with one scale to so many columns (None: to a row) would have it."""
    width = weight.shape[-1]
    columns = width if columns is None else columns
    parts = functional.pad(weight, (0, -width % columns)).unflatten(-1, (-1, columns))
    return int8.dequantize(int8.quantize(parts)).flatten(-2)[..., :width]


def loss(run: str) -> None:
    model, tokenizer = byrote.load(run)
    texts = [(row["name"], row["text"]) for row in map(json.loads, Path(run, "data/validation.jsonl").read_text().splitlines())]
    weights = {name: module.weight.detach().clone() for name, module in to_quantize(model)}
    found: dict[str, float] = {}

    def score(label: str) -> None:
        found[label] = bits_per_byte(model, tokenizer, texts, context=512, stride=256).bits_per_byte

    score("fp32")
    for label, columns in {"a row": None, "64 columns": 64, "32 columns": 32}.items():
        for name, weight in weights.items():
            model.get_submodule(name).weight.data.copy_(rounded(weight, columns))
        score(label)
    for name, weight in weights.items():
        model.get_submodule(name).weight.data.copy_(weight)
    quantize(model)
    score("int8")
    sizes = {"bytes": sum(len(text.encode()) for _, text in texts), "files": len(texts), "context": 512, "stride": 256}
    report("int8_loss", {"run": Path(run).name, "bits_per_byte": found, "lost": found["int8"] - found["fp32"], "sizes": sizes})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="measure resident memory")
    parser.add_argument("--run", help="measure the loss of this run")
    arguments = parser.parse_args()
    if arguments.run:
        loss(arguments.run)
    for name in () if arguments.run else SHAPES:
        if arguments.memory:
            memory(name)
        else:
            decode(name, arguments.rounds)


if __name__ == "__main__":
    main()
