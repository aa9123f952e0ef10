"""The engine in a process of its own: commands come in on stdin, answers go out on stdout, one JSON object a line.

    in   {"do": "add", "id": "r1", "ids": [1, 5], "params": {…}, "pack": null}     {"do": "abort", "id": "r1"}
         {"do": "attach", "call": 7, "name": "law"}    {"do": "detach", "call": 8, "name": "law"}
    out  {"ready": {…}}        {"refused": "r1", "error": {…}}        {"event": {…}}        {"answer": 7, "error": null, "memories": […]}
         {"stats": {…}}

Why a process: the web server stays awake while a forward pass holds the interpreter, and when the engine dies — out of memory, killed —
its clients hear of it at once and another one is started (`link.py`). When stdin ends, the server is gone, and so does this process.
"""

import json
import os
import queue
import sys
import threading
import time
from typing import Any, TextIO

from byrote.config import from_dict
from byrote.engine.engine import Engine, Stats
from byrote.engine.request import Event, SamplingParams
from byrote.errors import ByroteError, RequestError
from byrote.serve.config import ServeConfig

_STATS_S = 0.5  # seconds between two reports while there is work
_IDLE_S = 0.2  # how long an idle engine waits for a command before it looks again


class Worker:
    def __init__(self, config: ServeConfig, engine: Engine, out: TextIO) -> None:
        self.config, self.engine, self._out = config, engine, out
        self._folders = dict(config.memories)
        self._commands: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._told = 0.0
        self._last: Stats | None = None

    def run(self, source: TextIO) -> None:
        """Serve until `source` ends."""
        threading.Thread(target=self._listen, args=(source,), daemon=True).start()
        self.say(ready={"memories": self.memories(), "max_length": self.engine.max_length})
        while self._take_commands():
            if self.engine.has_work():
                for event in self.engine.step():
                    self.say(event=event_fields(event))
            self._tell_stats()

    def _listen(self, source: TextIO) -> None:
        for line in source:
            self._commands.put(json.loads(line))
        self._commands.put(None)

    def _take_commands(self) -> bool:
        """All that have come; waits for one where there is nothing else to do. False at the end."""
        wait = not self.engine.has_work()
        while True:
            try:
                command = self._commands.get(timeout=_IDLE_S) if wait else self._commands.get_nowait()
            except queue.Empty:
                return True
            if command is None:
                return False
            self._obey(command)
            wait = False

    def _obey(self, command: dict[str, Any]) -> None:
        if command["do"] == "add":
            self._add(command)
        elif command["do"] == "abort":
            self.engine.abort(command["id"])
        else:
            self._change_memory(command)

    def _add(self, command: dict[str, Any]) -> None:
        try:
            params = from_dict(SamplingParams, command["params"])
            self.engine.add_request(command["ids"], params, request=command["id"], pack=command["pack"])
        except ByroteError as error:
            self.say(refused=command["id"], error=error_fields(error))

    def _change_memory(self, command: dict[str, Any]) -> None:
        failed = None
        try:
            if command["do"] == "attach":
                self.attach(command["name"])
            else:
                self.engine.unload_pack(command["name"])
        except ByroteError as error:
            failed = error_fields(error)
        self.say(answer=command["call"], error=failed, memories=self.memories())

    def attach(self, name: str) -> None:
        """Load the pack that the server was started with under this name. A client can choose among these and name no folder."""
        if name not in self._folders:
            raise RequestError(f"there is no memory {name!r}; this server was started with: {', '.join(self._folders) or 'none'}")
        if name not in self.engine.packs():
            self.engine.load_pack(name, self._folders[name])

    def memories(self) -> list[dict[str, Any]]:
        attached = set(self.engine.packs())
        return [{"name": name, "attached": name in attached} for name in self._folders]

    def _tell_stats(self) -> None:
        now, stats = time.monotonic(), self.engine.stats()
        if stats != self._last and (now - self._told > _STATS_S or not self.engine.has_work()):
            self.say(stats=stats._asdict())
            self._told, self._last = now, stats

    def say(self, **message: Any) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()


def event_fields(event: Event) -> dict[str, Any]:
    error = None if event.error is None else error_fields(event.error)
    usage = None if event.usage is None else event.usage._asdict()
    tokens, prompt = ([token._asdict() for token in part] for part in (event.tokens, event.prompt))
    return event._asdict() | {"tokens": tokens, "prompt": prompt, "usage": usage, "error": error}


def error_fields(error: ByroteError) -> dict[str, str]:
    return {"kind": type(error).__name__, "message": str(error)}


def main() -> None:
    """`python -m byrote.serve.worker`; the first line of stdin is the configuration."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not end up among the answers
    config = from_dict(ServeConfig, json.loads(sys.stdin.readline()))
    try:
        worker = Worker(config, _engine(config), out)
        for name, _ in config.memories:
            worker.attach(name)
    except ByroteError as error:
        print(json.dumps({"failed": error_fields(error)}), file=out, flush=True)
        raise SystemExit(2) from None
    worker.run(sys.stdin)


def _engine(config: ServeConfig) -> Engine:
    from byrote.checkpoint.local import load

    model, tokenizer = load(config.run, device=config.device, weights=config.weights)
    return Engine(model.eval(), tokenizer, config.engine, name=config.name)


if __name__ == "__main__":
    main()
