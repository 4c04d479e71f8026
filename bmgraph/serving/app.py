"""The server as an ASGI app: OpenAI's API over one engine, with its deltas as models, and pages for people and machines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, Router

from bmgraph.runtime.generation.batching.scheduler import Load
from bmgraph.serving.access import NOTES, Access, App, Message, Receive, Scope, Send
from bmgraph.serving.answers import Answers, submitted
from bmgraph.serving.api_error import ApiError, of_exception
from bmgraph.serving.asked import Asked, chat, completion
from bmgraph.serving.embeddings import Embedder, packed
from bmgraph.serving.fields import Fields, parsed
from bmgraph.serving.metrics import Metrics
from bmgraph.serving.options import ServeOptions
from bmgraph.serving.replies import ChatReply, CompletionReply, Reply, usage
from bmgraph.serving.served_models import ServedModels

PAGE = Path(__file__).parent / "page.html"


class Server:
    """Answers requests over the models. `app` is the ASGI app; `close` ends what runs."""

    def __init__(self, models: ServedModels, allowed: ServeOptions, embedder: Embedder | None = None) -> None:
        """An engine that generates serves completions and chat; an encoder needs an `embedder`."""
        self.models, self.allowed, self.metrics, self.embedder = models, allowed, Metrics(), embedder
        self._embedding = asyncio.Lock()
        self.closing = False
        routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._list, methods=["GET"]),
            Route("/v1/models", self._add, methods=["POST"]),
            Route("/v1/models/{model:path}", self._card, methods=["GET"]),
            Route("/v1/models/{model:path}", self._remove, methods=["DELETE"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/embeddings", self._embeddings, methods=["POST"]),
        ]
        paths = frozenset(route.path for route in routes)
        self.app = Access(_routed(Router(routes, redirect_slashes=False)), allowed, self.metrics, paths)

    def close(self) -> None:
        """End what runs."""
        self.closing = True
        self.models.engine.stop_batching()

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(
            PAGE.read_text(encoding="utf-8"),
            headers={"Content-Security-Policy": "default-src 'self' 'unsafe-inline'"},
        )

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "closing" if self.closing else "ok"}, 503 if self.closing else 200)

    async def _metrics(self, request: Request) -> Response:
        load = self.models.engine.scheduler().load if self.models.generates else Load(0, 0, 0)
        gauges = {
            "running": ("Requests that run.", float(load.running)),
            "waiting": ("Requests that wait.", float(load.waiting)),
            "cache_positions": ("Positions of the KV cache that hold tokens.", float(load.positions)),
            "kept_positions": ("Positions that are kept for prompts to come.", float(load.kept)),
        }
        return PlainTextResponse(self.metrics.text(gauges), media_type="text/plain; version=0.0.4")

    async def _list(self, request: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [self.models.card(name) for name in self.models.names]}
        )

    async def _card(self, request: Request) -> Response:
        return JSONResponse(self.models.card(request.path_params["model"]))

    async def _add(self, request: Request) -> Response:
        fields = await self._fields(request)
        name, folder = fields.text("id"), fields.text("folder")
        fields.done()
        return JSONResponse(await asyncio.to_thread(self.models.add, name, folder))

    async def _remove(self, request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(self.models.remove, request.path_params["model"]))

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, lambda fields: completion(fields, self.allowed), CompletionReply)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, lambda fields: chat(fields, self.models, self.allowed), ChatReply)

    async def _answer(
        self, request: Request, read: Callable[[Fields], Asked], kind: type[CompletionReply] | type[ChatReply]
    ) -> Response:
        if not self.models.generates:
            raise ApiError(
                404, f"{self.models.name!r} gives embeddings and no texts", code="unsupported_endpoint"
            )
        fields = await self._fields(request)
        asked, requests = await asyncio.to_thread(self._submitted, fields, read)
        answers = Answers(requests, self.allowed.seconds)
        notes = request.scope[NOTES]
        notes["model"] = asked.model
        reply = kind(asked.model, self.models.tokenizer, asked.scores is not None)
        if asked.stream:
            return _Events(
                self._chunks(answers, asked, reply, notes), lambda: self._end(answers, asked, notes)
            )
        try:
            await _unless_gone(request, answers.whole())
            return JSONResponse(reply.whole(answers.so_far, asked.each))
        finally:
            self._end(answers, asked, notes)

    def _submitted(self, fields: Fields, read: Callable[[Fields], Asked]) -> tuple[Asked, list[Any]]:
        asked = read(fields)
        return asked, submitted(asked, self.models, self.allowed)

    async def _chunks(
        self, answers: Answers, asked: Asked, reply: Reply, notes: dict[str, object]
    ) -> AsyncIterator[bytes]:
        try:
            for number in range(len(answers.so_far)):
                first = reply.first(number)
                if first is not None:
                    yield _event(first)
            async for number, piece in answers.pieces():
                if piece is None:
                    yield _event(reply.chunk(number, reason=answers.so_far[number].finish_reason))
                elif piece.text or piece.score is not None:
                    yield _event(reply.chunk(number, piece))
            if asked.usage_in_stream:
                yield _event(reply.last(usage(answers.so_far, asked.each)))
            yield b"data: [DONE]\n\n"
        except Exception as error:
            notes["error"] = type(error).__name__
            yield _event(of_exception(error).body())

    def _end(self, answers: Answers, asked: Asked, notes: dict[str, object]) -> None:
        answers.end()
        answers.note(self.metrics, asked.model)
        found = usage(answers.so_far, asked.each)
        cached = found["prompt_tokens_details"]["cached_tokens"]
        notes.update(prompt=found["prompt_tokens"], cached=cached, new=found["completion_tokens"])

    async def _embeddings(self, request: Request) -> Response:
        embedder = self.embedder
        if embedder is None:
            raise ApiError(
                404, f"{self.models.name!r} gives texts and no embeddings", code="unsupported_endpoint"
            )
        fields = await self._fields(request)
        asked = await asyncio.to_thread(embedder.asked, fields, self.allowed.most_answers)
        if asked.model != self.models.name:
            self.models.choice(asked.model)
        async with self._embedding:  # one batch at a time, which uses all cores
            rows = await asyncio.to_thread(embedder.embeddings, asked.ids)
        count = sum(map(len, asked.ids))
        self.metrics.add("prompt_tokens_total", count, model=asked.model)
        request.scope[NOTES].update(model=asked.model, prompt=count)
        data = [
            {
                "object": "embedding",
                "index": number,
                "embedding": packed(row) if asked.packed else row.tolist(),
            }
            for number, row in enumerate(rows)
        ]
        spent = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": asked.model, "usage": spent})

    async def _fields(self, request: Request) -> Fields:
        """The fields of the body, which is read within limits. Raises ApiError."""
        if self.closing:
            raise ApiError(503, "the server is closing", code="closing", headers={"Retry-After": "10"})
        most = self.allowed.longest_body
        declared = request.headers.get("content-length", "0")
        body = bytearray()
        try:
            if declared.isdigit() and len(declared) < 20 and int(declared) <= most:
                async with asyncio.timeout(self.allowed.body_seconds):
                    async for part in request.stream():
                        body += part
                        if len(body) > most:
                            break
            if len(body) > most or not declared.isdigit() or int(declared[:20]) > most:
                raise ApiError(
                    413, f"the body has more than the {most} bytes that this server takes", code="body_too_large",
                    headers={"Connection": "close"},
                )  # fmt: skip
        except TimeoutError as error:
            raise ApiError(
                408, f"the body did not come within {self.allowed.body_seconds:g} s", code="timeout"
            ) from error
        return await asyncio.to_thread(parsed, bytes(body))


class _Events(StreamingResponse):
    """A stream of events. `ended` is called when it is over, also where the client has left before any event was asked for."""

    def __init__(self, events: AsyncIterator[bytes], ended: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


async def _unless_gone(request: Request, work: Any) -> None:
    """Await work, unless the client leaves before it is done. Raises ClientDisconnect then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        await task
    finally:
        for item in (task, gone):
            item.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await item


async def _gone(request: Request) -> None:
    message: Message = {}
    while message.get("type") != "http.disconnect":
        message = await request.receive()


def _routed(router: Router) -> App:
    """The router, which tells of a path or a method that there is not as an ApiError."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = router  # has it raise instead of answering in plain text
        try:
            await router(scope, receive, send)
        except ClientDisconnect:
            pass  # nobody is there to be answered
        except HTTPException as error:
            message = f"there is no {scope['method']} {scope['path'][:80]!r} here"
            raise ApiError(
                error.status_code, message, code="unknown_url", headers=dict(error.headers or {})
            ) from error

    return call


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
