"""How byrote measures: contenders in turn (A B A B …), medians, and the machine's own limit taken in the same run.

A machine that others share drifts; taking turns lets the drift fall on all contenders alike. Every row carries what a reader
needs to judge it: hardware, versions, threads, sizes, number of rounds, spread.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from byrote.device import keep_freed_memory, machine_facts, matmul_peak

RESULTS = Path(__file__).parent / "results"


def take_turns(contenders: Mapping[str, Callable[[], Any]], *, rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, contenders interleaved; the allocator set as `byrote train` sets it, for all of them."""
    keep_freed_memory()
    for _ in range(warm_up):
        for work in contenders.values():
            work()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak(dtype: torch.dtype) -> Callable[[], float]:
    """A contender that measures the matmul peak: 2048³, FLOP/s."""
    return lambda: matmul_peak(torch.device("cpu"), dtype, repeats=3)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def report(name: str, result: dict[str, Any]) -> None:
    """Print one JSON line and append it to bench/results/NAME.jsonl."""
    facts = {key: value for key, value in machine_facts().items() if key not in ("disk_free_bytes", "ram_free_bytes")}
    row = {"bench": name, "date": time.strftime("%Y-%m-%d"), **result, "machine": facts, "python": platform.python_version()}
    row |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    line = json.dumps(row, default=str)
    print(line)
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
