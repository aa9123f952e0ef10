"""What mHC (n = 4) costs over the plain residual in a training step of the bench model, at dim 256 and 1024.

    python -m bench.bench_mhc [--rounds 9]

Beside it the memory-traffic floor of the paper's Table 2: what the extra reads and writes of the streams would cost at the
machine's measured copy bandwidth, forward, if nothing were fused; backward taken as twice the forward.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from bench.measure import report, spread, take_turns
from bench.models import bench_model

BATCH, LENGTH, STREAMS = 8, 256, 4


def training_step(dim: int, residual: str) -> Callable[[], None]:
    model = bench_model(dim, residual=residual).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(0, 4096, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(tokens[:, :-1], targets_BT=tokens[:, 1:])
        out.losses["next_token"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def copy_bandwidth(elements: int, repeats: int = 20) -> float:
    """Bytes read and written per second by a bf16 copy of this size."""
    source = torch.zeros(elements, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 4 * elements / statistics.median(times)


def traffic_floor_s(dim: int) -> float:
    """Seconds a step for the traffic mHC adds to the plain residual (papers: 21C+24 read, 13C+24 written against 2C and C)."""
    tokens, sites = BATCH * LENGTH, 12
    extra = (21 * dim + 24 - 2 * dim) + (13 * dim + 24 - dim)
    return 3 * sites * tokens * extra * 2 / copy_bandwidth(tokens * STREAMS * dim)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    for dim in (256, 1024):
        seconds = take_turns({kind: training_step(dim, kind) for kind in ("plain", "mhc")}, rounds=rounds, warm_up=2)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        floor = traffic_floor_s(dim)
        report(
            "mhc",
            {
                "dim": dim,
                "ratio_to_plain": medians["mhc"] / medians["plain"],
                "floor_ratio": 1 + floor / medians["plain"],
                "step_seconds": {name: spread(values) for name, values in seconds.items()},
                "sizes": {"batch": BATCH, "length": LENGTH, "streams": STREAMS, "precision": "bf16 autocast"},
            },
        )


if __name__ == "__main__":
    main()
