"""What ranks tell each other beside their collectives: that they live, where they are, why they leave.

Every rank keeps a connection to rank 0, which passes on what it hears. A process that ends closes its connection, so the
others know at once, whatever ended it; one that is stopped no longer sends its beats. Collectives alone tell neither.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

BEAT = 0.5
"""Seconds between two signs of life."""
SILENT = 6 * BEAT
"""Seconds without one, after which a rank is said to be silent."""
NEWS = 3.0
"""Seconds to wait for news of why a collective failed."""
_SEND = 2.0
"""Seconds that sending may take; a peer that takes nothing for so long is left out from then on."""
_LONGEST = 16 * 2**20
"""Bytes of a message."""

RAISED, GONE, ENDED, VERDICT = "raised", "gone", "ended", "verdict"
"""What is told of a rank, the most telling first: what it raised; that its process ended without a word; that it ended in
order; what it found to be the reason when a collective failed."""
_KINDS = (RAISED, GONE, ENDED, VERDICT)


class Watch:
    """The connections of one rank, and the thread that serves them: `peers` are all others on rank 0, elsewhere rank 0."""

    def __init__(self, rank: int, size: int, peers: Mapping[int, socket.socket]) -> None:
        self._rank, self._size, self._peers = rank, size, dict(peers)
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._news: dict[int, tuple[str, str]] = {}
        self._seen = dict.fromkeys(peers, time.monotonic())
        self._places: dict[int, tuple[str, float]] = {}
        self._here = ("building", time.monotonic())
        self._table: list[Any] | None = None
        self._mail: dict[str, dict[int, str]] = {}
        self._complete: dict[str, list[str]] = {}
        self._closed = False
        for peer in self._peers.values():
            peer.settimeout(_SEND)
        os.register_at_fork(after_in_child=self._drop)  # a forked worker must not keep connections open
        self._thread = threading.Thread(target=self._serve, name="bmgraph-watch", daemon=True)
        self._thread.start()

    def at(self, place: str) -> None:
        """Say where this rank is, for the errors of others."""
        self._here = place, time.monotonic()

    def tell(self, kind: str, text: str) -> None:
        """Tell all ranks something of this one; the first is kept."""
        with self._changed:
            if self._closed or self._rank in self._news:
                return
            self._news[self._rank] = kind, text
        self._send_all(["news", self._rank, kind, text])

    def reason(self) -> str:
        """Why another rank has left, "" if none has."""
        with self._changed:
            found = [
                (_KINDS.index(kind), rank, text)
                for rank, (kind, text) in self._news.items()
                if rank != self._rank
            ]
        return min(found)[2] if found else ""

    def verdict(self, seconds: float) -> str:
        """Why a collective failed for which this rank waited so many seconds; waits for news at most `NEWS` seconds."""
        begin = time.monotonic()
        silent: list[tuple[int, float]] = []
        while not (said := self.reason()) and time.monotonic() < begin + NEWS and not silent:
            with self._changed:
                self._changed.wait(BEAT / 10)
            silent = self.silent() if time.monotonic() > begin + 2 * BEAT else []
        if said:
            return said
        if silent:
            rank, age = silent[0]
            return (
                f"rank {rank} has shown no sign of life for {age:.0f} s: it was stopped, or is cut off from the network; it was "
                f"last at: {self._place(rank)[0]}"
            )
        others = [(rank, *self._place(rank)) for rank in range(self._size) if rank != self._rank]
        away = [item for item in others if item[1] != self._here[0]] or others
        told = "; ".join(
            f"rank {rank} lives, and is since {age:.0f} s at: {place}" for rank, place, age in away[:3]
        )
        return f"this rank waited for {seconds:.0f} s in vain, at: {self._here[0]}; {told}"

    def silent(self) -> list[tuple[int, float]]:
        """The ranks without a sign of life for `SILENT` seconds, and for how many; without rank 0 none else is known."""
        if self._rank and self._ask():
            table = self._table or []
            ages = {rank: float(entry[0]) for rank, entry in enumerate(table) if rank not in (0, self._rank)}
        else:
            with self._changed:
                ages = {rank: time.monotonic() - seen for rank, seen in self._seen.items()}
        return [(rank, age) for rank, age in sorted(ages.items()) if age >= SILENT]

    def exchange(self, key: str, text: str, seconds: float, longest: float) -> list[str]:
        """All-gather of texts, by a key that is used once; may be called from any thread, beside collectives.

        Raises TimeoutError, with the reason, once a rank has left, one is silent for so many `seconds`, or after the `longest` time.
        """
        self._send_mail(key, text)
        begin = time.monotonic()
        while True:
            with self._changed:
                if key in self._complete:
                    return self._complete.pop(key)
                self._changed.wait(BEAT / 5)
            if said := self.reason():
                with self._changed:
                    if key in self._complete:
                        return self._complete.pop(key)
                raise TimeoutError(said)
            waited = time.monotonic() - begin
            if waited > longest or (waited > seconds and any(age > seconds for _, age in self.silent())):
                raise TimeoutError(self.verdict(waited))

    def close(self, kind: str = ENDED, text: str = "") -> None:
        """Tell the others that this rank ends in order, and end."""
        self.tell(kind, text or f"rank {self._rank} has ended, in order, where others went on")
        with self._changed:
            self._closed = True
        self._drop()

    def _drop(self) -> None:
        self._closed = True
        for peer in self._peers.values():
            peer.close()

    def _place(self, rank: int) -> tuple[str, float]:
        """Where a rank was last, and since how many seconds."""
        if self._rank and rank and self._table:
            _, place, age = self._table[rank]
            return str(place), float(age)
        place, since = self._places.get(rank, ("its start", time.monotonic()))
        return place, time.monotonic() - since

    def _ask(self) -> bool:
        """Ask rank 0 for what it knows of all; whether it answered."""
        self._table = None
        self._send(0, ["ask"])
        latest = time.monotonic() + 4 * BEAT
        with self._changed:
            while self._table is None and time.monotonic() < latest and not self._closed:
                self._changed.wait(BEAT / 10)
        return self._table is not None

    def _send_all(self, message: list[Any], besides: int = -1) -> None:
        for rank in tuple(self._peers):
            if rank != besides:
                self._send(rank, message)

    def _send(self, rank: int, message: list[Any]) -> None:
        """Send a message; what cannot be sent is dropped, since its reader has left or will be found silent."""
        data = json.dumps(message).encode() + b"\n"
        with self._sending, contextlib.suppress(OSError):
            self._peers[rank].sendall(data)

    def _send_mail(self, key: str, text: str) -> None:
        if self._rank:
            self._send(0, ["mail", key, text])
        else:
            self._collect(0, key, text)

    def _collect(self, rank: int, key: str, text: str) -> None:
        """On rank 0: keep a text of an exchange, and pass all of them on with the last one."""
        with self._changed:
            found = self._mail.setdefault(key, {})
            found[rank] = text
            if len(found) < self._size:
                return
            del self._mail[key]
            texts = self._complete[key] = [found[other] for other in range(self._size)]
            self._changed.notify_all()
        self._send_all(["all", key, texts])

    def _serve(self) -> None:
        """The thread: reads what comes, and sends a beat now and then."""
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            rest = dict.fromkeys(self._peers, b"")
            due = 0.0
            while not self._closed:
                if time.monotonic() >= due:
                    place, since = self._here
                    self._send_all(["beat", place, time.monotonic() - since])
                    due = time.monotonic() + BEAT
                for key, _ in selector.select(BEAT / 2):
                    data = self._received(key.data)
                    if data:
                        *lines, rest[key.data] = (rest[key.data] + data).split(b"\n")
                        for line in lines:
                            self._take(key.data, line)
                    if not data or len(rest[key.data]) > _LONGEST:
                        selector.unregister(key.fileobj)
                        self._lost(key.data)

    def _received(self, rank: int) -> bytes:
        try:
            return self._peers[rank].recv(2**16)
        except (OSError, ValueError):
            return b""

    def _lost(self, rank: int) -> None:
        """A connection has ended: so has the process, unless it said something else before."""
        if self._closed:
            return
        self._hear(
            rank,
            GONE,
            f"rank {rank} has left: its process ended without a word (killed, or a crash); what it wrote last may say why",
        )

    def _hear(self, rank: int, kind: str, text: str) -> None:
        with self._changed:
            if rank in self._news:
                return
            self._news[rank] = kind, text
            self._changed.notify_all()
        if not self._rank:
            self._send_all(["news", rank, kind, text], besides=rank)

    def _take(self, rank: int, line: bytes) -> None:
        """Take in one message of a peer, which knows the token; one that is not valid is of no peer of ours, and ignored."""
        with contextlib.suppress(ValueError, TypeError, KeyError, IndexError):
            kind, *rest = json.loads(line)
            now = time.monotonic()
            with self._changed:
                self._seen[rank] = now
                if kind == "beat":
                    self._places[rank] = str(rest[0]), now - float(rest[1])
                elif kind == "told":
                    self._table = list(rest[0])
                elif kind == "all":
                    self._complete[str(rest[0])] = [str(text) for text in rest[1]]
                self._changed.notify_all()
            if kind == "news" and rest[1] in _KINDS:
                self._hear(int(rest[0]), str(rest[1]), str(rest[2]))
            elif kind == "mail":
                self._collect(rank, str(rest[0]), str(rest[1]))
            elif kind == "ask":
                self._send(rank, ["told", self._known(now)])

    def _known(self, now: float) -> list[Any]:
        """Of every rank: seconds since its last sign of life, where it was, and since how many seconds."""
        table: list[Any] = [[0.0, self._here[0], now - self._here[1]]]
        for other in range(1, self._size):
            place, since = self._places.get(other, ("its start", now))
            table.append([now - self._seen.get(other, now), place, now - since])
        return table
