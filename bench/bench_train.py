"""Training step of the V3-shaped bench model against transformers' DeepseekV3ForCausalLM: bf16 autocast, AdamW in both.

    python -m bench.bench_train [--rounds 15]

The peer runs with each of its expert back ends; the fastest counts. The share of peak uses the FLOPs of the architecture
(`byrote.model.count.training_flops`) over the median 2048³ bf16 product measured between the steps.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from bench.measure import peak, report, spread, take_turns
from bench.models import bench_config, bench_model, transformers_twin
from byrote.model.count import training_flops

BATCH, LENGTH = 8, 256


def byrote_step() -> Callable[[], float]:
    model = bench_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(0, 4096, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(tokens[:, :-1], targets_BT=tokens[:, 1:])
        out.losses["next_token"].backward()
        model.update_balance(out.loads)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return out.losses["next_token"].item()

    return step


def peer_step(experts: str) -> Callable[[], float]:
    model = transformers_twin(experts).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(0, 4096, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    peaks: list[float] = []
    measure_peak = peak(torch.bfloat16)
    peers = {f"transformers {experts}": peer_step(experts) for experts in ("grouped_mm", "batched_mm", "eager")}
    tried = {name: min(values) for name, values in take_turns(peers, rounds=2).items()}
    peer = min(tried, key=tried.__getitem__)
    contenders: dict[str, Callable[[], object]] = {
        "byrote": byrote_step(),
        peer: peers[peer],
        "peak": lambda: peaks.append(measure_peak()),
    }
    seconds = take_turns(contenders, rounds=rounds, warm_up=2)
    medians = {name: statistics.median(values) for name, values in seconds.items() if name != "peak"}
    tokens, top = BATCH * LENGTH, statistics.median(peaks)
    flops = training_flops(bench_config(), LENGTH)
    report(
        "train",
        {
            "tokens_per_second": {name: tokens / value for name, value in medians.items()},
            "peer": peer,
            "peers_tried_step_seconds": tried,
            "ratio_to_peer": medians[peer] / medians["byrote"],
            "matmul_peak_gflops": top / 1e9,
            "share_of_peak": {name: tokens * flops / value / top for name, value in medians.items()},
            "flops_per_token": flops,
            "step_seconds": {name: spread(values) for name, values in seconds.items() if name != "peak"},
            "sizes": {"batch": BATCH, "length": LENGTH, "precision": "bf16 autocast", "optimizer": "AdamW"},
        },
    )


if __name__ == "__main__":
    main()
