"""What templates and verbalizers need of a tokenizer: ids of pieces of text, special ids, and what stands around a text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bmgraph.errors import InputError
from bmgraph.utils.did_you_mean import did_you_mean
from bmgraph.utils.tokenizer_json import check_characters, library_tokenizer

NAMES = ("mask", "pad", "eos", "bos", "sep", "cls", "unk")
"""Special tokens by what they are for; a template writes `{"special": "<eos>"}`."""

SIDES = ("right", "left")
NO_LIMIT = 10**6
"""A longest text of so many tokens means that the tokenizer does not know it."""

_NUMBERED = re.compile(r"(.*?)(\d{1,4})(\D*)", re.DOTALL)
_PROBES = ("a", "the", "1", ".")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as plain data.

    text: its JSON. special: the special tokens by `NAMES`. side: where batches are padded. longest: the tokens of a text at
    most, with those around it; None if not known. Text is always words: what looks like a special token in it is not one.
    """

    text: str
    special: Mapping[str, str]
    side: str = "right"
    longest: int | None = None

    def __post_init__(self) -> None:
        for name, token in self.special.items():
            if name not in NAMES:
                raise InputError(
                    f"unknown special token {name!r}{did_you_mean(name, NAMES)} (known: {', '.join(NAMES)})"
                )
            if not isinstance(token, str) or self._tokenizer.token_to_id(token) is None:
                raise InputError(f"{name}={token!r} is not in the tokenizer's vocabulary")
        if self.side not in SIDES:
            raise InputError(f"side={self.side!r}: choose one of {', '.join(SIDES)}")
        if self.longest is not None and (type(self.longest) is not int or self.longest < 1):
            raise InputError(f"longest={self.longest!r}: give a number of tokens, or None")

    @staticmethod
    def of(tokenizer: object, special: Mapping[str, str] | None = None) -> Vocabulary:
        """That of a fast tokenizer of transformers, or of one of `tokenizers` with its special tokens, as in `special={"mask": "[MASK]"}`.

        Raises InputError for anything else, and for a special token that the tokenizer does not have.
        """
        if isinstance(tokenizer, Vocabulary):
            return tokenizer
        backend: Any = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(backend, "to_str") or not hasattr(backend, "get_vocab_size"):
            raise InputError(
                f"the tokenizer is a {type(tokenizer).__name__}: give a fast tokenizer of transformers, or one of tokenizers"
            )
        found = {name: getattr(tokenizer, f"{name}_token", None) for name in NAMES} | dict(special or {})
        tokens = {name: str(token) for name, token in found.items() if token is not None}
        longest = getattr(tokenizer, "model_max_length", None)
        known = isinstance(longest, int) and 0 < longest < NO_LIMIT
        side = getattr(tokenizer, "padding_side", "right")
        return Vocabulary(backend.to_str(), tokens, side, longest if known else None)

    def __repr__(self) -> str:
        return f"<Vocabulary of {self.size} tokens>"

    @property
    def size(self) -> int:
        """The number of ids, with added tokens."""
        return int(self._tokenizer.get_vocab_size())

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = library_tokenizer(self.text)
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def _added(self) -> dict[str, int]:
        """Added tokens and their ids."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {str(token.content): int(index) for index, token in added.items()}

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        """The added tokens that the tokenizer takes as special, and their ids."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {str(token.content): int(index) for index, token in added.items() if token.special}

    def ids(self, text: str) -> tuple[int, ...]:
        """The ids of a piece of text, with nothing around them."""
        check_characters(text, "the text")
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special ones."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    @cached_property
    def of_letters(self) -> tuple[int, ...]:
        """Ids of ordinary tokens of two letters or more and nothing else, but for a mark or space in front."""
        special, found = set(self._special_ids.values()), []
        for index in range(self.size):
            text = "" if index in special else self.decode([index]).strip()
            if len(text) > 1 and text.isalpha():
                found.append(index)
        return tuple(found)

    def token(self, index: int) -> str:
        """The token of an id as the vocabulary has it."""
        return str(self._tokenizer.id_to_token(index))

    def special_id(self, name: str) -> int | None:
        """The id of a special token by its name, None if the tokenizer has none."""
        token = self.special.get(name)
        return None if token is None else int(self._tokenizer.token_to_id(token))

    def special_in(self, text: str) -> str | None:
        """A special token that a text writes out, if there is one."""
        tokens = [*self.special.values(), *(token for token in self._special_ids if not token.isspace())]
        written = [token for token in tokens if token in text and not token.isalnum()]
        return next((token for token in written if token in self._special_ids), None)

    def special_named(self, name: str) -> int:
        """The id that `{"special": name}` stands for: `<eos>` and the like, or a special token written out."""
        found = self.special_id(name[1:-1]) if name.startswith("<") and name.endswith(">") else None
        found = self._special_ids.get(name) if found is None else found
        if found is None:
            have = [f"<{item}>" for item in NAMES if item in self.special]
            raise InputError(
                f"the tokenizer has no special token {name!r}{did_you_mean(name, have)} (it has {', '.join(have) or 'none'})"
            )
        return found

    @property
    def pad_id(self) -> int:
        """The id that fills rows up; behind an attention mask of 0 any id will do."""
        for name in ("pad", "eos"):
            found = self.special_id(name)
            if found is not None:
                return found
        return 0

    @cached_property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the tokenizer puts in front of a text and behind it."""
        for probe in _PROBES:
            inner = list(self.ids(probe))
            whole = list(self._tokenizer.encode(probe).ids)
            for begin in range(len(whole) - len(inner) + 1):
                if inner and whole[begin : begin + len(inner)] == inner:
                    return tuple(whole[:begin]), tuple(whole[begin + len(inner) :])
        raise InputError(
            "what this tokenizer puts around a text could not be found: it changes the text itself"
        )

    @cached_property
    def sentinels(self) -> tuple[int, ...]:
        """Ids of the largest group of added tokens that differ by a number from 0 on: they stand for what is left out."""
        groups: dict[tuple[str, str], dict[int, int]] = {}
        for token, index in self._added.items():
            found = _NUMBERED.fullmatch(token)
            if found is not None:
                groups.setdefault((found[1], found[3]), {})[int(found[2])] = index
        longest: list[int] = []
        for numbers in groups.values():
            run: list[int] = []
            while len(run) in numbers:
                run.append(numbers[len(run)])
            longest = run if len(run) > len(longest) else longest
        return tuple(longest)
