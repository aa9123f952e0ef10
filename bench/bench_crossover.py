"""From which context on is sparse attention faster? Prefill and decode of one block per kind of attention, 1K … 64K tokens.

    python -m bench.bench_crossover [--longest 65536] [--precision fp32] [--partial crossover.json]

One-block models that differ in attention alone read the same text, in chunks of 512 tokens as `generate` does; they take turns, one
stretch of context each, short stretches several times (median). `prefill` is the time to read all of a context from the start, `decode`
that of one more token behind it by a captured step (median of 15, rolled back afterwards). Both by the wall clock and by the
processor's, which counts all threads together and suits a machine that is busy with other things. A kind is faster from the shortest
measured context at which it beats MLA, there and at every longer one. With `--partial` every finished context is kept in that file, and a
run that was cut short reads what it has measured again without repeating it. The share of the indexer in V3.2's work per pair of
tokens is 64·128 / 128·(192 + 128) = 0.2; here it is 0.25.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import report
from byrote.model.capture import capture_or_model
from byrote.model.config import AttentionConfig, DSAConfig, MLAConfig, ModelConfig, ResidualConfig, V4AttentionConfig
from byrote.model.state import Snapshot
from byrote.model.transformer import Model

CHUNK, FIRST, VOCABULARY, TOKENS = 512, 1024, 256, 15
REPEATED = 8192  # tokens of a stretch, all its repeats together; the longest are read once
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Found = dict[str, dict[str, list[float]]]  # kind → prefill and decode by each clock → a figure a context
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

    def __init__(self, attention: AttentionConfig) -> None:
        self.model = model_of(attention)
        self.step = capture_or_model(self.model)[0]
        self.state = self.model.new_state()
        self.prefill = dict.fromkeys(CLOCKS, 0.0)

    def read(self, tokens_BT: Tensor) -> dict[str, float]:
        return timed(lambda: [self.model(part, state=self.state) for part in tokens_BT.split(CHUNK, dim=1)])

    def read_again(self, tokens_BT: Tensor, before: Snapshot) -> dict[str, float]:
        self.state.restore(before)
        return self.read(tokens_BT)

    def decode(self, token_B1: Tensor) -> dict[str, float]:
        return timed(lambda: self.step(token_B1, state=self.state))


def timed(work: Callable[[], Any]) -> dict[str, float]:
    starts = {name: clock() for name, clock in CLOCKS.items()}
    work()
    return {name: clock() - starts[name] for name, clock in CLOCKS.items()}


def read_stretch(readers: dict[str, Reader], tokens_BT: Tensor) -> None:
    """All readers in turn, as often as the stretch is short; a reader's `prefill` grows by the median."""
    befores = {name: reader.state.snapshot() for name, reader in readers.items()}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in readers}
    for _ in range(max(1, REPEATED // tokens_BT.shape[1])):
        for name, reader in readers.items():
            seconds[name].append(reader.read_again(tokens_BT, befores[name]))
    for name, reader in readers.items():
        for clock in CLOCKS:
            reader.prefill[clock] += statistics.median(one[clock] for one in seconds[name])


def decode_in_turn(readers: dict[str, Reader], token_B1: Tensor) -> dict[str, dict[str, float]]:
    """Median seconds a token, all readers in turn, the first token for nothing; then all of it is rolled back."""
    times = [{name: reader.decode(token_B1) for name, reader in readers.items()} for _ in range(TOKENS + 1)][1:]
    for reader in readers.values():
        reader.state.rollback(TOKENS + 1)
    return {name: {clock: statistics.median(one[name][clock] for one in times) for clock in CLOCKS} for name in readers}


def measure(longest: int, partial: Path | None) -> Found:
    """Seconds of prefill and milliseconds of decode at every context."""
    generator = torch.Generator().manual_seed(0)
    readers = {name: Reader(kind) for name, kind in KINDS.items()}
    for kind in KINDS.values():  # once for nothing: kernels are compiled and opened at first use
        Reader(kind).read(torch.zeros(1, 2 * CHUNK, dtype=torch.int64))
    found, held = earlier(partial), 0
    for number, context in enumerate(contexts(longest)):
        tokens_BT = torch.randint(VOCABULARY, (1, context - held), generator=generator)
        held = context
        if number < len(found["mla"]["decode_ms_cpu"]):
            for name, reader in readers.items():
                reader.read(tokens_BT)
                reader.prefill = {clock: found[name][f"prefill_s_{clock}"][number] for clock in CLOCKS}
            continue
        read_stretch(readers, tokens_BT)
        decode = decode_in_turn(readers, tokens_BT[:, :1])
        for name, reader in readers.items():
            for clock in CLOCKS:
                found[name][f"prefill_s_{clock}"].append(reader.prefill[clock])
                found[name][f"decode_ms_{clock}"].append(1e3 * decode[name][clock])
        line = (f"{name} {one['prefill_s_cpu'][-1]:8.2f} s {one['decode_ms_cpu'][-1]:7.2f} ms" for name, one in found.items())
        print(f"{context:>7}", *line, flush=True)
        keep(partial, found)
    return found


def earlier(partial: Path | None) -> Found:
    if partial is not None and partial.exists():
        found: Found = json.loads(partial.read_text())
        return found
    return {name: {f"{what}_{clock}": [] for what in ("prefill_s", "decode_ms") for clock in CLOCKS} for name in KINDS}


def keep(partial: Path | None, found: Found) -> None:
    if partial is not None:
        beside = partial.with_suffix(".new")
        beside.write_text(json.dumps(found))
        os.replace(beside, partial)


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
    parser.add_argument("--partial", type=Path, help="keeps finished contexts, for a run that is cut short")
    args = parser.parse_args()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.precision == "bf16"):
        found = measure(args.longest, args.partial)
    lengths = contexts(args.longest)
    crossover = {
        name: {what: faster_from(figures, found["mla"][what], lengths) for what, figures in one.items()}
        for name, one in found.items()
        if name != "mla"
    }
    for name, ahead in crossover.items():
        print(f"{name}: " + ", ".join(f"{what} is below MLA's {f'from {at} on' if at else 'nowhere'}" for what, at in ahead.items()))
    sizes = {"blocks": 1, "dim": 256, "batch": 1, "chunk": CHUNK, "precision": args.precision, "decode_steps": TOKENS, "repeated": REPEATED}
    report("crossover", {"contexts": lengths, "kinds": found, "faster_from": crossover, "decode": "captured", "sizes": sizes})


if __name__ == "__main__":
    main()
