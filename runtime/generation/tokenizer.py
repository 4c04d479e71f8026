"""One interface over tokenizer libraries: encode text to ids, decode ids to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from bmgraph.errors import InputError
from bmgraph.runtime.generation.chat_template import ChatTemplate, Message
from bmgraph.utils.tokenizer_json import library_tokenizer

NO_CHAT = (
    "the engine's tokenizer has no chat template: continue texts with generate, or compile a model that was trained to chat, with "
    "the tokenizer of transformers that has its template"
)


class Tokenizer(Protocol):
    """What generation needs of a tokenizer; `eos_ids` are the ids that end a text."""

    eos_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the special ids that the model expects."""

    def encode_plain(self, text: str) -> list[int]:
        """The ids of a text alone, as far as the tokenizer tells them from special ones."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special ones."""

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation, up to where the assistant begins. Raises InputError without a chat template."""


class CustomTokenizer:
    """Any object with `encode(text)` and `decode(ids)`; it is not saved with an engine."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.eos_ids = _eos_ids(tokenizer)

    def encode(self, text: str) -> list[int]:
        """The ids that the object returns."""
        return [int(item) for item in self._tokenizer.encode(text)]

    def encode_plain(self, text: str) -> list[int]:
        """As `encode`."""
        return self.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text that the object returns."""
        return str(self._tokenizer.decode(ids))

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Raises InputError: such an object has no chat template."""
        raise InputError(NO_CHAT)


class FastTokenizer:
    """A tokenizer of the `tokenizers` library, given as the text of its JSON file.

    Raises BackendError if the library is not installed, BundleError if it cannot read the text.
    """

    def __init__(self, text: str, eos_ids: tuple[int, ...] = (), chat: ChatTemplate | None = None) -> None:
        self._tokenizer = library_tokenizer(text)
        self.text, self.eos_ids, self.chat = text, eos_ids, chat

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the special ids of its template."""
        return list(self._tokenizer.encode(text).ids)

    def encode_plain(self, text: str) -> list[int]:
        """The ids of a text without those of its template."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special ones."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of the template's text, which brings the special tokens itself."""
        if self.chat is None:
            raise InputError(NO_CHAT)
        return list(self._tokenizer.encode(self.chat.render(messages), add_special_tokens=False).ids)


def tokenizer_of(given: object) -> Tokenizer:
    """Wrap a fast tokenizer of transformers, one of `tokenizers`, or any object with encode and decode.

    Raises InputError for anything else.
    """
    backend = getattr(given, "backend_tokenizer", given)
    if hasattr(backend, "to_str") and hasattr(backend, "get_vocab_size"):
        return FastTokenizer(backend.to_str(), _eos_ids(given), ChatTemplate.of(given))
    if hasattr(given, "encode") and hasattr(given, "decode"):
        return CustomTokenizer(given)
    raise InputError(
        f"resource 'tokenizer' is a {type(given).__name__}: give a tokenizer with encode(text) and decode(ids)"
    )


def _eos_ids(tokenizer: Any) -> tuple[int, ...]:
    eos_id = getattr(tokenizer, "eos_token_id", None)
    return () if eos_id is None else (int(eos_id),)
