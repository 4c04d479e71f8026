"""Texts as calibration batches: windows of tokens, as a model that reads ids takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeGuard

import torch
from torch import fx

from bmgraph.analysis.input_kinds import known_kinds
from bmgraph.errors import ResourceError
from bmgraph.ir.categorical_input import fill_categorical
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.ops.index_bounds import checked_indices
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of

WINDOW = 256
"""Tokens in a window."""

WINDOWS = 48
"""Windows that are taken: the first ones."""

Calibration = Iterable[Mapping[str, torch.Tensor]] | Sequence[str] | str
"""What a user calibrates with: batches, or texts where a tokenizer is known."""


def are_texts(given: object) -> TypeGuard[str | Sequence[str]]:
    """Whether what is given for calibration is texts, not batches."""
    if isinstance(given, str):
        return True
    return isinstance(given, (list, tuple)) and bool(given) and isinstance(given[0], str)


def windows_of(
    texts: str | Sequence[str], encode: Callable[[str], list[int]], program: Program
) -> list[dict[str, torch.Tensor]]:
    """Batches of the tokens of all texts, one after the other, in windows of WINDOW tokens; the first WINDOWS of them.

    A model of a fixed or smaller length gets windows of that. A batch is one window, or as many as the batch size that a
    program fixes. Raises ResourceError for a model without an input of token ids, or with inputs that texts do not give, and for
    too few tokens.
    """
    inputs = known_kinds(program).inputs
    ids = [spec for spec in inputs if spec.kind is InputKind.IDS and len(spec.shape) == 2]
    if len(ids) != 1:
        raise ResourceError(
            f"calibration texts are for a model with one input of token ids [batch, sequence], and this one has {len(ids)}: give "
            "calibration batches, dicts of tensors by input name"
        )
    rows, length = _sizes(program, ids[0])
    if not isinstance(ids[0].shape[1], int):
        length = _longest(program, inputs, length)
    tokens = _tokens(texts, encode, rows * length * WINDOWS)
    if len(tokens) < rows * length:
        shape = ids[0].shape
        if rows > 1 or isinstance(shape[1], int) or len(tokens) < 2:
            raise ResourceError(
                f"the calibration texts are {len(tokens)} tokens, and a batch of this model takes {rows * length}: give more texts"
            )
        length = len(tokens)
    count = min(WINDOWS, len(tokens) // (rows * length))
    windows = torch.tensor(tokens[: count * rows * length]).reshape(count, rows, length)
    return [_batch(inputs, window) for window in windows]


def _longest(program: Program, inputs: Sequence[TensorSpec], most: int) -> int:
    """The largest length up to `most` that the model has positions for: found by running it where it looks rows up by itself."""
    looked_up = [node.args[1] for node in program.graph.nodes if traits_of(node).kind is Kind.EMBEDDING]
    if not program.fits_in_memory or all(
        isinstance(item, fx.Node) and item.op == "placeholder" for item in looked_up
    ):
        return most

    def fits(length: int) -> bool:
        batch = _batch(inputs, torch.zeros(1, length, dtype=torch.int64))
        try:
            with checked_indices(program.device):
                program(**fill_categorical(program.inputs, batch))
        except (IndexError, RuntimeError):  # what eager raises where an index is out of range
            return False
        return True

    if fits(most):
        return most
    low, high = 1, most  # it is `low` or more, and less than `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _batch(inputs: Sequence[TensorSpec], window: torch.Tensor) -> dict[str, torch.Tensor]:
    return {spec.name: _value(spec, window) for spec in inputs if not spec.names}


def _sizes(program: Program, spec: TensorSpec) -> tuple[int, int]:
    """The rows and the length of a window."""
    rows, length = spec.shape
    if isinstance(length, int):
        found = length
    else:
        bounds = program.ranges.get(length)
        found = WINDOW if bounds is None or bounds.high is None else min(WINDOW, bounds.high)
    return rows if isinstance(rows, int) else 1, found


def _tokens(texts: str | Sequence[str], encode: Callable[[str], list[int]], most: int) -> list[int]:
    """The tokens of texts, until there are enough."""
    tokens: list[int] = []
    for number, text in enumerate([texts] if isinstance(texts, str) else texts):
        if not isinstance(text, str):
            raise ResourceError(
                f"calibration text {number} is a {type(text).__name__}: give texts alone, or batches alone"
            )
        if len(tokens) >= most:
            break
        tokens += encode(text)
    return tokens


def _value(spec: TensorSpec, window: torch.Tensor) -> torch.Tensor:
    """What an input is for a window of token ids i64[rows, length]."""
    if spec.kind in (InputKind.IDS, InputKind.LABELS) and len(spec.shape) == 2:
        value = window
    elif spec.kind is InputKind.MASK:
        value = torch.ones_like(window)
    elif spec.kind in (InputKind.INVERSE_MASK, InputKind.TOKEN_TYPES):
        value = torch.zeros_like(window)
    elif spec.kind is InputKind.POSITIONS:
        value = torch.arange(window.shape[1]).expand_as(window).contiguous()
    else:
        raise ResourceError(
            f"calibration texts do not say what the input {spec.name!r} is: give calibration batches, dicts of tensors by input name"
        )
    return value.to(spec.dtype)
