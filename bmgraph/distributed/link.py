"""How this process is linked to the other ranks: a process group of our own, whose timeout can be set, and a watch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from bmgraph.distributed.watch import RAISED, VERDICT, Watch
from bmgraph.errors import RankError

HINT = "start all ranks again, and load the last checkpoint"


class Link:
    """The link of a process to the others, from the first `bg.compile` of a trainer on; `watch` is None where ranks cannot
    reach rank 0 by TCP."""

    def __init__(self, world: dist.ProcessGroup, group: dist.ProcessGroup, watch: Watch | None) -> None:
        self.world, self.watch = world, watch
        self.name = str(group.group_name)
        self.seconds = 0.0
        """How long ranks wait for each other."""
        self.before_end: list[Callable[[], None]] = []
        """Called when this process ends, before the others are told so."""
        self.broken = ""
        """Why ranks have parted; "" while they have not."""
        self._group: dist.ProcessGroup | None = group
        self._ended = False
        self._exchanges = 0

    def set_timeout(self, seconds: float) -> None:
        """Set how long a collective waits for the others."""
        self.seconds = seconds
        if self._group is not None:
            self._group.set_timeout(timedelta(seconds=seconds))

    def next_exchange(self) -> int:
        """The number of the next exchange over the watch; all ranks call it in the same order."""
        self._exchanges += 1
        return self._exchanges

    def check(self) -> None:
        """Raise RankError if a rank has left."""
        if self.watch is not None and not self.broken and (said := self.watch.reason()):
            self._break(said)
        if self.broken:
            raise RankError(self.broken)

    def failed(self, error: RuntimeError, waited: float) -> RankError:
        """What to raise where a collective failed after so many seconds."""
        if not self.broken:
            first = (str(error).splitlines() or [""])[0][:200]
            self._break(
                self.watch.verdict(waited)
                if self.watch is not None
                else f"a rank has left, or does not answer ({first})"
            )
        return RankError(self.broken)

    def raised(self, error: BaseException) -> None:
        """Tell the others what ends this process."""
        if self.watch is not None and not isinstance(error, RankError):
            rank, text = dist_rank(self.world), " ".join(str(error).split())[:500]
            self.watch.tell(RAISED, f"rank {rank} has left: it raised {type(error).__name__}: {text}")
        self._leave()

    def end(self) -> None:
        """This process ends: wait for what is still being written, then tell the others."""
        if self._ended:
            return
        self._ended = True
        for wait in self.before_end:
            wait()
        if self.watch is not None:
            self.watch.close()

    def _break(self, reason: str) -> None:
        self.broken = f"{reason}; {HINT}"
        if self.watch is not None:
            self.watch.tell(VERDICT, reason)
        self._leave()

    def _leave(self) -> None:
        """Close our group, so that ranks which wait in it fail now instead of after the timeout."""
        group, self._group = self._group, None
        if group is not None and dist.is_initialized() and dist.group.WORLD is self.world:
            dist.destroy_process_group(group)


def dist_rank(world: dist.ProcessGroup) -> int:
    """This process's rank in a group."""
    return int(world.rank())


_links: list[Link] = []


def keep(link: Link) -> None:
    """Make this the link of the process; torch.distributed has one world in a process, and so one link."""
    _links[:] = [link]


def current() -> Link | None:
    """The link of the process, None if there is none to the present group of torch.distributed."""
    found = _links[0] if _links else None
    return found if found is not None and dist.is_initialized() and dist.group.WORLD is found.world else None


@contextmanager
def collective_call() -> Iterator[None]:
    """Around a collective, or the wait for one: where it fails because of another rank, it raises RankError with the reason.

    Nothing but the collective may stand in it: it takes every RuntimeError (save for want of memory) for another rank's.
    """
    link = current()
    if link is not None and (link.broken or (link.watch is not None and link.watch.reason())):
        link.check()
    begin = time.monotonic()
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if link is not None:
            raise link.failed(error, time.monotonic() - begin) from error
        first = (str(error).splitlines() or [""])[0][:200]
        raise RankError(
            f"a rank has left, or does not answer within the group's timeout; what it wrote last says why ({first})"
        ) from error
