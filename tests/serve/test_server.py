"""`byrote serve` as a process, spoken to by the official client and by rude ones."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

openai = pytest.importorskip("openai", reason="pip install openai")
import httpx2  # noqa: E402  comes with openai

from byrote.serve.api import make_app  # noqa: E402
from byrote.serve.config import ServeConfig  # noqa: E402
from byrote.serve.server import GAVE_UP  # noqa: E402
from byrote.tokenizer.bpe import Tokenizer  # noqa: E402
from tests.serve.served import KEY, Served  # noqa: E402


def complete(served: Served, **changes):
    asked = {"model": "tiny", "prompt": "so it", "max_tokens": 8, "temperature": 0.0} | changes
    return served.openai.completions.create(**asked)


# ── what the official client sees ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_is_the_whole_answer_in_pieces(served: Served) -> None:
    whole_answer = complete(served)
    chunks = list(complete(served, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole_answer.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole_answer.choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole_answer.usage.completion_tokens == 8


def test_a_seed_fixes_the_answer_and_choices_differ(served: Served) -> None:
    asked = {"n": 3, "temperature": 1.0, "seed": 7, "max_tokens": 12}
    first, second = complete(served, **asked), complete(served, **asked)
    assert [choice.text for choice in first.choices] == [choice.text for choice in second.choices]
    assert len({choice.text for choice in first.choices}) == 3


def test_log_probabilities_and_echo_cover_prompt_and_answer(served: Served) -> None:
    answer = complete(served, echo=True, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith("so it")
    assert logprobs.token_logprobs[0] is None and all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens) == answer.usage.total_tokens
    best = [max(top.values()) for top in logprobs.top_logprobs[-8:]]
    assert best == pytest.approx(logprobs.token_logprobs[-8:])  # greedy takes the most probable


def test_a_stop_string_ends_the_text_before_it(served: Served) -> None:
    full = complete(served, max_tokens=30).choices[0].text
    stop = full[9:13]
    stopped = complete(served, max_tokens=30, stop=stop).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == full[: full.index(stop)]


def test_gates_are_given_for_every_token_when_asked_for(served: Served) -> None:
    choice = complete(served, extra_body={"gates": True}).choices[0]
    assert "".join(one["token"] for one in choice.gates) == choice.text != ""
    assert all(0 < one["gate"] < 1 for one in choice.gates)


def test_a_chat_is_answered_by_the_template(served: Served) -> None:
    asked = {"model": "tiny", "max_tokens": 6, "temperature": 0.0}
    answer = served.openai.chat.completions.create(messages=[{"role": "user", "content": "so it"}], **asked)
    assert answer.choices[0].message.content == served.openai.completions.create(prompt="[user]so it>", **asked).choices[0].text
    assert [model.id for model in served.openai.models.list()] == ["tiny"]


def test_a_base_model_has_no_chat_and_says_so(tokenizer: Tokenizer) -> None:
    app = make_app(ServeConfig(run="none", name="base"), tokenizer, None, lambda: None)

    async def ask() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as client:
            return await client.post("/v1/chat/completions", json={"model": "base", "messages": [{"role": "user", "content": "hi"}]})

    answer = asyncio.run(ask())
    assert answer.status_code == 400
    assert "without a chat template" in answer.json()["error"]["message"]


@pytest.mark.parametrize("prompts", [["so it", "and the rest", ""], [[5, 6], [7]]], ids=["texts", "token ids"])
def test_several_prompts_are_answered_like_each_alone_choices_numbered_through(served: Served, prompts: list) -> None:
    asked = {"n": 2, "temperature": 1.0, "seed": 3, "echo": True}
    alone = [complete(served, prompt=prompt, **asked) for prompt in prompts]
    together = complete(served, prompt=prompts, **asked)
    assert [choice.index for choice in together.choices] == list(range(2 * len(prompts)))
    assert [choice.text for choice in together.choices] == [choice.text for one in alone for choice in one.choices]
    assert together.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
    assert together.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    streamed = [""] * len(together.choices)
    for chunk in complete(served, prompt=prompts, stream=True, **asked):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in together.choices]


def test_one_bad_prompt_refuses_the_request_and_leaves_nothing_under_way(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="token id 99999 lies outside"):
        complete(served, prompt=[[5, 6], [99999]], echo=True, max_tokens=400)
    with pytest.raises(openai.BadRequestError, match="200 prompts; this server reads at most 128"):
        complete(served, prompt=["so"] * 200)
    served.settle()


def test_errors_are_the_clients_own_classes(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="there is no model 'other'"):
        complete(served, model="other")
    with pytest.raises(openai.BadRequestError, match="'best_of' is no field") as caught:
        complete(served, extra_body={"best_of": 2})
    assert caught.value.param == "best_of"
    for field in ("prompt", "stop"):
        with pytest.raises(openai.BadRequestError, match=f"{field}: Input should be") as caught:
            complete(served, **{field: 5})
        assert caught.value.param == field
    with pytest.raises(openai.BadRequestError, match="512") as caught:
        complete(served, prompt="so it goes " * 400)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError, match="there is no memory 'x'"):
        served.openai.post("/memories/attach", body={"name": "x"}, cast_to=object)


# ── rude clients ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def malformed(rng: random.Random) -> bytes:
    """A body that is no valid request."""
    good = json.dumps({"model": "tiny", "prompt": "so", "max_tokens": 1}).encode()
    kind = rng.randrange(6)
    if kind == 0:
        return good[: rng.randrange(len(good))]
    if kind == 1:
        spot = rng.randrange(len(good))
        return good[:spot] + bytes([rng.choice(b'\x00\xff{}[]"\\,:')]) + b"\x01" + good[spot + 1 :]
    if kind == 2:
        return rng.randbytes(rng.randrange(200))
    if kind == 3:
        return b"[" * rng.randrange(1, 100_000)
    field = rng.choice(("model", "prompt", "max_tokens", "n", "stop", "logit_bias", "stream", "stream_options", "seed", "unknown"))
    value = rng.choice((None, [], {}, -1, 1e999, float("nan"), "\ud800", [[]], {"a": {}}, 2**70, "x" * 3000, [None]))
    if field in ("stop", "logit_bias", "seed", "stream_options") and value in (None, [], {}):
        value = [{}]  # these say "none"
    return json.dumps(
        {"model": "tiny", "prompt": "so", "max_tokens": 1, field: {"odd": value} if field == "prompt" else [value, {}]}
    ).encode()


def test_a_thousand_malformed_bodies_get_nothing_but_4xx(served: Served) -> None:
    rng = random.Random(0)
    bodies = [malformed(rng) for _ in range(1000)]

    def status(body: bytes) -> int:
        return served.http.post("/v1/completions", content=body, headers={"content-type": "application/json"}).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(status, bodies))
    assert {status // 100 for status in statuses} == {4}, sorted(set(statuses))
    assert complete(served).choices[0].text


def test_clients_that_vanish_give_back_what_they_held(served: Served) -> None:
    def vanish(seed: int) -> None:
        with socket.create_connection(served.url.removeprefix("http://").split(":")) as wire:
            body = json.dumps({"model": "tiny", "prompt": "so it", "max_tokens": 400, "ignore_end": True, "stream": seed % 2 == 0}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
            wire.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(0.02 * (seed % 5))

    before = served.metric("byrote_aborted_total")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(vanish, range(16)))
    served.settle()
    assert served.metric("byrote_aborted_total") > before
    assert served.metric("byrote_errors_total") == 0


def test_many_streams_at_once_each_get_their_own_text(served: Served) -> None:
    prompts = [f"so it goes {number}" for number in range(24)]
    alone = [complete(served, prompt=prompt).choices[0].text for prompt in prompts]

    def streamed(prompt: str) -> str:
        return "".join(chunk.choices[0].text for chunk in complete(served, prompt=prompt, stream=True))

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(streamed, prompts)) == alone
    served.settle()


def test_no_text_of_users_is_in_the_log(served: Served) -> None:
    complete(served, prompt="a secret word: xylophone")
    assert any("POST /v1/completions 200" in line for line in served.log)
    assert not any("xylophone" in line for line in served.log)


# ── life and death ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the engine's process in /proc")
def test_a_killed_engine_fails_its_streams_at_once_and_is_started_again_and_four_deaths_end_the_server(run: Path) -> None:
    served = Served(run, BYROTE_API_KEY=KEY)
    stream = complete(served, max_tokens=500, stream=True, extra_body={"ignore_end": True})
    next(iter(stream))
    began = time.monotonic()
    worker = served.worker()
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="engine's process ended"):
        list(stream)
    assert time.monotonic() - began < 5
    for _ in range(3):
        worker = served.worker(other_than=worker)
        assert complete(served).choices[0].text
        os.kill(worker, signal.SIGKILL)
    assert served.process.wait(30) == GAVE_UP


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_lets_requests_finish(run: Path, number: signal.Signals) -> None:
    served = Served(run, BYROTE_API_KEY=KEY)
    stream = complete(served, max_tokens=200, stream=True, extra_body={"ignore_end": True})
    chunks = iter(stream)
    next(chunks)
    os.killpg(served.process.pid, number)  # as a terminal does
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert served.process.wait(30) == 0


def test_a_run_that_is_not_there_and_a_port_in_use_are_one_line(run: Path, tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    for options, words in (
        ((str(tmp_path / "none"),), "none"),
        ((str(run), "--port", str(taken.getsockname()[1])), "choose another --port"),
        ((str(run), "--host", "0.0.0.0"), "no API key"),
        ((str(run), "--port", "0", "--memory", f"law={tmp_path}"), "manifest.json cannot be read"),
    ):
        done = subprocess.run([sys.executable, "-m", "byrote", "serve", *options], capture_output=True, text=True)
        assert done.returncode == 2
        assert words in done.stderr and "Traceback" not in done.stderr
    taken.close()
