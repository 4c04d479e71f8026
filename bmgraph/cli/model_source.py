"""Opens the model that a command names: a Hugging Face folder, a GGUF file, or a function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bmgraph.cli.folder_example import FolderExample
from bmgraph.cli.gguf_file import open_gguf
from bmgraph.cli.hf_folder import Folder, open_folder
from bmgraph.errors import InputError
from bmgraph.frontend.generation_example import with_attention_mask

TEXTS = (
    "The museum opens at nine in the morning and closes at five.",
    "How do I change the battery of this watch?",
    "Shares fell by three percent after the company lowered its forecast for the year.",
    "She packed a tent, a stove and enough food for six days, and walked north along the river.",
    "Who wrote the first dictionary of the English language?",
    "Your parcel could not be delivered today; please choose another date.",
    "The enzyme binds to the substrate and lowers the energy that the reaction needs.",
    "After the storm the harbour was full of broken masts, ropes and floating crates.",
    "Call now to claim your free prize, offer ends tonight!",
    "In 1969 two people walked on the Moon while a third circled above them.",
    "The soup needs another pinch of salt and about ten minutes on a low flame.",
    "What is the distance between the Earth and the Sun?",
    "The committee postponed the vote because two members had not read the report.",
    "He repaired old radios in a small workshop behind the bakery.",
    "A graph is bipartite exactly when it has no cycle of odd length.",
    "The train to the coast leaves from platform four, not from platform two.",
)
"""Default sentences for the example and for calibration."""


Batch = dict[str, torch.Tensor]


@dataclass
class Source:
    """A model and the batch to capture it with; `tokenizer` is None where it takes no text.

    `notes` say what a user should know of how it was read.
    """

    name: str
    model: nn.Module
    example: Batch
    tokenizer: Any = None
    batch_of: Callable[[list[str], int], Batch] | None = None
    """Makes a batch, of at most so many tokens, of texts."""
    notes: tuple[str, ...] = ()

    def batches(self, texts: list[str], size: int, length: int) -> list[Batch]:
        """Texts as padded batches of `size` rows and at most `length` tokens. Raises InputError without a tokenizer."""
        if self.batch_of is None:
            raise InputError(f"{self.name} has no tokenizer to read texts with")
        return [self.batch_of(texts[i : i + size], length) for i in range(0, len(texts), size)]


def open_source(text: str, length: int = 128) -> Source:
    """The model that a command names: a folder, a `.gguf` file, or `module:function` (returning a model and a batch).

    Raises InputError for anything else.
    """
    if Path(text).is_dir():
        return _from_folder(Path(text), length)
    if text.endswith(".gguf"):
        return _source(Path(text).stem, open_gguf(Path(text)), length)
    if ":" in text and not Path(text).exists():
        return _from_function(text)
    raise InputError(f"{text!r} is not a model: give a Hugging Face folder, a .gguf file, or module:function")


def _from_folder(folder: Path, length: int) -> Source:
    return _source(folder.name, open_folder(folder), length)


def _source(name: str, found: Folder, length: int) -> Source:
    maker = FolderExample(found, length)
    notes = (*found.notes, *maker.notes)
    if not maker.reads_text:
        return Source(name, found.model, maker.of_noise(), notes=notes)
    return Source(name, found.model, maker.of_texts(list(TEXTS[:4])), found.tokenizer, maker.of_texts, notes)


def called(text: str) -> object:
    """What a function, named as `module:function`, returns; raises InputError if it is not there or fails."""
    sys.path.insert(0, "")
    try:
        function = _function(text)
        try:
            return function()
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            raise InputError(f"{text!r} failed: {_said(error)}; bmgraph --debug shows where") from error
    finally:
        sys.path.remove("")


def _from_function(text: str) -> Source:
    made = called(text)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise InputError(f"{text!r} must return a model and an example batch (a dict of tensors)")
    return Source(text, made[0], dict(with_attention_mask(made[0], dict(made[1]))))


def _function(text: str) -> Callable[[], Any]:
    module, _, name = text.partition(":")
    try:
        function: Callable[[], Any] = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise InputError(f"{text!r}: there is no module {error.name!r} here") from error
    except AttributeError as error:
        raise InputError(f"{text!r}: module {module!r} has no function {name!r}") from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise InputError(f"{text!r}: module {module!r} cannot be imported: {_said(error)}") from error
    return function


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:400]}"
