"""The web server's end of the engine's process: requests go in, each gets its own stream of events back, deaths are made good.

    add ──▶ worker.py ──▶ event lines ──▶ one asyncio.Queue per request ──▶ `Stream`

When the process dies, every request under way ends with an error within a moment, and a new process is started; after
`config.restarts` deaths in ten minutes the link gives up, and the server ends with a status other than zero.
"""

import asyncio
import json
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from byrote.config import to_dict
from byrote.engine.request import SamplingParams
from byrote.errors import ByroteError, CapacityError, PromptTooLong, RequestError
from byrote.serve.config import ServeConfig

_FORGIVEN_S = 600.0  # a death this long ago counts no more
_END_S = 5.0  # what an engine that is told to end may take before it is killed
_LINE_BYTES = 1 << 26  # longest line that is read from the engine
_KINDS = {
    "RequestError": RequestError,
    "PromptTooLong": PromptTooLong,
    "CapacityError": CapacityError,
    "ConfigError": RequestError,  # what this server's packages cannot do is a field that it does not support
}


class EngineGone(ByroteError):
    """The engine's process ended, or is not there yet. The request may be sent again."""


class Stream:
    """Events of one request, in order; the last of each choice has a `finish`. `parts`: its names in the engine, one a prompt."""

    def __init__(self, request: str, prompts: int, choices: int) -> None:
        self.request, self.parts = request, [f"{request}-{number}" for number in range(prompts)]
        self.queue: asyncio.Queue[dict[str, Any] | ByroteError] = asyncio.Queue()
        self._open = prompts * choices

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Raises what the engine refused the request with, or what ended it."""
        while self._open:
            event = await self.queue.get()
            if isinstance(event, ByroteError):
                raise event
            if event["error"] is not None:
                raise _as_error(event["error"])
            self._open -= event["finish"] is not None
            yield event

    @property
    def is_open(self) -> bool:
        return self._open > 0


class EngineLink:
    def __init__(self, config: ServeConfig, given_up: Callable[[], None]) -> None:
        """`given_up` is called once, when the engine died too often."""
        self.config, self._given_up = config, given_up
        self.stats: dict[str, Any] = {}
        self.memories: list[dict[str, Any]] = []
        self.max_length = 0
        self.deaths: deque[float] = deque()
        self.ready = asyncio.Event()
        self._streams: dict[str, tuple[Stream, int]] = {}  # and the number of the part's first choice
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._closing = False

    # ── life ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Start the engine and wait until it can serve. ByroteError with its own words where it cannot."""
        await self._launch()
        self._watch = asyncio.create_task(self._keep_alive())

    async def _launch(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "byrote.serve.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
            start_new_session=True,  # Ctrl-C is for the server, which lets requests finish
        )
        self._send(to_dict(self.config))
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        first = json.loads(line) if line else {}
        if "ready" not in first:
            status = await self._process.wait()
            raise (
                _as_error(first["failed"])
                if "failed" in first
                else EngineGone(f"the engine's process ended with status {status} while it loaded")
            )
        self.memories, self.max_length = first["ready"]["memories"], first["ready"]["max_length"]
        self.ready.set()

    async def _keep_alive(self) -> None:
        while True:
            await self._read()
            if self._closing:
                return None
            self._mourn()
            if len(self.deaths) > self.config.restarts:
                return self._given_up()
            try:
                await self._launch()
            except ByroteError as error:
                print(f"byrote: {error}", file=sys.stderr)
                return self._given_up()

    async def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        while line := await self._process.stdout.readline():
            if line.endswith(b"\n"):  # a killed process may leave half a line
                self._hear(json.loads(line))
        await self._process.wait()

    def _mourn(self) -> None:
        self.ready.clear()
        now = time.monotonic()
        self.deaths.append(now)
        while now - self.deaths[0] > _FORGIVEN_S:
            self.deaths.popleft()
        assert self._process is not None
        gone = EngineGone(
            f"the engine's process ended (status {self._process.returncode}); it is being started again, send the request again"
        )
        print(f"byrote: {gone}", file=sys.stderr)
        for stream in {stream for stream, _ in self._streams.values()}:
            stream.queue.put_nowait(gone)
        for waiting in self._calls.values():
            waiting.set_exception(gone)
        self._streams.clear()
        self._calls.clear()

    async def close(self) -> None:
        """End the engine; what is under way ends with it."""
        self._closing = True
        if self._process is None or self._process.returncode is not None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _END_S)
        except TimeoutError:
            self._process.kill()
        if self._watch is not None:
            await self._watch

    # ── requests ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def under_way(self) -> int:
        """Prompts."""
        return len(self._streams)

    def add(self, request: str, prompts: list[list[int]], params: SamplingParams, pack: str | None) -> Stream:
        """The stream of a new request; choice j of prompt i has the index n·i + j. EngineGone while there is no engine."""
        self._check_alive()
        stream, fields = Stream(request, len(prompts), params.n), to_dict(params)
        for number, (part, ids) in enumerate(zip(stream.parts, prompts, strict=True)):
            self._streams[part] = stream, params.n * number
            self._send({"do": "add", "id": part, "ids": ids, "params": fields, "pack": pack})
        return stream

    def drop(self, stream: Stream) -> None:
        """Nobody listens to this request any more: free what it holds."""
        for part in stream.parts:
            if self._streams.pop(part, None) is not None and stream.is_open and self.ready.is_set():
                self._send({"do": "abort", "id": part})

    async def change_memory(self, name: str, *, attach: bool) -> list[dict[str, Any]]:
        """Attach or detach a pack by its name; all of them as they are then. RequestError for a name that is not known."""
        self._check_alive()
        call = max(self._calls, default=0) + 1
        answer = self._calls[call] = asyncio.get_running_loop().create_future()
        self._send({"do": "attach" if attach else "detach", "call": call, "name": name})
        result = await answer
        if result["error"] is not None:
            raise _as_error(result["error"])
        self.memories = result["memories"]
        return self.memories

    def _check_alive(self) -> None:
        if not self.ready.is_set():
            raise EngineGone("the engine is being started; try again in a few seconds")

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")

    def _hear(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self._deliver(message["event"]["request"], message["event"])
        elif "refused" in message:
            self._deliver(message["refused"], _as_error(message["error"]))
        elif "answer" in message:
            self._calls.pop(message["answer"]).set_result(message)
        elif "stats" in message:
            self.stats = message["stats"]

    def _deliver(self, request: str, event: dict[str, Any] | ByroteError) -> None:
        if request not in self._streams:  # its client has gone, and these are the last tokens made before the engine heard of it
            return
        stream, first = self._streams[request]
        if not isinstance(event, ByroteError):
            event["index"] += first
        stream.queue.put_nowait(event)


def _as_error(fields: dict[str, str]) -> ByroteError:
    return _KINDS.get(fields["kind"], ByroteError)(fields["message"])
