"""`byrote serve` as a process of its own, and what a test wants to know of it."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

openai = pytest.importorskip("openai", reason="pip install openai")
import httpx2  # noqa: E402  comes with openai

START_S = 60
KEY = "0123456789abcdef"


class Served:
    """A running server."""

    def __init__(self, run: Path, *options: str, **environment: str) -> None:
        command = [sys.executable, "-m", "byrote", "serve", str(run), "--port", "0", "--device", "cpu", *options]
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables, start_new_session=True)
        assert self.process.stderr is not None
        self.log: list[str] = []
        while not (found := re.search(r"http://[^\s;]+", "".join(self.log))):
            self.log.append(self.process.stderr.readline())
            assert self.log[-1], "".join(self.log)
        self.url = found.group()
        self._drain = ThreadPoolExecutor(1)
        self._drain.submit(lambda: self.log.extend(self.process.stderr))  # a full pipe would stop the server
        self.http = httpx2.Client(base_url=self.url, timeout=60, headers={"authorization": f"Bearer {KEY}"})
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)
        self.wait_until_healthy()

    def wait_until_healthy(self) -> None:
        ends = time.monotonic() + START_S
        while time.monotonic() < ends:
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx2.TransportError:
                assert self.process.poll() is None, "".join(self.log)
            time.sleep(0.05)
        pytest.fail(f"not healthy after {START_S} s: {''.join(self.log)}")

    def worker(self, other_than: int = 0) -> int:
        """The process id of the engine, when it can serve."""
        children, ends = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children"), time.monotonic() + START_S
        while time.monotonic() < ends:
            for child in map(int, children.read_text().split()):
                if child != other_than and "byrote.serve.worker" in Path(f"/proc/{child}/cmdline").read_text():
                    self.wait_until_healthy()
                    return child
            time.sleep(0.05)
        pytest.fail(f"no engine's process after {START_S} s: {''.join(self.log)}")

    def metric(self, name: str) -> float:
        found = re.search(rf"^{name} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found.group(1))

    def settle(self) -> None:
        """Wait until nothing is under way."""
        ends = time.monotonic() + 20
        quiet = 0
        while quiet < 8:  # the engine tells its numbers twice a second
            assert time.monotonic() < ends, "requests are still under way"
            busy = sum(self.metric(f"byrote_{name}") for name in ("under_way", "running", "waiting"))
            quiet = 0 if busy else quiet + 1
            time.sleep(0.1)

    def close(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)
