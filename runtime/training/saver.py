"""Runs what writes a checkpoint, in a thread of its own where nobody waits for it: one at a time, errors are kept."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from bmgraph.errors import BmgraphError, BundleError


class Saver:
    """The writer of one trainer on this rank. A process that ends waits for it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BmgraphError | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Run it in a thread; the one before must have ended."""
        assert self._thread is None or not self._thread.is_alive()
        self._thread = threading.Thread(target=self._run, args=(work,), name="bmgraph-save")
        self._thread.start()  # not a daemon: the interpreter waits for it before it ends

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def end(self) -> None:
        """At the end of the process: wait, and print an error that nobody has been told."""
        self.wait()
        if self._error is not None:
            self._print()

    @property
    def error(self) -> BmgraphError | None:
        """Why the last one failed, if it has ended and failed."""
        return self._error

    def forget(self) -> None:
        """Wait, and drop the error."""
        self.wait()
        self._error = None

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BmgraphError as error:
            self._error = error
        except (OSError, RuntimeError, ValueError, MemoryError) as error:
            self._error = BundleError(f"the checkpoint was not saved: {type(error).__name__}: {error}")
        if self._error is not None and not threading.main_thread().is_alive():
            self._print()

    def _print(self) -> None:
        print(f"bmgraph: {self._error}", file=sys.stderr, flush=True)
        self._error = None
