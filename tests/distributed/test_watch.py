"""What ranks tell each other beside collectives, over sockets within one process."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from bmgraph.distributed import watch as module
from bmgraph.distributed.watch import RAISED, Watch


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Watch]]:
    """The watches of three ranks."""
    monkeypatch.setattr(module, "BEAT", 0.02)
    monkeypatch.setattr(module, "SILENT", 0.3)
    monkeypatch.setattr(module, "NEWS", 0.1)
    pairs = [socket.socketpair() for _ in range(2)]
    found = [Watch(0, 3, {rank + 1: pair[0] for rank, pair in enumerate(pairs)})]
    found += [Watch(rank + 1, 3, {0: pair[1]}) for rank, pair in enumerate(pairs)]
    yield found
    for one in reversed(found):
        one.close()


def until(found: Callable[[], bool]) -> None:
    """Wait, as long as a busy machine may need, for what must come true."""
    latest = time.monotonic() + 60
    while not found():
        assert time.monotonic() < latest
        time.sleep(0.01)


def told(watch: Watch) -> str:
    until(lambda: bool(watch.reason()))
    return watch.reason()


def test_all_hear_what_a_rank_raises_and_not_what_follows(watches: list[Watch]) -> None:
    watches[1].tell(RAISED, "rank 1 has left: it raised ValueError: row 17")
    watches[1].close()
    for other in (watches[0], watches[2]):
        assert told(other) == "rank 1 has left: it raised ValueError: row 17"
        assert other.verdict(1.0) == told(other)
    assert not watches[1].reason()


def test_a_process_that_ends_without_a_word_is_named(watches: list[Watch]) -> None:
    watches[2]._peers[0].shutdown(socket.SHUT_RDWR)
    assert told(watches[1]).startswith("rank 2 has left: its process ended without a word")


def test_where_nobody_left_the_silent_rank_is_named_or_where_all_are(watches: list[Watch]) -> None:
    for watch in watches:
        watch.at("step, after 3 steps")
    watches[1].at("its own code outside of the trainer, after 3 steps")
    alive = re.compile(r"rank 1 lives, and is since \d+ s at: its own code outside")
    until(lambda: all(alive.search(watches[rank].verdict(2.0)) for rank in (0, 2)))
    watches[1]._closed = True  # its thread ends, as if the process was stopped: the connection stays
    until(
        lambda: all("rank 1 has shown no sign of life for" in watches[rank].verdict(2.0) for rank in (0, 2))
    )


def test_texts_are_exchanged_unless_a_rank_leaves(watches: list[Watch]) -> None:
    found: dict[int, list[str]] = {}

    def exchange(rank: int) -> None:
        found[rank] = watches[rank].exchange("one", f"of {rank}", 60, 60)

    threads = [threading.Thread(target=exchange, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[rank] == ["of 0", "of 1", "of 2"] for rank in range(3))
    threading.Timer(0.1, watches[2].close).start()
    with pytest.raises(TimeoutError, match="rank 2 has ended, in order"):
        watches[1].exchange("two", "", 60, 60)
    with pytest.raises(TimeoutError, match="rank 2 has ended, in order"):
        watches[0].exchange("two", "", 60, 60)
