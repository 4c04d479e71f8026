"""A conversation on the command line with a saved engine."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bmgraph.cli.console import CleanConsole
from bmgraph.errors import InputError
from bmgraph.runtime.generation.call_options import NEW_TOKENS
from bmgraph.runtime.generation.generate import GeneratingEngine
from bmgraph.runtime.generation.sliding_window import window_of
from bmgraph.runtime.generation.tokenizer import NO_CHAT


class Conversation:
    """What was said to a saved engine and what it answered; the oldest turns go where they no longer fit its positions.

    With `window` in the options an answer goes on beyond them; then what stands in front of the first question stays, if `keep` does not
    say.
    """

    def __init__(self, engine: GeneratingEngine, system: str, options: Mapping[str, Any]) -> None:
        """Raises InputError for an engine without a chat template."""
        self._engine, self._options = engine, dict(options)
        self._first = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []
        if engine.tokenizer is None:
            raise InputError(NO_CHAT)
        self._tokenizer = engine.tokenizer
        front = self._front()
        decoder = engine.decoder()
        self._window = None if decoder is None else window_of(
            decoder.cache, bool(decoder.encoder_inputs), options.get("window"), options.get("keep", 0)
        )  # fmt: skip
        if self._window is not None and not self._window.keep:
            self._options["keep"] = min(front, self._window.size // 2)
        self.dropped = 0
        """How many messages were forgotten before the last answer."""

    def answer(self, text: str) -> Any:
        """An iterator over the pieces of the answer to a text, which is kept when the iterator ends or is closed."""
        self._turns.append({"role": "user", "content": text})
        self.dropped = self._forget()
        pieces: list[str] = []
        try:
            for piece in self._engine.chat([*self._first, *self._turns], stream=True, **self._options):
                pieces.append(piece)
                yield piece
        finally:
            self._turns.append({"role": "assistant", "content": "".join(pieces)})

    def _front(self) -> int:
        """How many tokens stand in front of what is asked first."""
        begins = (
            self._tokenizer.encode_chat([*self._first, {"role": "user", "content": text}])
            for text in ("", "1")
        )
        pairs = enumerate(zip(*begins))
        return next((place for place, (one, other) in pairs if one != other), 0)

    def _forget(self) -> int:
        """Drop the oldest question with its answer as often as the rest is too long; returns how many messages went."""
        decoder, dropped = self._engine.decoder(), 0
        limit = None if decoder is None else decoder.cache.limit
        wanted = self._options.get("max_new_tokens") or NEW_TOKENS
        if self._window is not None:
            limit, wanted = self._window.size, min(wanted, self._window.size // 2)
        if limit is None:
            return 0
        while len(self._turns) > 1:
            if len(self._tokenizer.encode_chat([*self._first, *self._turns])) + wanted <= limit:
                break
            del self._turns[:2]
            dropped += 2
        return dropped


def chat(bundle: Path, system: str, options: Mapping[str, Any], console: CleanConsole) -> None:
    """Read lines from the terminal or a pipe, and print what the engine answers to each, until there are no more lines.

    Ctrl-C ends an answer; at a question it ends the conversation. Raises InputError for another bundle.
    """
    from bmgraph.loading import load

    engine = load(bundle)
    if not isinstance(engine, GeneratingEngine) or engine.decoder() is None:
        raise InputError(
            f"{bundle} does not generate: compile the model with --generate and the backend onnx"
        )
    conversation = Conversation(engine, system, options)
    if sys.stdin.isatty():
        console.print("Type a line; end with Ctrl-D.")
    while (text := _line(console)) is not None:
        if not text.strip():
            continue
        answer = conversation.answer(text)
        try:
            for piece in answer:
                console.print(piece, end="", soft_wrap=True)
        except KeyboardInterrupt:
            answer.close()
        console.print()
        if conversation.dropped:
            console.print(f"note: the first {conversation.dropped} messages no longer fit, and were dropped")


def _line(console: CleanConsole) -> str | None:
    """The next line; None at the end."""
    if sys.stdin.isatty():
        console.print("> ", end="")
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        return None
    return line.rstrip("\n") if line else None
