"""Clients that leave, over real sockets: at any moment, with and without a stream, what they asked for ends."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import uvicorn

from bmgraph.serving.app import Server
from tests.serving.test_app import GREEDY, served

LONGEST = 60.0


@contextmanager
def listening(server: Server) -> Iterator[tuple[str, int]]:
    """Where the server takes requests, in a thread of its own."""
    link = socket.socket()
    link.bind(("127.0.0.1", 0))
    link.listen(64)
    running = uvicorn.Server(uvicorn.Config(server.app, log_config=None, access_log=False, lifespan="off"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [link]})
    thread.start()
    try:
        yield link.getsockname()
    finally:
        running.should_exit = True
        server.close()
        thread.join(LONGEST)
        link.close()
    assert not thread.is_alive()


def until(true: Callable[[], bool]) -> bool:
    """Whether it becomes true within a while."""
    end = time.monotonic() + LONGEST
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


@pytest.mark.parametrize(("stream", "reset"), [(False, True), (True, False)])
def test_a_client_that_leaves_before_its_answer_starts(
    monkeypatch: pytest.MonkeyPatch, stream: bool, reset: bool
) -> None:
    """It has left when the engine gets its request, and the server hears of it only then."""
    submitted, arrived, left = Server._submitted, threading.Event(), threading.Event()

    def late(self: Server, *given: Any) -> Any:
        arrived.set()
        assert left.wait(LONGEST)
        time.sleep(0.1)  # the event loop learns of it
        return submitted(self, *given)

    monkeypatch.setattr(Server, "_submitted", late)
    server = served(limit=None)
    body = json.dumps({**GREEDY, "prompt": "dog", "max_tokens": 10**6, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n"
    with listening(server) as (host, port):
        with socket.create_connection((host, port), LONGEST) as link:
            if reset:
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            link.sendall(head.encode() + body)
            assert arrived.wait(LONGEST)
        left.set()
        engine = server.models.engine
        assert until(lambda: 'reason="cancelled"' in server.metrics.text({}))
        assert until(lambda: engine.scheduler().load.running + engine.scheduler().load.waiting == 0)


def test_a_client_that_leaves_while_the_first_line_is_sent() -> None:
    """The events were not asked for yet."""
    server = served(limit=None)
    body = json.dumps({**GREEDY, "prompt": "dog", "max_tokens": 10**6, "stream": True}).encode()
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": "", "client": ("test", 1),
        "server": ("here", 2), "headers": [(b"content-length", str(len(body)).encode())],
    }  # fmt: skip
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return waiting.pop() if waiting else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        assert message["type"] == "http.response.start"
        await asyncio.sleep(LONGEST)

    asyncio.run(server.app(scope, receive, send))
    assert until(lambda: 'reason="cancelled"' in server.metrics.text({}))
    load = server.models.engine.scheduler
    assert until(lambda: load().load.running + load().load.waiting == 0)
    server.close()


@pytest.mark.slow
def test_clients_that_leave_at_any_moment() -> None:
    server = served(limit=None)
    body = json.dumps({**GREEDY, "prompt": "dog", "max_tokens": 10**6, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n"
    with listening(server) as (host, port):
        for number in range(200):
            with socket.create_connection((host, port), LONGEST) as link:
                link.sendall(head.encode() + body)
                time.sleep(number % 20 / 1000)
        engine = server.models.engine
        assert until(lambda: server.metrics.text({}).count("bmgraph_requests_total{") > 0)
        assert until(lambda: engine.scheduler().load.running + engine.scheduler().load.waiting == 0)
