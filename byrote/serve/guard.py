"""What every request passes before a handler sees it: an id, the host it names, its key, the size of its body.

Written on ASGI itself, so that a body is counted while it arrives and an answer streams through untouched.

A server without a key that only this machine can reach still answers a browser, and a page from elsewhere can make its own name point
at 127.0.0.1: so such a server answers only to names of this machine (`_foreign_host`).
"""

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from byrote.serve.config import ServeConfig, is_this_machine

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

log = logging.getLogger("byrote.serve")
_BODY_S = 30.0  # a body must have arrived by then
_FREE = ("/", "/health", "/chat.js", "/chat.css")  # without a key: the page, and whether the server lives


class Guard:
    """Middleware around the application."""

    def __init__(self, app: App, config: ServeConfig, count: Callable[[str, int, float], None]) -> None:
        """`count(path, status, seconds)` is told of every answer."""
        self._app, self._config, self._count = app, config, count
        self._keys = [_digest(key.encode()) for key in config.keys]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.perf_counter(), 500
        request = scope.setdefault("state", {})["request"] = secrets.token_hex(12)

        async def mark(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request.encode())]
            await send(message)

        try:
            await self._pass(scope, receive, mark)
        finally:
            seconds = time.perf_counter() - began
            self._count(scope["path"], status, seconds)
            log.info("%s %s %s %d %.0f ms", request, scope["method"], ascii(scope["path"])[1:-1], status, 1e3 * seconds)

    async def _pass(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if self._foreign_host(headers):
            return await refuse(send, 403, "this server answers only to names of this machine, such as 127.0.0.1 or localhost", "host")
        if scope["path"] not in _FREE and not self._has_key(headers):
            return await refuse(
                send, 401, "the API key is missing or wrong; send the header 'Authorization: Bearer KEY'", "invalid_api_key"
            )
        try:
            body = await asyncio.wait_for(_read_body(headers, receive, self._config.limits.body_bytes), _BODY_S)
        except TimeoutError:
            return await refuse(send, 408, f"the body did not arrive within {_BODY_S:.0f} s", "timeout")
        if body is None:
            return await refuse(send, 413, f"the body is larger than {self._config.limits.body_bytes:,} bytes", "too_large")
        return await self._app(scope, _replay(body, receive), send)

    def _foreign_host(self, headers: dict[bytes, bytes]) -> bool:
        if self._config.keys or not is_this_machine(self._config.host):
            return False
        name = headers.get(b"host", b"").decode("latin-1").lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.rpartition(":")[0] or name
        return not is_this_machine(name)

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        if not self._keys:
            return True
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = _digest(key.strip())
        right = [hmac.compare_digest(given, known) for known in self._keys]  # all of them, so that the time tells nothing
        return kind.lower() == b"bearer" and any(right)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _read_body(headers: dict[bytes, bytes], receive: Receive, limit: int) -> bytes | None:
    """The whole body, or None as soon as it is known to be too large."""
    declared = headers.get(b"content-length", b"0")
    if not declared.isdigit() or int(declared[:20]) > limit:
        return None
    parts, size = [], 0
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            return None
        if message["type"] != "http.request" or not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body, then whatever comes (that the client went away)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def error_body(message: str, code: str | None, *, status: int, param: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "rate_limit_error" if status == 429 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def refuse(send: Send, status: int, message: str, code: str) -> None:
    body = json.dumps(error_body(message, code, status=status)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
