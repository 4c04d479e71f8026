"""Links the ranks at the start of a trainer: a process group with a timeout of its own, and the connections of a `Watch`."""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import sys
import time
from datetime import timedelta
from multiprocessing.util import Finalize
from types import TracebackType

import torch.distributed as dist

from bmgraph.distributed.link import Link, current, keep
from bmgraph.distributed.process_group import Ranks
from bmgraph.distributed.watch import Watch

BUILDING = 10
"""While a trainer is built, in its first step, and while files are written, ranks wait so many times longer."""
CONNECTING = 10.0
"""Seconds in which all ranks must reach rank 0."""
_HELLO = 3.0


def connect(timeout: float) -> Ranks:
    """The ranks of this process, linked if there are several; collective. `timeout`: seconds to wait for each other in a step.

    Raises RankError if a rank has left.
    """
    ranks, link = Ranks.here(), current()
    if ranks.size == 1:
        return ranks
    if link is None:
        world = dist.group.WORLD
        assert world is not None
        link = Link(world, dist.new_group(timeout=timedelta(seconds=BUILDING * timeout)), None)
        keep(link)
        link.set_timeout(BUILDING * timeout)
        peers = _peers(ranks)
        link.watch = None if peers is None else Watch(ranks.rank, ranks.size, peers)
        Finalize(None, link.end, exitpriority=10)  # at the end of a process of multiprocessing, too
        _tell_what_is_raised(link)
    link.set_timeout(BUILDING * timeout)
    link.check()
    return ranks


def _peers(ranks: Ranks) -> dict[int, socket.socket] | None:
    """The connections that a watch serves; None, on all ranks, if one of them cannot reach rank 0."""
    server: socket.socket | None = None
    told = ""
    with ranks.on_rank0() as first:
        if first:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            server = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=ranks.size)
            tokens = secrets.token_hex(32), secrets.token_hex(32)
            told = json.dumps([server.getsockname()[1], *tokens, socket.gethostname(), _addresses()])
    told = ranks.broadcast_text(told)
    port, mine, theirs, host, addresses = json.loads(told)
    if server is not None:
        peers = _accepted(server, ranks.size, mine, theirs)
        server.close()
    else:
        near = ["127.0.0.1"] if host == socket.gethostname() else []
        found = _reached([*near, *addresses], port, mine, theirs, ranks.rank)
        peers = {} if found is None else {0: found}
    complete = len(peers) == (1 if ranks.rank else ranks.size - 1)
    if all(ranks.gather_texts("yes" if complete else "no")[rank] == "yes" for rank in range(ranks.size)):
        return peers
    for peer in peers.values():
        peer.close()
    return None


def _addresses() -> list[str]:
    """The names and addresses under which other hosts may reach this one."""
    name = socket.gethostname()
    found = [os.environ.get("MASTER_ADDR", ""), name]
    with contextlib.suppress(OSError):
        found += [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    return [address for address in dict.fromkeys(found) if address]


def _accepted(server: socket.socket, size: int, mine: str, theirs: str) -> dict[int, socket.socket]:
    """On rank 0: the connections of the others, who know the token."""
    latest = time.monotonic() + CONNECTING
    found: dict[int, socket.socket] = {}
    while len(found) < size - 1 and (left := latest - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            peer, _ = server.accept()
        except OSError:
            break
        rank = _greeted(peer, theirs)
        if rank is None or not 0 < rank < size or rank in found:
            peer.close()
            continue
        peer.sendall(mine.encode())
        found[rank] = peer
    return found


def _greeted(peer: socket.socket, theirs: str) -> int | None:
    """The rank that a connection says it is; None if it does not know the token."""
    peer.settimeout(_HELLO)
    try:
        text = _exactly(peer, len(theirs) + 8)
        return int(text[len(theirs) :]) if hmac.compare_digest(text[: len(theirs)], theirs) else None
    except (OSError, ValueError):
        return None


def _reached(addresses: list[str], port: int, mine: str, theirs: str, rank: int) -> socket.socket | None:
    """A connection to rank 0, which knows its token."""
    latest = time.monotonic() + CONNECTING
    for address in addresses:
        left = min(_HELLO, latest - time.monotonic())
        if left <= 0:
            break
        with contextlib.suppress(OSError, ValueError):
            peer = socket.create_connection((address, port), left)
            peer.sendall(f"{theirs}{rank:8d}".encode())
            if hmac.compare_digest(_exactly(peer, len(mine)), mine):
                return peer
            peer.close()
    return None


def _exactly(peer: socket.socket, size: int) -> str:
    data = b""
    while len(data) < size:
        more = peer.recv(size - len(data))
        if not more:
            raise OSError("closed")
        data += more
    return data.decode("ascii")


def _tell_what_is_raised(link: Link) -> None:
    """Let the others know of an exception that ends this process."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        link.raised(error)
        before(kind, error, trace)

    sys.excepthook = hook
