"""Reads texts as packed batches of tokens, or the batches that a function returns."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bmgraph.cli.hf_tokenizer import told
from bmgraph.cli.model_source import Source, called
from bmgraph.cli.train_config import DataConfig
from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import InputError
from bmgraph.frontend.unwrap import unwrapped
from bmgraph.training.step_program import WHOLE
from bmgraph.utils.packing import PackedBatches
from bmgraph.utils.progress import track

AT_ONCE = 256
"""Documents that are given to the tokenizer at once."""

Batches = Iterable[dict[str, Any]]


def batches_of(where: str, source: Source, config: DataConfig, batch: str, seed: int | None) -> Batches:
    """The batches of a file of texts, packed for a causal language model, or those that a function (module:function) returns.

    `batch` is "whole", where every rank gets the same rows, or "rank". Raises InputError for a file that cannot be read, or
    texts for a model that takes none.
    """
    path = Path(where)
    if not path.is_file():
        if ":" not in where:
            raise InputError(
                f"there is no regular file {where}: give one, or module:function, which returns batches"
            )
        made = called(where)
        if not isinstance(made, Iterable):
            raise InputError(f"{where!r} must return batches: a list or a loader of dicts of tensors")
        return made
    _check_takes_text(source, where)
    ranks = Ranks.here() if batch != WHOLE else Ranks()
    documents = _tokens(source.tokenizer, _documents(path, config.field, config.documents), source.name)
    pad = getattr(source.tokenizer, "pad_token_id", None)
    return PackedBatches(
        documents,
        config.length,
        config.rows,
        pad if isinstance(pad, int) else 0,
        seed=seed,
        rank=ranks.rank,
        ranks=ranks.size,
    )


def _check_takes_text(source: Source, where: str) -> None:
    if source.tokenizer is None:
        raise InputError(
            f"{source.name} has no tokenizer to read {where} with: give data as module:function, which returns batches"
        )
    taken = inspect.signature(unwrapped(source.model).forward).parameters
    lacking = [name for name in ("attention_mask", "position_ids", "labels") if name not in taken]
    if lacking:
        raise InputError(
            f"{source.name} does not take {' and '.join(lacking)}, so texts cannot be packed for it as for a causal language "
            "model: give data as module:function, which returns batches"
        )


def _documents(path: Path, field: str, most: int | None) -> list[str]:
    """The texts of a file: JSON lines, or documents between empty lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if path.suffix in (".jsonl", ".json"):
        found = [
            _field(line, field, f"{path}, line {number}")
            for number, line in enumerate(text.splitlines(), 1)
            if line.strip()
        ]
    else:
        blocks = "\n".join(line.rstrip() for line in text.splitlines()).split("\n\n")
        found = [block.strip("\n") for block in blocks if block.strip()]
    if not found:
        raise InputError(f"{path} is empty: give documents between empty lines, or JSON lines")
    return found[:most]


def _field(line: str, field: str, where: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get(field), str):
        raise InputError(f"{where} holds no text {field!r}: name another field by data: {{field: ...}}")
    text: str = found[field]
    return text


def _tokens(tokenizer: Any, documents: list[str], name: str) -> list[list[int]]:
    """The ids of each document, with the token of the end where the tokenizer has one."""
    end = getattr(tokenizer, "eos_token_id", None)
    found: list[list[int]] = []
    with told(name):
        for first in track(range(0, len(documents), AT_ONCE), "reading texts", -(-len(documents) // AT_ONCE)):
            given = tokenizer(documents[first : first + AT_ONCE], verbose=False)["input_ids"]
            found += [
                [*ids, end] if isinstance(end, int) and ids[-1:] != [end] else list(ids) for ids in given
            ]
    return found
