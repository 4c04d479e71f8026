"""Runs the server: binds its port before the engine is loaded, serves until a signal, and ends in order."""

from __future__ import annotations

import errno
import logging
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bmgraph.errors import BackendError, InputError
from bmgraph.loading import load
from bmgraph.runtime.engine_base import Engine
from bmgraph.runtime.generation.batching.options import Batching
from bmgraph.runtime.generation.generate import GeneratingEngine
from bmgraph.runtime.generation.sliding_window import window_of
from bmgraph.serving.options import ServeOptions
from bmgraph.serving.served_models import ServedModels

GRACE = 30
"""Seconds that answers which run get to end after a signal."""

MOST_CONNECTIONS, BACKLOG = 1000, 2048


def serve(
    bundle: Path,
    allowed: ServeOptions,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str = "",
    deltas: Mapping[str, Path] | None = None,
    batching: Batching | None = None,
    embedding: str = "",
    trust: tuple[str, ...] = (),
    told: Callable[[str], object] = print,
) -> None:
    """Serve a saved engine until SIGTERM or SIGINT; then no more requests are taken, and those that run get half a minute.

    port: 0 for any free one. name: what clients call the engine; by default the name of its folder. deltas: folders by the names that
    clients call them. embedding: the output of an encoder that gives embeddings. told: is called with what is served, and where.

    Raises InputError for a port that is taken and an engine that serves nothing, BackendError where starlette or uvicorn is missing, and
    what `load` raises.
    """
    uvicorn = _uvicorn()
    with _bound(host, port) as listening:
        engine = load(bundle, trust=trust)
        server = made(
            engine,
            name or Path(bundle).resolve().name,
            allowed,
            deltas or {},
            batching,
            embedding,
            str(bundle),
        )
        quiet = _log_to_stderr()
        config = uvicorn.Config(
            server.app, log_config=None, access_log=False, server_header=False, lifespan="off", timeout_graceful_shutdown=GRACE,
            limit_concurrency=MOST_CONNECTIONS, timeout_keep_alive=30,
        )  # fmt: skip
        running = uvicorn.Server(config)

        def end(*_: object) -> None:
            running.should_exit = (
                True  # uvicorn raises the signal again that ended it: then this is all that happens
            )

        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            listening.listen(BACKLOG)  # clients may come from now on, and wait until the loop runs
            where = listening.getsockname()
            shown = f"[{where[0]}]" if ":" in where[0] else where[0]
            told(
                f"serving {', '.join(server.models.names)} at http://{shown}:{where[1]} (API: /v1; Ctrl-C ends it)"
            )
            if server.models.generates and (form := server.models.engine.scheduler().wide_form):
                told(form)
            running.run(sockets=[listening])
        finally:
            server.close()
            logging.disable(quiet)
            for number, handler in before.items():
                signal.signal(number, handler)


def made(
    engine: Any,
    name: str,
    allowed: ServeOptions,
    deltas: Mapping[str, Path],
    batching: Batching | None,
    embedding: str,
    source: str,
) -> Any:
    """The server of an engine. Raises InputError for one that serves nothing."""
    from bmgraph.serving.app import Server
    from bmgraph.serving.embeddings import Embedder

    if not isinstance(engine, Engine):
        raise InputError(
            f"{source} is a program: compile it to an engine first, as with bmgraph compile --generate"
        )
    if not isinstance(engine, GeneratingEngine):
        raise InputError(f"{source} is an engine without texts: compile it with the backend onnx")
    models = ServedModels(engine, name, allowed.deltas_from)
    for delta, folder in deltas.items():
        if delta == name:
            raise InputError(
                f"the engine itself is called {name!r}: give the delta, or with --name the engine, another name"
            )
        put = engine.deltas.swap if delta in engine.deltas else engine.deltas.add
        put(delta, folder)
    if engine.live is not None and name in engine.live:
        raise InputError(
            f"the engine has a delta that is called {name!r}: give the engine another name with --name"
        )
    if batching is not None:
        engine.batching = batching
    if not models.generates:
        return Server(models, allowed, Embedder(engine, models.tokenizer, embedding))
    engine.scheduler()  # what cannot be batched is told now
    decoder: Any = engine.decoder()
    window_of(decoder.cache, bool(decoder.encoder_inputs), allowed.window, allowed.keep)
    return Server(models, allowed)


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens to nobody yet. Raises InputError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        found.close()
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            raise InputError(
                f"port {port} of {host} is in use: give another --port, or 0 for any free one"
            ) from error
        if number == errno.EACCES:
            raise InputError(f"port {port} may not be taken by this user: give one above 1023") from error
        raise InputError(f"{host}:{port} is no address of this machine to serve at ({error})") from error
    return found


def _uvicorn() -> Any:
    try:
        import starlette
        import uvicorn
    except ImportError as error:
        raise BackendError(f'{error.name} is not installed: pip install -e ".[serve]"') from error
    return uvicorn if starlette else None


def _log_to_stderr() -> int:
    """Write the server's log, a line a request, to the error stream; returns up to which level logs were off."""
    before = logging.root.manager.disable
    logging.disable(logging.NOTSET)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("bmgraph.serving", "uvicorn.error"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.INFO if name.startswith("bmgraph") else logging.WARNING)
    return before
