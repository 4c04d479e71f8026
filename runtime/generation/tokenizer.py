"""Text to ids and back."""

from __future__ import annotations

from typing import Any, Protocol

from bmgraph.errors import BackendError, BundleError, InputError


class Tokenizer(Protocol):
    """What generation asks of a tokenizer: `ends` are the ids that end a text."""

    ends: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with what the model expects around it."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special ones left out."""


class Given:
    """A tokenizer object of the user's own, with `encode(text)` and `decode(ids)`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.ends = _ends(tokenizer)

    def encode(self, text: str) -> list[int]:
        """The ids that it gives."""
        return [int(item) for item in self._tokenizer.encode(text)]

    def decode(self, ids: list[int]) -> str:
        """The text that it gives."""
        return str(self._tokenizer.decode(ids))


class Fast:
    """A tokenizer of the `tokenizers` library, which saves to one JSON file."""

    def __init__(self, text: str, ends: tuple[int, ...] = ()) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise BackendError('texts need tokenizers: pip install -e ".[hf]"') from error
        try:
            self._tokenizer = Library.from_str(text)
        except Exception as error:  # the library raises plain Exceptions
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BundleError(f"the tokenizer cannot be read: {first[:200]}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.text, self.ends = text, ends

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the special ones that its template adds."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special ones left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def tokenizer_of(given: Any) -> Tokenizer:
    """A tokenizer for what a user gave: a fast one of transformers, one of `tokenizers`, or any with encode and decode.

    Raises InputError for anything else.
    """
    backend = getattr(given, "backend_tokenizer", given)
    if hasattr(backend, "to_str") and hasattr(backend, "get_vocab_size"):
        return Fast(backend.to_str(), _ends(given))
    if hasattr(given, "encode") and hasattr(given, "decode"):
        return Given(given)
    raise InputError(
        f"resource 'tokenizer' is a {type(given).__name__}: give a tokenizer with encode(text) and decode(ids)"
    )


def _ends(tokenizer: Any) -> tuple[int, ...]:
    end = getattr(tokenizer, "eos_token_id", None)
    return () if end is None else (int(end),)
