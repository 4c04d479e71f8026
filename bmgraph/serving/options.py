"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServeOptions:
    """Limits and access of a server.

    api_key: what clients must send as bearer; "" for none. longest_body: bytes of a request. most_tokens: new tokens of an answer; None
    for as many as the model has positions for. most_answers: prompts of a request times answers to each. seconds: until a request
    is ended. deltas_from: the folder from which clients may add deltas by name; None: they may not add or remove any. window, keep: as of
    `engine.generate`; where there is a window, no prompt is too long, and answers go on beyond the positions of the model.
    """

    api_key: str = ""
    longest_body: int = 2**20
    most_tokens: int | None = None
    most_answers: int = 64
    seconds: float = 600.0
    body_seconds: float = 30.0
    deltas_from: str | None = None
    window: int | bool | None = None
    keep: int = 0
