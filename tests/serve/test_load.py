"""64 clients that stream without a pause, half of them leaving in the middle: nothing fails, nothing leaks, memory stays flat."""

import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="pip install openai")
import httpx2

from tests.serve.served import KEY, Served

CLIENTS = 64
LEAK_BYTES = 4096  # a request
NOISE_BYTES = 16 << 20  # what allocators and growing buffers may take beside


class Load:
    """Clients of one server until `ends`; what they saw."""

    def __init__(self, served: Served, name: str, seconds: float) -> None:
        self.url, self.name, self.ends = served.url, name, time.monotonic() + seconds
        self.gaps: list[float] = []
        self.finished, self.left = 0, 0

    async def run(self) -> None:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=self.url, timeout=120, limits=limits, headers={"authorization": f"Bearer {KEY}"}) as http:
            await asyncio.gather(*(self._client(http, random.Random(number)) for number in range(CLIENTS)))

    async def _client(self, http: httpx2.AsyncClient, rng: random.Random) -> None:
        while time.monotonic() < self.ends:
            tokens = rng.randrange(8, 64)
            leaves_after = rng.randrange(1, tokens) if rng.random() < 0.5 else None
            prompt = "so it goes and so it goes " * rng.choice((1, 2, 25)) + str(rng.randrange(1000))
            asked = {"model": self.name, "prompt": prompt, "max_tokens": tokens, "ignore_end": True, "stream": True}
            async with http.stream("POST", "/v1/completions", json=asked) as answer:
                assert answer.status_code == 200, await answer.aread()
                await self._listen(answer, leaves_after)

    async def _listen(self, answer: httpx2.Response, leaves_after: int | None) -> None:
        """Every event but the first is timed from the one before."""
        last, events, text = None, 0, ""
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                text = line or text
                continue
            assert "choices" in json.loads(line.removeprefix("data: ")), line
            now = time.perf_counter()
            self.gaps += [] if last is None else [now - last]
            last, events = now, events + 1
            if events == leaves_after:
                self.left += 1
                return
        assert text == "data: [DONE]"
        self.finished += 1


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1])


async def watch(served: Served, load: Load) -> list[tuple[int, int]]:
    """(requests served, bytes of server and engine), twice a second."""
    seen, processes = [], (served.process.pid, served.worker())
    running = asyncio.create_task(load.run())
    while not running.done():
        await asyncio.sleep(0.5)
        seen.append((load.finished + load.left, sum(map(resident, processes))))
    await running
    return seen


def grown(seen: list[tuple[int, int]]) -> tuple[int, float]:
    """(requests, bytes) between the middle and the end of the run: medians of its third and fifth fifth. Before, caches fill."""
    fifth = max(len(seen) // 5, 1)
    middle, end = (list(zip(*part)) for part in (seen[2 * fifth : 3 * fifth], seen[-fifth:]))
    return round(statistics.median(end[0]) - statistics.median(middle[0])), statistics.median(end[1]) - statistics.median(middle[1])


def hold(run: Path, seconds: float, capsys: pytest.CaptureFixture) -> None:
    """A cache that is full within moments: pages are given up, and choices wait again, all the time."""
    served = Served(run, "--name", "loaded", "--cache-tokens", "4096", BYROTE_API_KEY=KEY)
    load = Load(served, "loaded", seconds)
    try:
        seen = asyncio.run(watch(served, load))
        served.settle()
    finally:
        print("".join(line for line in served.log if " POST " not in line))
    requests, grew = grown(seen)
    quantiles = statistics.quantiles(load.gaps, n=100)
    with capsys.disabled():
        print(
            f"\n{CLIENTS} clients, {seconds:.0f} s: {load.finished} answers, {load.left} left early, {len(load.gaps)} gaps between tokens: "
            f"p50 {1e3 * quantiles[49]:.1f} ms, p99 {1e3 * quantiles[98]:.1f} ms; memory {seen[-1][1] / 2**20:.0f} MiB, "
            f"{grew / 2**20:+.1f} MiB over the last {requests} requests"
        )
    assert min(load.finished, load.left) > CLIENTS // 4, "too few requests to say anything"
    assert served.metric("byrote_errors_total") == served.metric("byrote_engine_deaths_total") == 0
    assert served.metric("byrote_pages_used") == served.metric("byrote_pages_kept")  # and `Engine.check_integrity` ran when all had ended
    assert grew < NOISE_BYTES + LEAK_BYTES * requests
    assert served.close() == 0, "".join(served.log)


def test_64_clients_for_20_seconds(run: Path, capsys: pytest.CaptureFixture) -> None:
    hold(run, 20, capsys)


@pytest.mark.torture
def test_64_clients_for_5_minutes_against_a_quickstart_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """BYROTE_TORTURE_RUN names a run to take instead of training one."""
    run = os.environ.get("BYROTE_TORTURE_RUN")
    if run is None:
        run = tmp_path / "quickstart"
        subprocess.run([sys.executable, "-m", "byrote", "quickstart", "--seconds", "20", "--out", str(run)], check=True)
    hold(Path(run), 300, capsys)
