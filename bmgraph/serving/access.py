"""What happens around each request: access, the log, and errors as bodies."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from bmgraph.serving.api_error import ApiError, of_exception
from bmgraph.serving.metrics import Metrics
from bmgraph.serving.options import ServeOptions

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/", "/health", "/metrics")
"""Paths that need no key."""

NOTES = "bmgraph.notes"
"""Where a request's scope holds what its line of the log says beside."""

log = logging.getLogger("bmgraph.serving")


class Access:
    """An ASGI app in front of another one: checks the key, answers what it raises with an error's body, and writes a line to the log.

    The log names the client, the path, the status, the time and numbers of tokens; never what was asked or answered.
    """

    def __init__(self, app: App, allowed: ServeOptions, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._allowed, self._metrics, self._paths = app, allowed, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 0
        notes: dict[str, object] = {}
        scope[NOTES] = notes

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
            await asyncio.wait_for(send(message), self._allowed.seconds)  # of a client that reads nothing

        try:
            self._check_key(scope)
            await self._app(scope, receive, watched)
        except Exception as error:
            found = of_exception(error)
            if found.status == 500 and not isinstance(error, ApiError):
                log.error("%s %s failed", scope["method"], shown(scope["path"]), exc_info=error)
            if status:
                raise
            await _answer(watched, found)
        finally:
            seconds = time.perf_counter() - begin
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.add("requests_total", path=path, status=str(status or 499))
            if scope["path"].startswith("/v1/"):
                self._metrics.observe("request_seconds", seconds)
            client = scope.get("client") or ("-",)
            told = "".join(f" {name}={shown(str(value))}" for name, value in notes.items())
            log.info(
                '%s "%s %s" %s %.3fs%s',
                client[0],
                scope["method"],
                shown(scope["path"]),
                status or "gone",
                seconds,
                told,
            )

    def _check_key(self, scope: Scope) -> None:
        key = self._allowed.api_key
        if not key or scope["path"] in OPEN:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), key.encode()):
            raise ApiError(
                401, "the API key is missing or wrong: send it as Authorization: Bearer KEY", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip


def shown(text: str) -> str:
    """A text in a line of the log, with escapes for what is no plain letter."""
    return ascii(text[:200])[1:-1].replace('"', "\\x22")


async def _answer(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
