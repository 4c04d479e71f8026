"""Calls an ASGI app in this process, one request at a time, without a socket."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reply:
    """What an app answered: a status, headers, and the body in the parts in which it came."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    parts: list[bytes] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The body as text."""
        return b"".join(self.parts).decode()

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        """The error that the body tells."""
        found = self.json
        assert set(found) == {"error"}
        assert set(found["error"]) == {"message", "type", "param", "code"}
        return dict(found["error"])

    @property
    def events(self) -> list[Any]:
        """The events of a stream; the last one, [DONE], as a text."""
        items = [item.removeprefix("data: ") for item in self.text.split("\n\n") if item]
        return [item if item == "[DONE]" else json.loads(item) for item in items]


def call(app: Any, method: str, path: str, *given: Any, **options: Any) -> Reply:
    """As `acall`, in a loop of its own."""
    return asyncio.run(acall(app, method, path, *given, **options))


async def acall(
    app: Any,
    method: str,
    path: str,
    body: object = None,
    headers: dict[str, str] | None = None,
    leave_after: int | None = None,
) -> Reply:
    """The answer to one request; `body` is sent as JSON if it is no bytes. The client leaves after `leave_after` parts of the answer."""
    sent = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    given = {"content-length": str(len(sent)), **(headers or {})}
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http", "client": ("test", 1), "server": ("here", 2),
        "headers": [(name.lower().encode(), value.encode()) for name, value in given.items()],
    }  # fmt: skip
    found, waiting, left = (
        Reply(),
        [{"type": "http.request", "body": sent, "more_body": False}],
        asyncio.Event(),
    )
    if leave_after == 0:
        left.set()

    async def receive() -> Any:
        if waiting:
            return waiting.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            found.status = message["status"]
            found.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif message.get("body"):
            found.parts.append(message["body"])
            if leave_after is not None and len(found.parts) >= leave_after:
                left.set()

    await app(scope, receive, send)
    return found
