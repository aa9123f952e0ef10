"""V4's attention against transformers' DeepseekV4ForCausalLM with the same weights: length, training, decoding, memory.

    python -m bench.bench_v4 [--part lengths|step|train|decode|memory|parity] [--rounds 5]

lengths   forward of a tiny V4 (0.4M parameters) in fp32 at 512 … 4096 tokens, and what doubling the length costs
step      its forward and backward at 1024 tokens
train     AdamW steps of the V4-shaped bench model, 8 × 256 tokens, bf16 autocast; byrote also trains its indexers, transformers does not
decode    greedy, batch 1, fp32, prompt 128, 64 new tokens; the ids must be equal where no two logits tie
memory    peak of one process that reads 32,768 tokens, forward and with backward (byrote alone: the peer needs a [T, T] bias a block)
parity    largest difference of logits at 4096 tokens with every entry read; and with a real choice of 16

One JSON line a part.
"""

import argparse
import itertools
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from bench.measure import report, spread, take_turns
from bench.models import v4_bench_config, v4_tiny_config, v4_twins
from byrote.engine.request import SamplingParams
from byrote.eval.sample import generate_ids
from byrote.model.config import V4AttentionConfig
from byrote.model.transformer import Model

LENGTHS = (512, 1024, 2048, 4096)
BATCH, LENGTH, PROMPT, NEW, LONG = 8, 256, 128, 64, 32_768


def ids(*shape: int, vocabulary: int = 256) -> torch.Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))


def compare(seconds: dict[str, list[float]]) -> dict[str, object]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "ratio_to_peer": medians["transformers"] / medians["byrote"],
        "seconds": {name: spread(values) for name, values in seconds.items()},
    }


@torch.no_grad()
def lengths(rounds: int) -> None:
    ours, theirs = (model.eval() for model in v4_twins(v4_tiny_config()))
    rows, medians = {}, {}
    for length in LENGTHS:
        tokens_BT = ids(1, length)
        works = {"byrote": lambda t=tokens_BT: ours(t), "transformers": lambda t=tokens_BT: theirs(t)}
        seconds = take_turns(works, rounds=min(rounds, 2 if length == 4096 else rounds))
        rows[length], medians[length] = compare(seconds), statistics.median(seconds["byrote"])
    growth = {f"{a}->{b}": medians[b] / medians[a] for a, b in itertools.pairwise(LENGTHS)}
    report("v4", {"part": "lengths", "by_length": rows, "growth": growth, "precision": "fp32"})


def step(rounds: int) -> None:
    ours, theirs = (model.train() for model in v4_twins(v4_tiny_config()))
    tokens_BT = ids(1, 1025)

    def mine() -> None:
        losses = ours(tokens_BT[:, :-1], targets_BT=tokens_BT[:, 1:]).losses
        (losses["next_token"] + losses["indexer"]).backward()

    works = {"byrote": mine, "transformers": lambda: theirs(input_ids=tokens_BT[:, :-1], labels=tokens_BT[:, :-1]).loss.backward()}
    report("v4", {"part": "step", **compare(take_turns(works, rounds=rounds)), "tokens": 1024, "precision": "fp32"})


def train(rounds: int) -> None:
    ours, theirs = (model.train() for model in v4_twins(v4_bench_config()))
    tokens_BT = ids(BATCH, LENGTH + 1, vocabulary=4096)

    def stepping(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

        def one() -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return one

    def mine() -> torch.Tensor:
        out = ours(tokens_BT[:, :-1], targets_BT=tokens_BT[:, 1:])
        ours.update_balance(out.loads)
        return out.losses["next_token"] + out.losses["indexer"]

    works = {
        "byrote": stepping(ours, mine),
        "transformers": stepping(theirs, lambda: theirs(input_ids=tokens_BT[:, :-1], labels=tokens_BT[:, :-1]).loss),
    }
    result = compare(take_turns(works, rounds=rounds, warm_up=2))
    rates = {name: BATCH * LENGTH / row["median"] for name, row in result["seconds"].items()}
    sizes = {"batch": BATCH, "length": LENGTH, "precision": "bf16 autocast", "optimizer": "AdamW"}
    report("v4", {"part": "train", "tokens_per_second": rates, **result, "sizes": sizes})


@torch.no_grad()
def decode(rounds: int) -> None:
    ours, theirs = (model.eval() for model in v4_twins(v4_bench_config()))
    prompt, said = ids(PROMPT, vocabulary=4096).tolist(), {}

    def mine() -> None:
        said["byrote"] = list(generate_ids(ours, prompt, SamplingParams(max_tokens=NEW, temperature=0.0)))

    def peer() -> None:
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        said["transformers"] = theirs.generate(torch.tensor([prompt]), **options)[0, PROMPT:].tolist()

    result = compare(take_turns({"byrote": mine, "transformers": peer}, rounds=rounds))
    same = next((i for i, (a, b) in enumerate(zip(said["byrote"], said["transformers"], strict=True)) if a != b), NEW)
    rates = {name: NEW / row["median"] for name, row in result["seconds"].items()}
    report("v4", {"part": "decode", "tokens_per_second": rates, "equal_ids_up_to": same, **result, "precision": "fp32"})


def memory(_: int) -> None:
    """In processes of their own, so that the peak is theirs alone."""
    peaks = {}
    for work in ("forward", "training"):
        done = subprocess.run([sys.executable, "-m", "bench.bench_v4", "--part", work], check=True, capture_output=True, text=True)
        peaks[work] = int(done.stdout)
    report("v4", {"part": "memory", "tokens": LONG, "peak_bytes": peaks, "precision": "fp32"})


def read_long(work: str) -> None:
    model, tokens_BT = Model(v4_tiny_config()).train(work == "training"), ids(1, LONG)
    if work == "training":
        losses = model(tokens_BT, targets_BT=tokens_BT).losses
        (losses["next_token"] + losses["indexer"]).backward()
    else:
        with torch.no_grad():
            model(tokens_BT)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


@torch.no_grad()
def parity(_: int) -> None:
    tiny, worst = v4_tiny_config(), {}
    assert isinstance(tiny.attention, V4AttentionConfig)
    for name, top_k, length in (("4096 tokens, every entry", 4096, 4096), ("512 tokens, 16 entries chosen", 16, 512)):
        ours, theirs = (model.eval() for model in v4_twins(replace(tiny, attention=replace(tiny.attention, index_top_k=top_k))))
        got, want = ours(ids(1, length)).logits, theirs(ids(1, length)).logits
        worst[name] = ((got - want).abs().max() / want.abs().max()).item()
    report("v4", {"part": "parity", "largest_difference_of_largest_logit": worst, "precision": "fp32"})


PARTS: dict[str, Callable[[int], None]] = {
    "lengths": lengths,
    "step": step,
    "train": train,
    "decode": decode,
    "memory": memory,
    "parity": parity,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "forward", "training"], help="one of them; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.part in ("forward", "training"):
        read_long(args.part)
        return
    for name, part in PARTS.items():
        if args.part in (None, name):
            part(args.rounds)


if __name__ == "__main__":
    main()
