"""Keeps errors of the `tokenizers` library clear: of the JSON text of a tokenizer, and of texts that are none."""

from __future__ import annotations

from typing import Any

from bmgraph.errors import BackendError, BundleError, InputError


def library_tokenizer(text: str) -> Any:
    """The library's tokenizer, which neither pads nor truncates.

    Raises BackendError if the library is not installed, BundleError if it cannot read the text.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise BackendError('tokenizers is not installed: pip install -e ".[hf]"') from error
    try:
        tokenizer = Tokenizer.from_str(text)
    except BaseException as error:  # the library raises plain Exceptions, and panics are not even that
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BundleError(f"the tokenizer cannot be read: {first[:200]}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def check_characters(text: str, what: str) -> None:
    """Raise InputError for half of a surrogate pair, as bytes that are not UTF-8 become: no tokenizer takes it."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{what} holds bytes that are no text (UTF-8): {ascii(text)[:60]}")
