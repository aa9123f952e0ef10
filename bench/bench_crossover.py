"""From which context on is sparse attention faster? Prefill and decode of one block per kind of attention, 1K … 64K tokens.

    python -m bench.bench_crossover [--longest 65536] [--precision fp32] [--clock wall]

One-block models that differ in attention alone read the same text, in chunks of 512 tokens as `generate` does; they take turns, one
stretch of context each. `prefill_s` is the time to read all of a context from the start, `decode_ms` that of one more token
behind it (median, rolled back each time). A kind is faster from the shortest measured context at which it beats MLA, there and at
every longer one. `--clock cpu` counts the processor's time, all threads together, for a machine that is busy with other things. The
share of the indexer in V3.2's work per pair of tokens is 64·128 / 128·(192 + 128) = 0.2; here it is 0.25.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.measure import report
from byrote.model.config import AttentionConfig, DSAConfig, MLAConfig, ModelConfig, ResidualConfig, V4AttentionConfig
from byrote.model.transformer import Model

CHUNK, FIRST, VOCABULARY, TOKENS = 512, 1024, 256, 9
MLA = MLAConfig(num_heads=8, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=64)


def v4(ratio: int) -> V4AttentionConfig:
    return V4AttentionConfig(
        num_heads=8, head_dim=64, rope_head_dim=16, q_lora_rank=128, o_groups=2, o_lora_rank=64, sliding_window=128,
        compress_ratios=(ratio,), index_num_heads=8, index_head_dim=32, index_top_k=64,
    )  # fmt: skip


KINDS: dict[str, AttentionConfig] = {
    "mla": MLA,
    "dsa": DSAConfig(mla=MLA, index_num_heads=8, index_head_dim=32, index_top_k=256),
    "v4 csa": v4(4),
    "v4 hca": v4(128),
}


def model_of(attention: AttentionConfig) -> Model:
    config = ModelConfig(
        vocab_size=VOCABULARY,
        dim=256,
        num_layers=1,
        attention=attention,
        ffn_hidden=256,
        residual=ResidualConfig(kind="plain"),
        max_positions=1 << 17,
    )
    return Model(config).eval()


class Reader:
    """One model with the text it has read so far."""

    def __init__(self, attention: AttentionConfig, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.model = model_of(attention)
        self.state = self.model.new_state()
        self.prefill_s = 0.0

    def read(self, tokens_BT: Tensor) -> None:
        self.prefill_s += timed(lambda: [self.model(part, state=self.state) for part in tokens_BT.split(CHUNK, dim=1)], self.clock)

    def decode_ms(self, token_B1: Tensor) -> float:
        def step() -> None:
            self.model(token_B1, state=self.state)

        times = []
        for _ in range(TOKENS):
            times.append(timed(step, self.clock))
            self.state.rollback(1)
        return 1e3 * statistics.median(times)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(work: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


def measure(longest: int, clock: Callable[[], float]) -> dict[str, dict[str, list[float]]]:
    """Kind → seconds of prefill and milliseconds of decode at every context."""
    generator = torch.Generator().manual_seed(0)
    readers = {name: Reader(kind, clock) for name, kind in KINDS.items()}
    for kind in KINDS.values():  # once for nothing: kernels are compiled and opened at first use
        Reader(kind, clock).read(torch.zeros(1, 2 * CHUNK, dtype=torch.int64))
    found: dict[str, dict[str, list[float]]] = {name: {"prefill_s": [], "decode_ms": []} for name in KINDS}
    held = 0
    for context in contexts(longest):
        tokens_BT = torch.randint(VOCABULARY, (1, context - held), generator=generator)
        for name, reader in readers.items():
            reader.read(tokens_BT)
            found[name]["prefill_s"].append(reader.prefill_s)
            found[name]["decode_ms"].append(reader.decode_ms(tokens_BT[:, :1]))
        held = context
        print(f"{context:>7}", *(f"{name} {one['prefill_s'][-1]:8.2f} s {one['decode_ms'][-1]:7.2f} ms" for name, one in found.items()))
    return found


def contexts(longest: int) -> list[int]:
    return [FIRST << power for power in range((longest // FIRST).bit_length())]


def faster_from(kind: list[float], dense: list[float], lengths: list[int]) -> int | None:
    """The shortest context from which on `kind` takes less time than `dense`; None: at none that was measured."""
    ahead = None
    for context, one, other in zip(lengths, kind, dense, strict=True):
        ahead = (ahead or context) if one < other else None
    return ahead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=65536)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.precision == "bf16"):
        found = measure(args.longest, CLOCKS[args.clock])
    lengths = contexts(args.longest)
    crossover = {
        name: {what: faster_from(found[name][what], found["mla"][what], lengths) for what in ("prefill_s", "decode_ms")}
        for name in KINDS
        if name != "mla"
    }
    for name, ahead in crossover.items():
        print(f"{name}: " + ", ".join(f"{what} is below MLA's {f'from {at} on' if at else 'nowhere'}" for what, at in ahead.items()))
    sizes = {
        "blocks": 1,
        "dim": 256,
        "batch": 1,
        "chunk": CHUNK,
        "precision": args.precision,
        "clock": args.clock,
        "rounds": 1,
        "decode_steps": TOKENS,
    }
    report("crossover", {"contexts": lengths, "kinds": found, "faster_from": crossover, "sizes": sizes})


if __name__ == "__main__":
    main()
