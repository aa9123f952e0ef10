"""Run the HTTP application: bind, serve, drain on SIGTERM, and end with a status that tells whether the engine gave up."""

import asyncio
import logging
import signal
import socket
import sys
from typing import Any

import uvicorn

from byrote.checkpoint.runs import find_checkpoint
from byrote.errors import ConfigError
from byrote.serve.api import make_app
from byrote.serve.config import ServeConfig
from byrote.serve.link import EngineLink
from byrote.tokenizer.bpe import Tokenizer
from byrote.tokenizer.chat import ChatTemplate

GAVE_UP = 3  # exit status when the engine died too often


def serve(config: ServeConfig) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status. ConfigError where the port cannot be had."""
    tokenizer = Tokenizer.load(find_checkpoint(config.run) / "tokenizer")
    template = ChatTemplate.of(tokenizer)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    listening = _bind(config.host, config.port)
    gave_up = False

    def give_up() -> None:
        nonlocal gave_up
        gave_up = runner.should_exit = True
        print("byrote: the engine died too often; the server ends", file=sys.stderr)

    app = make_app(config, tokenizer, template, give_up)
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # `Guard` writes one line a request, without its text
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=round(config.drain_s),
        h11_max_incomplete_event_size=1 << 16,
    )
    runner = uvicorn.Server(settings)
    print(f"byrote: loading {config.run}", file=sys.stderr)
    ready = f"byrote: {config.name} at {_address(listening)}{'' if template else ' (a base model: completions, no chat)'}; Ctrl-C ends it"
    try:
        asyncio.run(_run(runner, app.state.server.link, listening, ready))
    except KeyboardInterrupt:  # while it loaded
        return 130
    if gave_up:
        return GAVE_UP
    return 0 if runner.started else 2


async def _run(runner: uvicorn.Server, link: EngineLink, listening: socket.socket, ready: str) -> None:
    """Serve until a signal. uvicorn drains, then sends itself the signal once more: here that is no reason to die of it."""
    before: dict[int, Any] = {}
    try:
        await link.start()
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
        print(ready, file=sys.stderr)
        await runner.serve(sockets=[listening])
    finally:
        await link.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error}; choose another --port (0: any that is free)") from None
    return listening


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
