"""Finds what inputs hold at the positions that a soft prompt or a prefix inserts, from how the graph uses them."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate, reads_no_input
from bmgraph.analysis.structure.value_origins import base
from bmgraph.analysis.token_values import looked_up
from bmgraph.errors import PassError
from bmgraph.ir.input_kind import MASKS, InputKind
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import propagate
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.ops.trait_row import Kind, Lookup
from bmgraph.ops.traits import argument, place_of, traits_of

aten = torch.ops.aten

DEFAULT_IGNORE_INDEX = -100

MAX_CONSTANTS = 64
"""The longest constant tensor whose values are taken for single ids."""


def ordinary_id(program: Program, source: fx.Node, rows: int) -> int:
    """An id of a table with `rows` rows that the model treats as any other: it names neither padding nor another case.

    Of `source`, the input of ids, the graph may compute a mask, positions or the last token. The id is the first from the
    middle of the table that occurs in none of these computations. Raises PassError where there is none.
    """
    special = special_ids(program, source)
    for candidate in chain(range(rows // 2, rows), range(rows // 2)):
        if candidate not in special:
            return int(candidate)
    raise PassError(
        f"the model treats every id of input {str(source.target)!r} as a special one: none fits a prompt"
    )


def special_ids(program: Program, source: fx.Node) -> set[int]:
    """The ids of an input that the graph compares with constants, such as that of padding, and other constants beside them."""
    special: set[int] = set()
    reached = reached_from(program, source)
    for node in reached:
        if any(item in reached and _is_integer(item) for item in node.all_input_nodes):
            special |= _constants(program, node)
    return special


def inserted_value(program: Program, spec: TensorSpec, node: fx.Node) -> float | None:
    """The value of an input (not the ids) at inserted positions; None repeats the value of the first position.

    Raises PassError where it is not known.
    """
    example = program.example.get(spec.name)
    reached = reached_from(program, node)
    outputs = {spec.name for spec, value in zip(program.outputs, returned_by(program)) if value in reached}
    in_loss_alone = bool(outputs) and not any(item.target is aten.linear.default for item in reached)
    if in_loss_alone and outputs <= set(program.losses):
        return _ignored_label(spec, reached)
    lookups = [item for item in reached if base(_looked_up_by(item)) is node]
    if lookups:
        rows = min(int(item.args[0].meta["val"].shape[0]) for item in lookups)  # type: ignore[union-attr]
        if example is not None and bool((example != example[:, :1]).any()) and rows >= example.shape[1]:
            raise PassError(
                f"input {spec.name!r} numbers the positions, as far as its example tells ({rows} rows for "
                f"{example.shape[1]} positions): leave it out of the example, so that the model numbers them, or give a "
                "longer example"
            )
        return None
    if example is not None and not bool(((example == 0) | (example == 1)).all()):
        raise PassError(
            f"the values of input {spec.name!r} at inserted positions are not known: it is not a mask of 0 and 1"
        )
    if spec.kind not in MASKS:
        raise PassError(
            f"the values of input {spec.name!r} at inserted positions are not known: neither its zeros nor its ones hide keys of an "
            "attention (or positions of a sum), as far as its dataflow tells; leave it out of the example, or capture the model behind "
            "a forward that makes it from a mask [batch, sequence]"
        )
    return 0.0 if spec.kind is InputKind.INVERSE_MASK else 1.0


def reached_from(program: Program, node: fx.Node) -> set[fx.Node]:
    """All nodes that depend on the values of a node, not only on its sizes."""
    reached: set[fx.Node] = {node}
    for item in program.graph.nodes:
        if item.target is not aten.sym_size.int and any(source in reached for source in item.all_input_nodes):
            reached.add(item)
    return reached


def returned_by(program: Program) -> tuple[fx.Node, ...]:
    """The nodes of the outputs that the program declares."""
    values: Any = output_node(program.graph).args[0]
    return tuple(values[: len(program.outputs)])


def shorten(program: Program, length: str, tokens: int) -> None:
    """Reduce the maximum length by the prompt; raises PassError where the example would not fit any more."""
    bounds = program.ranges.get(length)
    if bounds is None or bounds.high is None:
        return
    high = bounds.high - tokens
    lengths = [item.shape[1] for item in _examples_along(program, length)]
    if high < bounds.low or any(size > high for size in lengths):
        raise PassError(
            f"{tokens} tokens leave {max(0, high)} of the model's {bounds.high} positions, fewer than the example needs "
            f"({max(lengths, default=bounds.low)}): give fewer tokens"
        )
    program.ranges[length] = replace(bounds, high=high)


def _examples_along(program: Program, length: str) -> list[torch.Tensor]:
    """The example inputs whose second dimension is the sequence."""
    return [
        program.example[spec.name]
        for spec in program.inputs
        if spec.shape[1:2] == (length,) and spec.name in program.example
    ]


def propagate_longer(program: Program) -> None:
    """Infer all shapes for the longer sequence; raises PassError where an operator does not accept them."""
    try:
        propagate(program, everything=True)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        failed = next(
            (node for node in program.graph.nodes if "val" not in node.meta and node.op != "output"), None
        )
        where = (failed.meta.get("scope") or failed.name) if failed is not None else "the model"
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PassError(f"the model does not accept inserted positions in {where}: {first[:200]}") from error


def _ignored_label(spec: TensorSpec, reached: set[fx.Node]) -> float:
    """The label that all losses skip; raises PassError where there is none."""
    found: set[float] = set()
    for item in reached:
        skips = traits_of(item).kind is Kind.LOSS and place_of(item.target, "ignore_index") is not None
        if skips and item.args[1] in reached:
            found.add(float(argument(item, "ignore_index", DEFAULT_IGNORE_INDEX)))
    if len(found) == 1:
        return found.pop()
    why = f"its losses skip different labels ({', '.join(map(str, sorted(found)))})" if found else (
        "only a loss reads it, and not as the labels of a cross entropy, which skips one label"
    )  # fmt: skip
    raise PassError(f"the values of input {spec.name!r} at inserted positions are not known: {why}")


def _looked_up_by(user: fx.Node) -> Any:
    """The indices that a node looks up; None where it is not a lookup."""
    return (
        looked_up(user)
        if traits_of(user).lookup in (Lookup.ROWS, Lookup.LIST) and len(user.args) > 1
        else None
    )


def _is_integer(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype is not torch.bool


def _constants(program: Program, node: fx.Node) -> set[int]:
    """The integers among the arguments of a call, and in its short constant tensors."""
    found: set[int] = set()
    for item in (*node.args, *node.kwargs.values()):
        if isinstance(item, int):
            found.add(int(item))
        if not (isinstance(item, fx.Node) and _is_integer(item) and reads_no_input(item)):
            continue
        short = all(isinstance(size, int) for size in item.meta["val"].shape)
        if short and item.meta["val"].numel() <= MAX_CONSTANTS and program.device.type != "meta":
            found |= {int(value) for value in evaluate(program, item).reshape(-1)}
    return found
