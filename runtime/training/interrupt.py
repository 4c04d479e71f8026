"""Ctrl-C and termination while a loop runs: the step that runs is completed, and the loop asked to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO_SECONDS = 1.0
"""A second signal within so many seconds is the same one, that a launcher passes on."""


class Interrupts:
    """Within it, a first signal is noted in `asked`; a second one stops at once.

    A signal that the process ignores stays ignored. Only the main thread gets signals.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        """The signal that asks to stop."""
        self._time = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            listened = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in listened}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked, self._time = number, time.monotonic()
        elif time.monotonic() - self._time > ECHO_SECONDS:
            self.__exit__()
            os.kill(os.getpid(), number)


def stop_now(number: int) -> None:
    """End as an interrupted program ends: raises KeyboardInterrupt for Ctrl-C, SystemExit for termination."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
