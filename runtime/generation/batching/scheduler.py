"""Decides which requests run: a queue, one prompt that is read in chunks, and the batch of those that decode.

A round reads some tokens of prompts and then makes one step of the batch. One thread an engine makes rounds while there is work; it
begins with the first request and ends with the engine.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bmgraph.errors import BackendError, BusyError, InputError
from bmgraph.runtime.generation.batching.batch import Batch
from bmgraph.runtime.generation.batching.encoded_prompt import EncodedPrompt
from bmgraph.runtime.generation.batching.joining import JoiningDecoder
from bmgraph.runtime.generation.batching.memories_check import check_memories
from bmgraph.runtime.generation.batching.options import Batching
from bmgraph.runtime.generation.batching.prefill import Prefill
from bmgraph.runtime.generation.batching.prefixes import Prefixes
from bmgraph.runtime.generation.batching.request import CANCELLED, ERROR, Request

LONGEST_STOP = 60.0
"""Seconds that `stop` waits for the step that runs."""

STOPPED = "the engine was stopped before the answer ended"


@dataclass(frozen=True)
class Load:
    """How much an engine has to do: requests that run and that wait, the positions of its cache that hold their tokens, and those that
    are kept for prompts to come."""

    running: int
    waiting: int
    positions: int
    kept: int = 0


class Scheduler:
    """Runs requests on a decoder. `submit` and `stop` may be called by any thread, `round` by one at a time."""

    def __init__(self, decoder: JoiningDecoder, options: Batching) -> None:
        """Raises InputError for an encoder-decoder whose rows are seen not to join."""
        self._decoder = decoder = decoder.for_batching(options.wide)
        self._position = decoder.cache.bytes_of_position
        if decoder.encoder_inputs:  # each prompt has outputs of its own
            check_memories(decoder)
            options = replace(options, prefix_bytes=0)
        self.options = options
        positions, kept = options.positions(self._position)
        self._prefixes = Prefixes(kept)
        self._batch = Batch(decoder, options.rows, positions, self._prefixes)
        self._prefill: Prefill | EncodedPrompt | None = None
        self._queue: deque[Request] = deque()
        self._changed = threading.Condition()
        self._cancelled = self._stopped = False
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    @property
    def is_foreign(self) -> bool:
        """Whether it was made by a process that this one was forked from, and so has no thread here."""
        return os.getpid() != self._process

    @property
    def stopped(self) -> bool:
        """Whether it takes no more requests."""
        return self._stopped

    @property
    def wide_form(self) -> str:
        """What steps of many tokens run on; empty where all steps run alike."""
        form = self._decoder.wide_form
        return "" if form is None else str(form)

    @property
    def load(self) -> Load:
        """What there is to do now."""
        with self._changed:
            waiting, prefill = len(self._queue), self._prefill
        if prefill is not None and not prefill.request.done:
            waiting += 1
        running = sum(not request.done for request in self._batch.requests)
        return Load(running, waiting, self._batch.held_positions, self._prefixes.held)

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn.

        Raises BusyError if as many wait as may, InputError for one that needs more cache than there is, BackendError once stopped.
        """
        if not self._batch.could_hold(request):
            needed = self._batch.needed(request) * self._position
            outputs = f" and {len(request.prompt)} of its encoder" if self._decoder.encoder_inputs else ""
            raise InputError(
                f"the request may come to {request.most} positions{outputs}, which take {_megabytes(needed)} of cache with those that are read "
                f"beside, and there are {_megabytes(self.options.positions(self._position)[0] * self._position)}: ask for fewer tokens, or "
                "give Batching(cache_bytes=...) more"
            )
        request.on_cancel(self._wake)
        with self._changed:
            if self._stopped:
                raise BackendError(STOPPED)
            if len(self._queue) >= self.options.waiting:
                raise BusyError(
                    f"{len(self._queue)} requests wait for this engine, as many as may: try again later, or allow more by "
                    "Batching(waiting=...)"
                )
            self._queue.append(request)
            self._changed.notify_all()

    def start(self) -> None:
        """Make rounds in a thread of its own, until `stop`."""
        self._thread = threading.Thread(target=self._run, name="bmgraph-batching", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the requests that are there with an error, and the thread. Does nothing in a process that was forked."""
        if self.is_foreign:
            return
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread is None:
            self._end_all(BackendError(STOPPED))
        elif self._thread is not threading.current_thread():
            self._thread.join(LONGEST_STOP)

    def round(self) -> bool:
        """Read some of the prompts that come next, and make one step of the requests that run; returns whether there is more to do."""
        self._drop_cancelled()
        budget = self.options.prefill
        while budget > 0 and self._next() and self._is_worth(budget):
            budget -= self._read(budget)
        if self._batch.requests:
            try:
                self._batch.step()
            except Exception as error:
                self._end_running(error)
            self._read_again(self._batch.outgrown)
            self._batch.outgrown = []
        return self._busy()

    def _run(self) -> None:
        error: BaseException = BackendError(STOPPED)
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or self._busy())
                    if self._stopped:
                        break
                self.round()
        except BaseException as found:
            error = found
        self._end_all(error)

    def _busy(self) -> bool:
        return bool(self._queue or self._prefill is not None or self._batch.requests)

    def _wake(self) -> None:
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    def _next(self) -> bool:
        """Whether there is a prompt to read; the first request that waits is taken if there is a place for it."""
        if self._prefill is not None:
            return True
        with self._changed:
            if not self._queue or not self._batch.has_room(self._queue[0]):
                return False
            request = self._queue.popleft()
        try:
            if self._decoder.encoder_inputs:
                self._prefill = EncodedPrompt(self._decoder, request)
            else:
                self._prefill = Prefill(self._decoder, request, *self._prefixes.find(request))
        except Exception as error:
            request.finish(ERROR, error)
            return self._next()
        return True

    def _is_worth(self, budget: int) -> bool:
        """Whether to read on in this round: a prompt that one round reads whole is not cut for what another one left of it, since each
        piece reads all weights."""
        assert self._prefill is not None
        left, most = self._prefill.left, self.options.prefill
        return left <= budget or budget == most or left > most

    def _read(self, budget: int) -> int:
        """Read some of the prompt at hand, which may then join the batch; returns how many tokens."""
        prefill = self._prefill
        assert prefill is not None
        count = min(budget, prefill.left)
        try:
            logits = prefill.step(count)
            if not prefill.left:
                prefill.request.accept(logits)
                if not prefill.again:
                    self._prefixes.keep_prompt(prefill.request, prefill.ids, prefill.state, logits)
        except Exception as error:
            prefill.request.finish(ERROR, error)
        if prefill.request.done:
            self._prefill = None
        elif not prefill.left and prefill.request.outgrown:
            self._prefill = None
            self._read_again([prefill.request])
        elif not prefill.left:
            self._prefill = None
            try:
                self._batch.join(prefill.request, prefill.state, prefill.read)
            except Exception as error:  # of memory: the state may hold a part of the row
                prefill.request.finish(ERROR, error)
                self._end_running(error)
        return count

    def _read_again(self, requests: Sequence[Request]) -> None:
        """Let requests that outgrew their window come next, with what stays of their texts."""
        for request in requests:
            request.slide()
        with self._changed:
            self._queue.extendleft(reversed(requests))

    def _drop_cancelled(self) -> None:
        with self._changed:
            if not self._cancelled:
                return
            self._cancelled = False
            gone = [request for request in self._queue if request.cancelled]
            self._queue = deque(request for request in self._queue if not request.cancelled)
        gone += [request for request in self._batch.requests if request.cancelled]
        if self._prefill is not None and self._prefill.request.cancelled:
            gone.append(self._prefill.request)
            self._prefill = None
        for request in gone:
            request.finish(CANCELLED)
        self._batch.drop_ended()

    def _end_running(self, error: BaseException) -> None:
        for request in self._batch.requests:
            request.finish(ERROR, error)
        self._batch.clear()

    def _end_all(self, error: BaseException) -> None:
        with self._changed:
            self._stopped = True
            waiting, self._queue = list(self._queue), deque()
        if self._prefill is not None:
            waiting.append(self._prefill.request)
            self._prefill = None
        for request in waiting:
            request.finish(CANCELLED if request.cancelled else ERROR, None if request.cancelled else error)
        self._end_running(error)
        self._prefixes.clear()


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
