"""Greedy decode, batch 1, fp32, prompt 128, 256 new tokens, against transformers' `generate`, on the V3-shaped bench model.

    python -m bench.bench_decode [--rounds 5]

Both run the same weights (exchanged in memory); the ids must be equal where no two logits tie.
"""

import argparse
import statistics

import torch

from bench.measure import report, spread, take_turns
from bench.models import bench_model
from byrote.checkpoint.huggingface import to_transformers
from byrote.eval.sample import SamplingParams, generate_ids

PROMPT, NEW = 128, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    model = bench_model().eval()
    peer = to_transformers(model).eval()
    prompt = torch.randint(0, 4096, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(max_tokens=NEW, temperature=0.0)
    said: dict[str, list[int]] = {}

    def ours() -> None:
        said["byrote"] = list(generate_ids(model, prompt, params))

    def theirs() -> None:
        with torch.no_grad():
            ids = peer.generate(
                torch.tensor([prompt]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=True, pad_token_id=0
            )
        said["transformers"] = ids[0, PROMPT:].tolist()

    seconds = take_turns({"byrote": ours, "transformers": theirs}, rounds=rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    same = next((i for i, (a, b) in enumerate(zip(said["byrote"], said["transformers"], strict=True)) if a != b), NEW)
    report(
        "decode",
        {
            "tokens_per_second": {name: NEW / value for name, value in medians.items()},
            "ratio_to_peer": medians["transformers"] / medians["byrote"],
            "equal_ids_up_to": same,
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "sizes": {"prompt": PROMPT, "new": NEW, "batch": 1, "precision": "fp32"},
        },
    )


if __name__ == "__main__":
    main()
