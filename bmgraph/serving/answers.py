"""Answers that are being made: requests of an engine, awaited in the server's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from bmgraph.runtime.generation.batching.request import CANCELLED, Answer, Piece, Request
from bmgraph.serving.api_error import ApiError, of_exception
from bmgraph.serving.asked import Asked, room_for
from bmgraph.serving.metrics import Metrics
from bmgraph.serving.options import ServeOptions
from bmgraph.serving.served_models import ServedModels


def submitted(asked: Asked, models: ServedModels, allowed: ServeOptions) -> list[Request]:
    """The requests of what was asked, each prompt's answers one after the other; all of them, or none.

    Raises ApiError, and what `submit` raises.
    """
    options = {**models.choice(asked.model), **asked.options, "window": allowed.window, "keep": allowed.keep}
    made = list[Request]()
    prompts = [models.tokenizer.encode(item) if isinstance(item, str) else item for item in asked.prompts]
    rooms = [room_for(asked, prompt, models, allowed) for prompt in prompts]
    try:
        for prompt, room in zip(prompts, rooms):
            for number in range(asked.each):
                made.append(
                    models.engine.submit(
                        prompt, max_new_tokens=room, logprobs=asked.scores, answer=number, **options
                    )
                )
    except BaseException:
        for request in made:
            request.cancel()
        raise
    return made


class Answers:
    """Answers of one request of a client, which `end` ends."""

    def __init__(self, requests: Sequence[Request], seconds: float) -> None:
        self._requests, self._seconds = requests, seconds
        self._event, self._loop = asyncio.Event(), asyncio.get_running_loop()
        self._end = self._loop.time() + seconds
        for request in requests:
            request.listen(self._wake)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | None]]:
        """(number of the answer, piece) as they come; None in the place of a piece when an answer has ended.

        Raises ApiError where an answer ends by an error, or after the server's limit of time.
        """
        going = dict(enumerate(self._requests))
        while going:
            self._event.clear()
            for number, request in list(going.items()):
                ended = request.done  # asked first: no piece comes after the end
                for piece in request.take():
                    yield number, piece
                if ended:
                    self._check(request)
                    del going[number]
                    yield number, None
            if going:
                await self._news()

    async def _news(self) -> None:
        try:
            await asyncio.wait_for(self._event.wait(), max(self._end - self._loop.time(), 0.001))
        except TimeoutError as error:
            raise ApiError(
                408,
                f"the answer took longer than the {self._seconds:g} s that this server allows",
                code="timeout",
            ) from error

    async def whole(self) -> list[Answer]:
        """All answers, when they have ended; raises what `pieces` does."""
        async for _ in self.pieces():
            pass
        return [request.so_far for request in self._requests]

    @property
    def so_far(self) -> list[Answer]:
        """The answers up to now."""
        return [request.so_far for request in self._requests]

    def end(self) -> None:
        """End what still runs."""
        for request in self._requests:
            request.cancel()

    def note(self, metrics: Metrics, model: str) -> None:
        """Count what was read and produced."""
        for request in self._requests:
            found = request.so_far
            metrics.add("prompt_tokens_total", found.prompt_tokens, model=model)
            metrics.add("cached_prompt_tokens_total", found.cached_tokens, model=model)
            metrics.add("new_tokens_total", found.new_tokens, model=model)
            metrics.add("answers_total", reason=found.finish_reason or CANCELLED)
            if request.first is not None:
                metrics.observe("first_token_seconds", request.first - request.submitted)
                if request.ended is not None and found.new_tokens > 1:
                    metrics.observe("token_seconds", (request.ended - request.first) / (found.new_tokens - 1))

    def _check(self, request: Request) -> None:
        if request.error is not None:
            raise of_exception(request.error) from request.error
        if request.finish_reason == CANCELLED:
            raise ApiError(503, "the answer was ended by the server", code="cancelled")

    def _wake(self) -> None:
        """Called in the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._event.set)
