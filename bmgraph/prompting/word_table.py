"""The words of classes as ids: their logits, of several tokens and several words, as one array."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from bmgraph.errors import InputError
from bmgraph.prompting.vocabulary import Vocabulary

TOKENS = ("first", "mean", "max")
"""How the logits of a word's tokens become one."""

LARGEST = 10**7
"""Classes times words times tokens at most."""

AS_IT_IS = "<!>"
"""Begins a word that gets no prefix."""

WordIds = tuple[tuple[tuple[int, ...], ...], ...]
"""Class -> word -> ids of its tokens."""


@dataclass(frozen=True)
class WordTable:
    """Ids of the words of classes; `tokens` is one of `TOKENS`. Shapes: C classes, W words at most, T tokens at most."""

    ids: WordIds
    tokens: str = "first"
    _ids: torch.Tensor = field(init=False, repr=False, compare=False)
    """i64[C, W, T], 0 where there is none."""
    _tokens: torch.Tensor = field(init=False, repr=False, compare=False)
    """bool[C, W, T]: where there is a token."""

    def __post_init__(self) -> None:
        if self.tokens not in TOKENS:
            raise InputError(f"tokens={self.tokens!r}: choose one of {', '.join(TOKENS)}")
        most = max(len(word) for words in self.ids for word in words)
        shape = len(self.ids), max(map(len, self.ids)), most
        if math.prod(shape) > LARGEST:
            raise InputError(
                f"the words of the verbalizer make an array {list(shape)}: give fewer, or shorter ones"
            )
        ids, there = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
        for row, words in enumerate(self.ids):
            for column, word in enumerate(words):
                ids[row, column, : len(word)] = torch.tensor(word)
                there[row, column, : len(word)] = True
        # made here, since a loss that reads them is traced with tensors that have no values
        object.__setattr__(self, "_ids", ids)
        object.__setattr__(self, "_tokens", there)

    @cached_property
    def _largest(self) -> int:
        return max(index for words in self.ids for word in words for index in word)

    @property
    def words(self) -> torch.Tensor:
        """bool[C, W]: where there is a word."""
        return self._tokens[..., 0]

    def word_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """logits f[B, V] -> logits of words f[B, C, W], -inf where there is no word. Raises InputError if V is too small."""
        if logits.shape[-1] <= self._largest:
            raise InputError(
                f"a word of the verbalizer has the id {self._largest}, and the model's logits are over {logits.shape[-1]} ids: take "
                "model and tokenizer of one folder"
            )
        ids, tokens = self._ids.to(logits.device), self._tokens.to(logits.device)
        found = logits.index_select(-1, ids.flatten()).reshape(-1, *ids.shape)
        if self.tokens == "first":
            found = found[..., 0]
        elif self.tokens == "max":
            found = found.masked_fill(~tokens, -torch.inf).amax(-1)
        else:
            found = found.masked_fill(~tokens, 0.0).sum(-1) / tokens.sum(-1).clamp(min=1)
        return found.masked_fill(~self.words.to(logits.device), -torch.inf)


def word_ids(word: object, vocabulary: Vocabulary, prefix: str, where: str) -> tuple[int, ...]:
    """The ids of a word; raises InputError for what is no word of the vocabulary."""
    if not isinstance(word, str) or not word.strip():
        raise InputError(f"{where} has the word {word!r}: give a text")
    ids, unknown = _ids(word, vocabulary, prefix), vocabulary.special_id("unk")
    if not ids or unknown in ids:
        raise InputError(
            f"the word {word!r} of {where} is not in the vocabulary: the tokenizer makes it {[vocabulary.token(index) for index in ids]}"
        )
    return ids


def known_word(word: object, vocabulary: Vocabulary, prefix: str, longest: int) -> bool:
    """Whether a word is made of 1 to `longest` ids, none of them unknown."""
    if not isinstance(word, str) or not word.strip():
        return False
    ids = _ids(word, vocabulary, prefix)
    return 0 < len(ids) <= longest and vocabulary.special_id("unk") not in ids


def _ids(word: str, vocabulary: Vocabulary, prefix: str) -> tuple[int, ...]:
    text = word.removeprefix(AS_IT_IS) if word.startswith(AS_IT_IS) else f"{prefix}{word}"
    return vocabulary.ids(text)


def ids_by_class(by_class: Mapping[str, Sequence[object]], vocabulary: Vocabulary, prefix: str) -> WordIds:
    """The ids of the words of each class, as `word_ids`."""
    return tuple(
        tuple(word_ids(word, vocabulary, prefix, f"class {name!r}") for word in given)
        for name, given in by_class.items()
    )


def ids_of(data: Any) -> WordIds:
    """Ids of words from JSON; raises ValueError for what is none."""
    found = tuple(tuple(tuple(word) for word in words) for words in data)
    flat = [index for words in found for word in words for index in word]
    if not all(type(index) is int and 0 <= index < 2**31 for index in flat):
        raise ValueError("ids of words are whole numbers from 0 on")
    if not found or not all(words and all(words) for words in found):
        raise ValueError("a class or a word has no ids")
    return found


def read_ids(ids: WordIds, tokens: str) -> WordIds:
    """The ids of words that scores depend on."""
    return tuple(tuple(word[:1] if tokens == "first" else word for word in words) for words in ids)


def check_distinct(read: Sequence[Hashable], classes: Sequence[str], tokens: str) -> None:
    """Raise InputError where two classes always get the same score, by what is read of each."""
    seen: dict[Hashable, str] = {}
    for name, ids in zip(classes, read):
        if ids in seen:
            how = " of which only the first token is read" if tokens == "first" else ""
            raise InputError(
                f"the classes {seen[ids]!r} and {name!r} have the same words{how}: no model can tell them apart"
            )
        seen[ids] = name


def words_by_class(given: object) -> dict[str, list[object]]:
    """Label words as lists by class; raises InputError for a class without words."""
    if not isinstance(given, Mapping):
        raise InputError(
            f"label words are a {type(given).__name__}: give a dict such as {{'positive': ['great']}}"
        )
    found: dict[str, list[object]] = {}
    for name, words in given.items():
        items = [words] if isinstance(words, str) else words
        if not isinstance(items, Sequence):
            raise InputError(
                f"the words of class {name!r} are a {type(items).__name__}: give a list of texts"
            )
        if not items:
            raise InputError(f"the class {name!r} has no words: give at least one")
        found[name] = list(items)
    return found
