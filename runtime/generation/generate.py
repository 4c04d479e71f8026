"""`engine.generate`: from what a user gives to what a user gets."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from bmgraph.errors import InputError
from bmgraph.ir.cache_spec import BATCH
from bmgraph.ir.categorical_input import check_indices, indices_of
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.runtime.generation.decode_loop import Decoder, Run, Speed, check_ids, check_prompts
from bmgraph.runtime.generation.detokenizer import TextStream
from bmgraph.runtime.generation.sampling import Array, Sampling
from bmgraph.runtime.generation.tokenizer import Tokenizer

SAMPLING = tuple(field.name for field in fields(Sampling))

Piece = tuple[int, Any]
"""(row, what is new in it): a text, or an id where there is no tokenizer."""


class Generates(ABC):
    """An engine that continues prompts where its program has a cache. `tokenizer` turns text into ids, `speed` is that of
    the last generation."""

    tokenizer: Tokenizer | None = None
    speed: Speed = Speed()

    @abstractmethod
    def decoder(self) -> Decoder | None:
        """What generates; None where the program has no cache."""

    def generate(
        self,
        prompts: Any,
        *,
        max_new_tokens: int = 64,
        stream: bool = False,
        stop: str | Sequence[str] = (),
        eos: int | Sequence[int] | None = None,
        start: int | None = None,
        **options: Any,
    ) -> Any:
        """What follows each prompt, up to `max_new_tokens`, an id of `eos` or a text of `stop`, which are left out.

        prompts: a text or ids, or a list of them, of any lengths. Texts give texts; without a tokenizer ids give ids. With
        `stream` it gives pieces as they come: of one prompt the pieces alone, of a list (row, piece). `start` is the id that a
        decoder behind an encoder begins with. `options` are
        temperature (0: the likeliest id), top_p and seed, and the program's inputs that have one value for each prompt.
        `speed` then tells tokens a second.

        Raises InputError, before anything runs, for a prompt that is empty, too long for the model's positions or holds
        ids outside of the vocabulary, and for an unknown option.
        """
        decoder = self.decoder()
        if decoder is None:
            raise InputError(
                "this engine has no cache: compile with generate=True, as in Onnx(generate=True)"
            )
        texts, one = _rows(prompts)
        ids = [self._ids(text, number) for number, text in enumerate(texts)]
        stops = self._stops(stop)
        sampling, others = _options(decoder, options, len(ids))
        _check_start(decoder, start)
        check_prompts(decoder, ids, max_new_tokens)
        run = Run(decoder, ids, max_new_tokens, sampling, self._ends(eos), others, start)
        self.speed = run.speed
        pieces = _ids_of(run) if self.tokenizer is None else _texts_of(run, self.tokenizer, stops)
        if stream:
            return (piece for _, piece in pieces) if one else pieces
        made: list[list[Any]] = [[] for _ in ids]
        for row, piece in pieces:
            made[row].append(piece)
        found = made if self.tokenizer is None else ["".join(parts) for parts in made]
        return found[0] if one else found

    def _ids(self, prompt: Any, number: int) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError(
                    f"prompt {number} is a text, and this engine has no tokenizer: give ids, or compile with "
                    "resources={'tokenizer': ...}"
                )
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, (torch.Tensor, np.ndarray)):
            return [int(item) for item in prompt.reshape(-1)]
        return list(prompt)

    def _stops(self, stop: str | Sequence[str]) -> tuple[str, ...]:
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if stops and self.tokenizer is None:
            raise InputError("stop strings need a tokenizer: compile with resources={'tokenizer': ...}")
        if not all(isinstance(item, str) and item for item in stops):
            raise InputError(f"stop={stop!r}: give texts that are not empty")
        return stops

    def _ends(self, eos: int | Sequence[int] | None) -> tuple[int, ...]:
        if eos is None:
            return self.tokenizer.ends if self.tokenizer is not None else ()
        return (eos,) if isinstance(eos, int) else tuple(eos)


def _ids_of(run: Run) -> Iterator[Piece]:
    for picked in run:
        for row in np.flatnonzero(~run.done):
            yield int(row), int(picked[row])


def _texts_of(run: Run, tokenizer: Tokenizer, stops: tuple[str, ...]) -> Iterator[Piece]:
    streams = [TextStream(tokenizer, stops) for _ in run.done]
    for picked in run:
        for row, stream in enumerate(streams):
            piece = stream.finish() if run.done[row] else stream.push(int(picked[row]))
            run.done[row] |= stream.ended
            if piece:
                yield row, piece
    for row, stream in enumerate(streams):
        piece = stream.finish()
        if piece:
            yield row, piece


def _rows(prompts: Any) -> tuple[list[Any], bool]:
    """The prompts, and whether a single one was given."""
    if isinstance(prompts, str):
        return [prompts], True
    if isinstance(prompts, (torch.Tensor, np.ndarray)):
        return ([prompts], True) if prompts.ndim == 1 else (list(prompts), False)
    if not isinstance(prompts, Sequence):
        raise InputError(f"the prompts are a {type(prompts).__name__}: give a text, ids, or a list of them")
    if prompts and all(isinstance(item, (str, Sequence, torch.Tensor, np.ndarray)) for item in prompts):
        return list(prompts), False
    return [prompts], True


def _check_start(decoder: Decoder, start: int | None) -> None:
    if decoder.source and start is None:
        raise InputError(
            "this model is an encoder and a decoder: say the id that its texts begin with, as in start=0"
        )
    if start is not None and not decoder.source:
        raise InputError(
            "start is for a decoder behind an encoder: this model goes on from the prompts themselves"
        )
    if start is not None:
        check_ids([start], decoder.cache.vocabulary, 0)


def _options(decoder: Decoder, options: dict[str, Any], rows: int) -> tuple[Sampling, dict[str, Array]]:
    """How to sample, and the program's inputs that have one value a row."""
    others = {spec.name: spec for spec in decoder.cache.others}
    known = (*SAMPLING, *others, "max_new_tokens", "stream", "stop", "eos", "start")
    for name in options:
        if name not in SAMPLING and name not in others:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"generate has no option {name!r}{hint} (options: {', '.join(known)})")
    values = {name: _row_values(spec, options.get(name), rows) for name, spec in others.items()}
    sampling = Sampling(**{name: value for name, value in options.items() if name in SAMPLING})
    return sampling, values


def _row_values(spec: TensorSpec, value: Any, rows: int) -> Array:
    """One value for each prompt; choices by name become numbers, and none where nothing is said."""
    if spec.names:
        value = indices_of(spec, value, {BATCH: rows})
    elif value is None:
        raise InputError(f"missing input {spec.name!r}: expected {spec}")
    tensor = torch.as_tensor(value)
    if tensor.shape[:1] != (rows,):
        found = f"has {len(tensor)} values" if tensor.dim() else "is one value"
        raise InputError(f"input {spec.name!r} {found}: give one for each of the {rows} prompts")
    tensor = tensor.to(spec.dtype)
    check_indices(spec, tensor)
    return tensor.numpy()
