"""What every request passes first: the host it names, its key, the size of its body."""

import asyncio
import json

import pytest

from byrote.errors import ConfigError
from byrote.serve.config import Limits, ServeConfig
from byrote.serve.guard import Guard

KEY = "0123456789abcdef"


async def _echo(scope, receive, send) -> None:
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message.get("body", b"")})


def ask(config: ServeConfig, path: str = "/v1/models", *, parts: tuple[bytes, ...] = (b"",), **headers: str) -> tuple[int, bytes, dict]:
    """(status, body, headers) of one request to an application that echoes."""
    counted, sent = [], []
    messages = iter([{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts])

    async def receive():
        return next(messages, {"type": "http.disconnect"})

    async def send(message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path}
    scope["headers"] = [(name.replace("_", "-").encode(), value.encode()) for name, value in {"host": "localhost:80", **headers}.items()]
    asyncio.run(Guard(_echo, config, lambda *fact: counted.append(fact))(scope, receive, send))
    assert [(path_, status) for path_, status, _ in counted] == [(path, sent[0]["status"])]
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent), dict(sent[0]["headers"])


def config(**changes) -> ServeConfig:
    return ServeConfig(run="r", name="m", **changes)


def test_only_the_right_key_opens_and_some_paths_need_none() -> None:
    locked = config(keys=(KEY, "another-key-of-16"))
    assert ask(locked, authorization=f"Bearer {KEY}")[0] == 200
    assert ask(locked, authorization="bearer another-key-of-16")[0] == 200
    for wrong in ("", f"Basic {KEY}", "Bearer ", f"Bearer {KEY[:-1]}", f"Bearer {KEY}0", "Bearer ü"):
        status, body, _ = ask(locked, authorization=wrong)
        assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
    assert ask(locked, "/health")[0] == 200
    assert ask(locked, "/metrics")[0] == 401


def test_without_a_key_only_names_of_this_machine_are_answered() -> None:
    for name in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "127.8.9.1", "[::1]:8000", "[::1]"):
        assert ask(config(), host=name)[0] == 200, name
    for name in ("evil.example", "evil.example:8000", "localhost.evil.example", "", "10.0.0.1", "[::2]:1"):
        assert ask(config(), host=name)[0] == 403, name
    assert ask(config(keys=(KEY,)), host="evil.example", authorization=f"Bearer {KEY}")[0] == 200


def test_bodies_are_counted_as_they_arrive_whatever_they_declare() -> None:
    small = config(limits=Limits(body_bytes=10))
    assert ask(small, parts=(b"12345", b"67890"))[:2] == (200, b"1234567890")
    for parts, headers in (
        ((b"12345", b"678901"), {}),
        ((b"",), {"content_length": "11"}),
        ((b"",), {"content_length": "9" * 5000}),
        ((b"",), {"content_length": "-1"}),
    ):
        assert ask(small, parts=parts, **headers)[0] == 413


def test_every_answer_carries_the_id_of_its_request() -> None:
    ids = {ask(config())[2][b"x-request-id"] for _ in range(3)} | {ask(config(), host="evil")[2][b"x-request-id"]}
    assert len(ids) == 4


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "my-machine"])
def test_other_machines_are_let_in_only_with_a_key_or_on_purpose(host: str) -> None:
    with pytest.raises(ConfigError, match="no API key"):
        config(host=host)
    assert config(host=host, keys=(KEY,)).host == config(host=host, open_to_all=True).host == host


def test_short_keys_double_memories_and_odd_names_are_refused() -> None:
    for changes, words in (
        ({"keys": ("short",)}, "at least 16"),
        ({"memories": (("a", "x"), ("a", "y"))}, "twice"),
        ({"memories": (("a:b", "x"),)}, "may stand in one"),
        ({"port": 70000}, "65535"),
    ):
        with pytest.raises(ConfigError, match=words):
            config(**changes)
