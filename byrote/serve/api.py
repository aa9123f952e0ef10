"""The HTTP application: OpenAI's endpoints over `EngineLink`, packs by name, health, metrics, and the chat page.

A request:  guard (id, host, key, size) → schema (400 names the field) → tokens → engine's process → events → chunks, or one answer.
A client that goes away, and a request that takes too long, free their pages at once (`_Job.events`).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from byrote.engine.request import SamplingParams
from byrote.errors import ByroteError, CapacityError, PromptTooLong, RequestError
from byrote.serve.answer import ChatAnswer, Health, Memories, Models, TextAnswer, responses
from byrote.serve.config import ServeConfig
from byrote.serve.guard import Guard, error_body
from byrote.serve.link import EngineGone, EngineLink, Stream
from byrote.serve.metrics import Metrics
from byrote.serve.schema import ChatRequest, Common, CompletionRequest, MemoryChange
from byrote.serve.stream import ChatChoice, TextChoice, server_sent, usage_fields
from byrote.tokenizer.bpe import Tokenizer
from byrote.tokenizer.chat import ChatTemplate

WEB = Path(__file__).parent / "web"
_PAGE = {"/": ("index.html", "text/html"), "/chat.js": ("chat.js", "text/javascript"), "/chat.css": ("chat.css", "text/css")}
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
_POLL_S = 0.5  # how often a waiting request looks whether its client is still there


class TooBusy(ByroteError):
    """More requests under way than the server allows."""


class ClientGone(ByroteError):
    """Nobody is there to read the answer."""


class TookTooLong(ByroteError):
    """The request's time is over."""


class Server:
    """What handlers share."""

    def __init__(self, config: ServeConfig, tokenizer: Tokenizer, template: ChatTemplate | None, given_up: Callable[[], None]) -> None:
        self.config, self.tokenizer, self.template = config, tokenizer, template
        self.link = EngineLink(config, given_up)
        self.metrics = Metrics(self.link)
        self.began = int(time.time())

    def models(self) -> list[str]:
        packs = [memory["name"] for memory in self.link.memories if memory["attached"]]
        return [self.config.name, *(f"{self.config.name}:{name}" for name in packs)]

    def pack_of(self, model: str) -> str | None:
        """The pack that a model's name asks for. RequestError naming the models there are."""
        if model not in self.models():
            raise RequestError(f"there is no model {model!r}; this server has: {', '.join(self.models())}")
        return model.partition(":")[2] or None

    def check_room(self, prompts: int) -> None:
        """For so many more: RequestError where there never is, TooBusy where there is none now."""
        most = self.config.limits.requests
        if prompts > most:
            raise RequestError(f"{prompts} prompts; this server reads at most {most} at once")
        if self.link.under_way + prompts > most:
            raise TooBusy(f"{self.link.under_way} requests are under way, this server allows {most}; try again")


