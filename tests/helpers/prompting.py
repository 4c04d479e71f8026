"""Tiny tokenizers and rows for tests of prompting."""

from __future__ import annotations

from functools import cache
from typing import Any

WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *(f"w{index}" for index in range(20)),
    "great",
    "good",
    "bad",
    ".",
    ":",
    "wonderful",
)
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


@cache
def word_tokenizer() -> Any:
    """Splits at spaces and punctuation; puts [CLS] and [SEP] around a text, and has a mask."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    library = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(list(SPECIAL.values()))
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return library


@cache
def byte_tokenizer() -> Any:
    """Byte by byte, with a few merged words that begin with a space; nothing around a text, no mask, an end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    merges: list[tuple[str, str]] = []
    for word in ("\u0120good", "\u0120bad", "\u0120is"):
        whole = word[0]
        for letter in word[1:]:
            if whole + letter not in vocabulary:
                merges.append((whole, letter))
                vocabulary[whole + letter] = len(vocabulary)
            whole += letter
    library = Tokenizer(models.BPE(vocabulary, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<end>"])
    return library


@cache
def numbered_tokenizer() -> Any:
    """Words, with numbered tokens that stand for what is left out; </s> behind a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ("<pad>", "</s>", "<unk>", *(f"w{index}" for index in range(20)), "great", "bad", ".")
    library = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["<pad>", "</s>", "<unk>", "<x_0>", "<x_1>", "<x_2>"])
    library.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return library
