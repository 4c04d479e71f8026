"""The bodies of answers, as OpenAI's API has them: whole, and in chunks of a stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from bmgraph.runtime.generation.batching.request import Answer, Piece
from bmgraph.runtime.generation.logprobs import IdScore
from bmgraph.runtime.generation.tokenizer import Tokenizer

Body = dict[str, Any]


def usage(answers: Sequence[Answer], each: int) -> Body:
    """Tokens of prompts, each prompt once, and of answers; of the prompts' those that were not read again."""
    prompts = sum(answer.prompt_tokens for answer in answers[::each])
    cached = sum(answer.cached_tokens for answer in answers[::each])
    new = sum(answer.new_tokens for answer in answers)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": new,
        "total_tokens": prompts + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Reply(ABC):
    """Bodies of the answers to one request."""

    prefix: str
    """What its id begins with."""
    kind: str
    chunk_kind: str
    opening: Body | None = None
    """What the first chunk of an answer holds; None for no such chunk."""

    def __init__(self, model: str, tokenizer: Tokenizer, scored: bool) -> None:
        self.model, self._tokenizer, self._scored = model, tokenizer, scored
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def whole(self, answers: Sequence[Answer], each: int) -> Body:
        """The body of all answers, `each` to a prompt."""
        choices = [
            {
                "index": number,
                **self.content(answer.text),
                "logprobs": self.scores(number, answer.scores or ()) if self._scored else None,
                "finish_reason": answer.finish_reason,
            }
            for number, answer in enumerate(answers)
        ]
        return {**self._head(self.kind), "choices": choices, "usage": usage(answers, each)}

    def chunk(self, number: int, piece: Piece | None = None, reason: str | None = None) -> Body:
        """A chunk with a piece of an answer, or why it ended."""
        text = piece.text if piece is not None else ""
        scores = [piece.score] if piece is not None and piece.score is not None else []
        choice = {
            "index": number,
            **self.part(text, last=reason is not None),
            "logprobs": self.scores(number, scores) if scores else None,
            "finish_reason": reason,
        }
        return {**self._head(self.chunk_kind), "choices": [choice]}

    def first(self, number: int) -> Body | None:
        """The chunk that an answer begins with, if there is one."""
        if self.opening is None:
            return None
        choice = {"index": number, "delta": self.opening, "logprobs": None, "finish_reason": None}
        return {**self._head(self.chunk_kind), "choices": [choice]}

    def last(self, found: Body) -> Body:
        """The chunk that tells the usage."""
        return {**self._head(self.chunk_kind), "choices": [], "usage": found}

    @abstractmethod
    def content(self, text: str) -> Body:
        """A whole text within a choice."""

    @abstractmethod
    def part(self, text: str, last: bool) -> Body:
        """A piece of text within a choice of a chunk."""

    @abstractmethod
    def scores(self, number: int, scores: Sequence[IdScore]) -> Body:
        """Scores of an answer's ids, in the order of the ids; called once for each id."""

    def text_of(self, item: int) -> str:
        """The text of one id."""
        return self._tokenizer.decode([item])

    def _head(self, kind: str) -> Body:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model}


class CompletionReply(Reply):
    """Bodies of `/v1/completions`."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, scored: bool) -> None:
        super().__init__(model, tokenizer, scored)
        self._offsets: dict[int, int] = {}

    def content(self, text: str) -> Body:
        """A whole text within a choice."""
        return {"text": text}

    def part(self, text: str, last: bool) -> Body:
        """A piece of text within a choice of a chunk."""
        return {"text": text}

    def scores(self, number: int, scores: Sequence[IdScore]) -> Body:
        """Scores of an answer's ids, and where their texts begin in it."""
        begin = self._offsets.get(number, 0)
        texts = [self.text_of(score.id) for score in scores]
        offsets = [begin + sum(map(len, texts[:place])) for place in range(len(texts))]
        self._offsets[number] = begin + sum(map(len, texts))
        return {
            "tokens": texts,
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [{self.text_of(item): value for item, value in score.top} for score in scores],
            "text_offset": offsets,
        }


class ChatReply(Reply):
    """Bodies of `/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    opening = {"role": "assistant", "content": ""}

    def content(self, text: str) -> Body:
        """A whole text within a choice."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def part(self, text: str, last: bool) -> Body:
        """A piece of text within a choice of a chunk."""
        return {"delta": {} if last and not text else {"content": text}}

    def scores(self, number: int, scores: Sequence[IdScore]) -> Body:
        """Scores of an answer's ids."""
        return {
            "content": [
                {
                    **self._scored_text(score.id, score.logprob),
                    "top_logprobs": [self._scored_text(item, value) for item, value in score.top],
                }
                for score in scores
            ],
            "refusal": None,
        }

    def _scored_text(self, item: int, logprob: float) -> Body:
        text = self.text_of(item)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