class _Job:
    """One request on its way: its stream in the engine, its choices, its time."""

    def __init__(
        self, server: Server, request: Request, asked: Common, prompts: list[list[int]], params: SamplingParams, choices: list[Any]
    ) -> None:
        server.check_room(len(prompts))
        self._server, self.asked, self.choices = server, asked, choices
        self._ends = asyncio.get_running_loop().time() + server.config.limits.request_s
        self._usages: dict[int, dict[str, int]] = {}
        self.stream: Stream = server.link.add(request.state.request, prompts, params, server.pack_of(asked.model))

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The engine's events; whoever stops listening gives back what the request holds."""
        pace = self._server.metrics.pace()
        try:
            async with asyncio.timeout_at(self._ends):
                async for event in self.stream.events():
                    pace.tick()
                    if event["usage"] is not None:
                        self._usages[event["index"]] = event["usage"]
                    yield event
        except TimeoutError:
            raise TookTooLong(f"the request took longer than {self._server.config.limits.request_s:.0f} s and was ended") from None
        finally:
            self._server.link.drop(self.stream)

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        id_ = f"{self.choices[0].prefix}-{self.stream.request}"
        return {"id": id_, "object": kind, "created": int(time.time()), "model": self.asked.model, "choices": choices}

    async def whole(self) -> dict[str, Any]:
        """One answer with all choices."""
        async for event in self.events():
            self.choices[event["index"]].chunk(event)
        answer = self.envelope(self.choices[0].kind, [choice.whole() for choice in self.choices])
        return answer | {"usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        return usage_fields(self._usages, self.asked.n)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Server-sent events. What goes wrong before the first is raised, later it is told inside the stream."""
        kind, begun = self.choices[0].chunk_kind, False
        wants_usage = self.asked.stream_options is not None and self.asked.stream_options.include_usage
        try:
            async for event in self.events():
                chunk = self.envelope(kind, [self.choices[event["index"]].chunk(event)])
                begun = True
                yield server_sent(chunk | ({"usage": None} if wants_usage else {}))
            if wants_usage:
                yield server_sent(self.envelope(kind, []) | {"usage": self._usage()})
        except ByroteError as error:
            if not begun:
                raise
            yield server_sent(_error(error)[1])
        yield server_sent("[DONE]")


def make_app(config: ServeConfig, tokenizer: Tokenizer, template: ChatTemplate | None, given_up: Callable[[], None]) -> FastAPI:
    """The application; whoever runs it starts and closes `app.state.server.link`. `given_up` is called when the engine died too often."""
    server = Server(config, tokenizer, template, given_up)
    app = FastAPI(title="byrote", docs_url=None, redoc_url=None)
    app.state.server = server
    _add_text_routes(app, server)
    _add_other_routes(app, server)
    _add_page(app)
    app.add_exception_handler(ByroteError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(Guard, config=config, count=server.metrics.count)
    return app


def _add_text_routes(app: FastAPI, server: Server) -> None:
    @app.post("/v1/completions", responses=responses(TextAnswer, streams=True))
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        prompts, params = asked.prompts(), asked.params(server.config.limits)
        server.check_room(len(prompts))
        ids = await asyncio.to_thread(lambda: [_prompt_ids(server.tokenizer, prompt) for prompt in prompts])
        echoes = [_text(server.tokenizer, prompt) if asked.echo else "" for prompt in prompts for _ in range(asked.n)]
        make = partial(TextChoice, tokenizer=server.tokenizer, logprobs=asked.logprobs is not None, gates=asked.gates)
        choices = [make(index, echo=echo) for index, echo in enumerate(echoes)]
        return await _answer(_Job(server, request, asked, ids, params, choices), request)

    @app.post("/v1/chat/completions", responses=responses(ChatAnswer, streams=True))
    async def chat(asked: ChatRequest, request: Request) -> Response:
        if server.template is None:
            raise RequestError(f"{server.config.name} is a base model without a chat template; use /v1/completions")
        ids = await asyncio.to_thread(server.template.encode, [message.plain() for message in asked.messages])
        choices = [ChatChoice(index, server.tokenizer, logprobs=asked.logprobs, gates=asked.gates) for index in range(asked.n)]
        return await _answer(_Job(server, request, asked, [ids], asked.params(server.config.limits), choices), request)


def _prompt_ids(tokenizer: Tokenizer, prompt: str | list[int]) -> list[int]:
    return [tokenizer.begin_id, *tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt


def _text(tokenizer: Tokenizer, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)


async def _answer(job: _Job, request: Request) -> Response:
    if not job.asked.stream:
        return JSONResponse(await _unless_gone(request, job.whole()))
    chunks = job.chunks()
    first = await _unless_gone(request, anext(chunks))
    return StreamingResponse(_led_by(first, chunks), media_type="text/event-stream", headers={"cache-control": "no-store"})


async def _led_by(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk


async def _unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled when the client goes away."""
    task = asyncio.ensure_future(work)
    while not (await asyncio.wait({task}, timeout=_POLL_S))[0]:
        if await request.is_disconnected():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            raise ClientGone("the client went away")
    return await task


def _add_other_routes(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models", responses=responses(Models))
    async def models() -> dict[str, Any]:
        facts = {"object": "model", "created": server.began, "owned_by": "byrote"}
        more = {"max_model_len": server.link.max_length, "chat": server.template is not None}
        return {"object": "list", "data": [{"id": name, **facts, **more} for name in server.models()]}

    @app.get("/v1/memories", responses=responses(Memories))
    async def memories() -> dict[str, Any]:
        return {"object": "list", "data": server.link.memories}

    @app.post("/v1/memories/attach", responses=responses(Memories))
    async def attach(change: MemoryChange) -> dict[str, Any]:
        return {"object": "list", "data": await server.link.change_memory(change.name, attach=True)}

    @app.post("/v1/memories/detach", responses=responses(Memories))
    async def detach(change: MemoryChange) -> dict[str, Any]:
        return {"object": "list", "data": await server.link.change_memory(change.name, attach=False)}

    @app.get("/health", responses=responses(Health) | {503: {"model": Health, "description": "starting"}})
    async def health() -> Response:
        if not server.link.ready.is_set():
            return JSONResponse({"status": "starting"}, 503, {"retry-after": "5"})
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI) -> None:
    for path, (file, kind) in _PAGE.items():
        app.add_api_route(path, _sends(file, kind), include_in_schema=False)


def _sends(file: str, kind: str) -> Callable[[], Awaitable[Response]]:
    """A handler without parameters: FastAPI would let a query fill them."""
    headers = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}

    async def page() -> Response:
        return FileResponse(WEB / file, media_type=kind, headers=headers)

    return page


# ── errors ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

_STATUS: dict[type[ByroteError], tuple[int, str]] = {
    RequestError: (400, "invalid_request"),
    PromptTooLong: (400, "context_length_exceeded"),
    ClientGone: (499, "client_closed_request"),
    TooBusy: (429, "too_many_requests"),
    CapacityError: (503, "overloaded"),
    EngineGone: (503, "engine_restarting"),
    TookTooLong: (504, "timeout"),
}


def _error(error: ByroteError) -> tuple[int, dict[str, Any], dict[str, str]]:
    status, code = _STATUS.get(type(error), (500, "internal_error"))
    headers = {"retry-after": "5" if code == "engine_restarting" else "1"} if status in (429, 503) else {}
    return status, error_body(str(error), code, status=status), headers


async def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ByroteError)
    status, body, headers = _error(error)
    return JSONResponse(body, status, headers)


async def _on_invalid(_: Request, error: Exception) -> Response:
    """400 that names the field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return JSONResponse(
            error_body(f"the body is no JSON: {first['ctx']['error']} at {first['loc'][1]}", "json_invalid", status=400), 400
        )
    field = ".".join(takewhile(_is_of_client, map(str, first["loc"][1:])))
    what = f"{field!r} is no field that byrote supports" if first["type"] == "extra_forbidden" else f"{field or 'body'}: {first['msg']}"
    return JSONResponse(error_body(what, first["type"], status=400, param=field or None), 400)


def _is_of_client(part: str) -> bool:
    """Whether a part of a field's place stands in the request; behind the others pydantic says which alternative it tried."""
    return "[" not in part and part not in ("str", "constrained-str")


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(str(error.detail), None, status=error.status_code), error.status_code, error.headers)
