"""Shapes and dtypes of nodes, computed with fake tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from bmgraph.ir.evaluation import arguments
from bmgraph.ir.node_role import KEY
from bmgraph.ir.program import Program
from bmgraph.ir.symbolic_dim import SymbolicDim, is_name, size_of
from bmgraph.ir.tensor_spec import Dim, Range
from bmgraph.utils.torch_internals import (
    FakeTensorMode,
    fake_inputs,
    fake_mode_of,
    keeping_sizes_free,
    new_fake_mode,
    python_dispatcher,
)

CARRIED = ("scope", "site", KEY, "pass", "stack_trace", "source", "nn_module_stack")
"""The metadata that a node inherits from the node that it replaces."""

_SIZE_HINTS = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)


def value(node: fx.Node) -> Any:
    """The fake value of a node: a tensor without data, a size, or a tuple of them."""
    return node.meta.get("val")


def shape(node: fx.Node) -> tuple[Any, ...]:
    """The sizes of a node's tensor; dynamic ones are symbols."""
    return tuple(value(node).shape)


def expression(size: Any) -> Any:
    """A size as a number or as a symbolic expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def carry(old: fx.Node, new: fx.Node) -> None:
    """Copy the metadata of `old` (scope, site, source, ...) that `new` lacks."""
    for key in CARRIED:
        if key in old.meta and key not in new.meta:
            new.meta[key] = old.meta[key]


def infer(node: fx.Node, mode: FakeTensorMode, device: torch.device | None = None) -> None:
    """Compute the fake value of a call from those of its arguments; `device` is for calls without tensor arguments.

    What the call asks about sizes (is this contiguous?) is answered from their hints and not kept: a kept answer would fix
    a size, since all clones of a program share their sizes, also in the program that a pass was given.
    """
    args, kwargs = arguments(node, value)
    if device is not None and device.type != "cpu" and creates_tensor(node):
        kwargs["device"] = device
    assert callable(node.target)
    with (
        mode,
        keeping_sizes_free(mode),
        torch.no_grad(),
        python_dispatcher(),
    ):  # without it `pad` specializes dynamic sizes
        node.meta["val"] = node.target(*args, **kwargs)


def creates_tensor(node: fx.Node) -> bool:
    """Whether a call creates a tensor without tensor arguments, so that it needs a device."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    if not any(argument.name == "device" for argument in schema.arguments):
        return False
    return not any(isinstance(value(argument), torch.Tensor) for argument in node.all_input_nodes)


def fake_parameter(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A fake tensor with the shape, strides, dtype and device of a real one."""
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def propagate(program: Program, everything: bool = False) -> None:
    """Compute the missing fake values in all graphs; with `everything`, compute all values anew."""
    for entry in program.entries():
        graph = entry.graph
        mode = None if everything else fake_mode_of(list(graph.nodes))
        if mode is None:
            mode = reset_values(entry)
        for node in graph.nodes:
            if "val" in node.meta:
                continue
            if node.op == "get_attr":
                node.meta["val"] = fake_parameter(program.tensor(str(node.target)), mode)
            elif node.op == "call_function":
                infer(node, mode, program.device)


def reset_values(program: Program) -> FakeTensorMode:
    """Drop all values of the entry and give its inputs new symbols, registered under their names in `program.symbols`."""
    mode = new_fake_mode()
    names = [dim for spec in program.inputs for dim in spec.shape if isinstance(dim, str)]
    plain = {name for name in names if is_name(name)}
    derived = {name for name in names if name not in plain and _is_sum_of(plain, name)}
    distinct = [name for name in dict.fromkeys(names) if name not in derived]
    hints = _hints(program, distinct)
    hints |= {name: size for name in derived if (size := size_of(name, hints)) is not None}
    shapes = {
        spec.name: (
            [(dim, False) if isinstance(dim, int) else (hints[dim], True) for dim in spec.shape],
            spec.dtype,
        )
        for spec in program.inputs
    }
    values = fake_inputs(mode, shapes)
    sizes: dict[str, Any] = {}
    for spec in program.inputs:
        for size, dim in zip(values[spec.name].shape, spec.shape):
            if isinstance(dim, str) and dim not in derived and isinstance(size, torch.SymInt):
                sizes.setdefault(dim, size)
    program.symbols.update({size.node.expr: dim for dim, size in sizes.items()})
    for spec in program.inputs:
        if derived.intersection(dim for dim in spec.shape if isinstance(dim, str)):
            symbolic = [size_of(dim, sizes) if dim in derived else sizes.get(dim, dim) for dim in spec.shape]  # type: ignore[arg-type]
            with mode:
                values[spec.name] = torch.empty(symbolic, dtype=spec.dtype)  # type: ignore[arg-type]
    for node in program.graph.nodes:
        node.meta.pop("val", None)
        if node.op == "placeholder":
            node.meta["val"] = values[str(node.target)].to(program.device)
    return mode


def _is_sum_of(names: set[str], dim: str) -> bool:
    """Whether a size is a sum of products of known ones, and so at least as large as each of them."""
    found = SymbolicDim.of(dim)
    if found is None or not found.names:
        return False
    return names.issuperset(found.names) and all(factor > 0 for factor, _ in found.terms)


def _hints(program: Program, names: list[str]) -> dict[str, int]:
    """A size for tracing for each name: within its range where that leaves one, and never that of another name, since
    equal sizes would become one size."""
    hints: dict[str, int] = {}
    for name in names:
        candidates = _hints_within(program.ranges.get(name, Range()))
        hints[name] = next(size for size in candidates if size not in hints.values())
    return hints


def _hints_within(bounds: Range) -> Iterator[int]:
    """Sizes to trace with: those in a range, primes first, then those above it. Sizes below 2 would be fixed."""
    low = max(2, bounds.low)
    yield from (size for size in _SIZE_HINTS if size >= low and (bounds.high is None or size <= bounds.high))
    yield from itertools.count(low)


def fixed_sizes(program: Program) -> dict[str, int]:
    """The dynamic sizes of the entry that an edit has fixed -> the number that they were fixed to."""
    mode = fake_mode_of(list(program.graph.nodes))
    if mode is None or mode.shape_env is None:
        return {}
    found = {name: mode.shape_env.replace(symbol) for symbol, name in program.symbols.items()}
    inputs = {dim for spec in program.inputs for dim in spec.shape}
    return {name: int(size) for name, size in found.items() if size.is_number and name in inputs}


def dims(program: Program, tensor: torch.Tensor) -> tuple[Dim, ...]:
    """The sizes of a fake tensor, with symbols by the names that the program gives them."""
    return tuple(dim_text(program, size) for size in tensor.shape)


def dim_text(program: Program, size: int | torch.SymInt) -> Dim:
    """A size as a number, or as an expression of names such as `batch*sequence`."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    if expression.is_number:
        return int(expression)
    import sympy

    names = {symbol: sympy.Symbol(name) for symbol, name in program.symbols.items()}
    return str(expression.xreplace(names))
