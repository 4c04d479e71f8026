"""Embeddings of texts by an encoder: means of its last hidden states over tokens, of length 1."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bmgraph.errors import InputError
from bmgraph.ir.input_kind import MASKS, InputKind
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.runtime.engine_base import Engine
from bmgraph.runtime.generation.tokenizer import Tokenizer
from bmgraph.serving.api_error import refused
from bmgraph.serving.fields import Fields

BATCH = 32
"""Texts that run together at most."""


@dataclass(frozen=True)
class WantedEmbeddings:
    """A request for embeddings: ids of texts, and whether they are sent as base64 of float32."""

    model: str
    ids: Sequence[list[int]]
    packed: bool


class Embedder:
    """Gives the embeddings of texts. Raises InputError for an engine whose inputs or outputs are not those of an encoder."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, output: str = "") -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._ids, self._mask, self._others = _inputs(engine)
        self._output = _output(engine, output)
        longest = engine.ranges.get(str(self._ids.shape[1]))
        self.longest = longest.high if longest is not None else None

    @property
    def size(self) -> int:
        """The length of an embedding."""
        return int(self._output.shape[-1])

    def asked(self, fields: Fields, most: int) -> WantedEmbeddings:
        """The fields of `/v1/embeddings`. Raises ApiError."""
        model, given = fields.text("model"), fields.value("input")
        form = fields.value("encoding_format")
        if form not in (None, "float", "base64"):
            raise refused("encoding_format is neither float nor base64", "encoding_format")
        fields.refuse(("dimensions",), f"embeddings have {self.size} numbers", (self.size,))
        fields.ignore("user")
        fields.done()
        texts = (
            [given]
            if isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], int))
            else given
        )
        if not isinstance(texts, list) or not texts:
            raise refused("input is missing: give a text, or a list of texts", "input")
        if len(texts) > most:
            raise refused(f"input has {len(texts)} texts: give {most} at most", "input")
        return WantedEmbeddings(
            model, [self._tokens(item, number) for number, item in enumerate(texts)], form == "base64"
        )

    def embeddings(self, rows: Sequence[list[int]]) -> np.ndarray[Any, Any]:
        """f32[N, size] of rows of ids; texts of like lengths run together."""
        found = np.zeros((len(rows), self.size), np.float32)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        for begin in range(0, len(order), BATCH):
            places = order[begin : begin + BATCH]
            found[places] = self._run([rows[place] for place in places])
        return found

    def _run(self, rows: Sequence[list[int]]) -> np.ndarray[Any, Any]:
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=self._ids.dtype)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for row, items in enumerate(rows):
            ids[row, : len(items)] = torch.tensor(items)
            mask[row, : len(items)] = 1
        batch: dict[str, object] = {self._ids.name: ids}
        for spec in self._mask:
            batch[spec.name] = (1 - mask if spec.kind is InputKind.INVERSE_MASK else mask).to(spec.dtype)
        for spec in self._others:
            batch[spec.name] = torch.zeros(len(rows), longest, dtype=spec.dtype)
        states = self._engine(**batch)[self._output.name].float()
        if states.dim() == 3:
            kept = mask[:, :, None].float()
            states = (states * kept).sum(1) / kept.sum(1)
        found: np.ndarray[Any, Any] = torch.nn.functional.normalize(states, dim=-1).numpy()
        return found

    def _tokens(self, item: object, number: int) -> list[int]:
        if isinstance(item, str):
            ids = self._tokenizer.encode(item)
        elif isinstance(item, list) and all(
            isinstance(value, int) and not isinstance(value, bool) for value in item
        ):
            ids = list(item)
        else:
            raise refused(f"input {number} is neither a text nor a list of ids", "input")
        if not ids:
            raise refused(f"input {number} is empty: give at least one token", "input")
        if self.longest is not None and len(ids) > self.longest:
            raise refused(
                f"input {number} has {len(ids)} tokens, more than the {self.longest} of this model: shorten it",
                "input",
                "context_length_exceeded",
            )
        return ids


def packed(row: np.ndarray[Any, Any]) -> str:
    """An embedding as base64 of its float32 numbers, little end first."""
    return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")


def _inputs(engine: Engine) -> tuple[TensorSpec, list[TensorSpec], list[TensorSpec]]:
    """The ids, the masks, and inputs that are zero for plain texts, such as kinds of tokens."""
    masks = [spec for spec in engine.inputs if spec.kind in MASKS]
    rest = [spec for spec in engine.inputs if spec not in masks]
    ids = [spec for spec in rest if spec.kind is InputKind.IDS and len(spec.shape) == 2]
    if not ids or any(len(spec.shape) != 2 for spec in engine.inputs):
        raise InputError(
            f"the engine takes {', '.join(map(str, engine.inputs))}: embeddings need an encoder that takes ids [B, S] and masks"
        )
    first = ids[0]
    return first, masks, [spec for spec in rest if spec is not first]


def _output(engine: Engine, wanted: str) -> TensorSpec:
    """The output of hidden states [B, S, D] or embeddings [B, D]."""
    fitting = [
        spec
        for spec in engine.outputs
        if spec.dtype.is_floating_point and len(spec.shape) in (2, 3) and isinstance(spec.shape[-1], int)
    ]
    named = [spec for spec in fitting if spec.name == wanted]
    names = ", ".join(spec.name for spec in fitting) or "none"
    if wanted and not named:
        raise InputError(f"the engine has no output {wanted!r} of embeddings (there are {names})")
    if named or len(fitting) == 1:
        return (named or fitting)[0]
    hidden = [spec for spec in fitting if len(spec.shape) == 3]
    if len(hidden) == 1:
        return hidden[0]
    raise InputError(
        f"the engine has several outputs ({names}): say which one gives embeddings, by --embedding NAME"
    )
