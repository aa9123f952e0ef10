"""`kill -9` for tests: a program that imports torch once, forks a writer for every line it is sent, and says what ended it.

    test ── [folder, …] ──► program ── fork ──► writer(folder, …)
         ◄── process id, signal ──

A test file is its own program: `serve` under `if __name__ == "__main__"`, `program_of(__file__)` in a fixture.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def kill_at_call(last: int, names: Sequence[str]) -> None:
    """This process kills itself in place of its `last`-th call of one of these functions of `os`."""
    count = itertools.count(1)

    def deadly(call: Callable) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if next(count) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    for name in names:
        setattr(os, name, deadly(getattr(os, name)))


def serve(writer: Callable[..., None]) -> None:
    """For every line [folder, …]: fork, print the writer's process id, then the signal it ended by, or 0."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            folder, *arguments = json.loads(line)
            writer(Path(folder), *arguments)
            os._exit(0)
        print(pid, flush=True)
        print(os.WTERMSIG(os.waitpid(pid, 0)[1]), flush=True)


class Program:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def start(self, folder: Path, *arguments: int) -> int:
        """The id of a new writer's process."""
        print(json.dumps([str(folder), *arguments]), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def signal(self) -> int:
        """What ended it."""
        return int(self.process.stdout.readline())


@contextmanager
def program_of(file: str) -> Iterator[Program]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield Program(process)
        process.stdin.close()
