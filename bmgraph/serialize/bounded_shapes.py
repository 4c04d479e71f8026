"""Shapes of a graph from a file that nobody vouches for: computed without allocating, looping or growing numbers."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from bmgraph.errors import BundleError
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import creates, start, value
from bmgraph.utils.torch_internals import FakeTensorMode, python_dispatcher

MOST_PIECES = 2**12
MOST_ELEMENTS = 2**40
MOST_STEPS = 6_000
STEPS_PER_NODE = 20
"""The most operators that all nodes together may take to find their shapes: a recurrent one takes some for each step."""
HIGHEST_POWER = 8
LARGEST_NUMBER = 2**62
LONGEST_EXPRESSION = 1000

_NUMBERS = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def propagate_distrusted(program: Program) -> None:
    """Compute the values of all nodes; raises BundleError naming the node that would take absurd time or memory."""
    for graph in program.graphs.values():
        mode = start(program, graph)
        counting = _Counting(MOST_STEPS + STEPS_PER_NODE * len(graph.nodes))
        mode.allow_fallback_kernels = False  # they would run on real zeros of the size that the file says
        for node in graph.nodes:
            if node.op == "get_attr":
                with mode:
                    real = program.tensor(str(node.target))
                    node.meta["val"] = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype)
            elif node.op == "call_function":
                _call(node, mode, program, counting)
                _check_result(node)


def _call(node: fx.Node, mode: FakeTensorMode, program: Program, counting: _Counting) -> None:
    args: Any = fx.map_arg(node.args, value)
    kwargs: dict[str, Any] = dict(fx.map_arg(node.kwargs, value))
    if isinstance(node.target, torch._ops.OpOverload):
        _check_operator(node, node.target, args, kwargs)
    else:
        _check_scalar(node, args, kwargs)
    if program.device.type != "cpu" and creates(node):
        kwargs["device"] = program.device
    assert callable(node.target)
    counting.node = node
    with mode, counting, torch.no_grad(), python_dispatcher():
        node.meta["val"] = node.target(*args, **kwargs)


def _check_scalar(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Functions on sizes take numbers alone: given a text or a list, `mul` and `mod` make gigabytes."""
    picks = getattr(node.target, "__name__", "") == "getitem"
    first = (tuple, list) if picks else _NUMBERS
    if (
        kwargs
        or not args
        or not isinstance(args[0], first)
        or not all(isinstance(arg, _NUMBERS) for arg in args[1:])
    ):
        raise BundleError(f"node {node.name} computes a size from what is no number")
    if getattr(node.target, "__name__", "") == "pow" and not (
        isinstance(args[-1], (int, float)) and abs(args[-1]) <= HIGHEST_POWER
    ):
        raise BundleError(f"node {node.name} takes a size to a power beyond {HIGHEST_POWER}")


def _check_operator(
    node: fx.Node, target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    schema = target._schema
    given = {argument.name: item for argument, item in zip(schema.arguments, args)} | kwargs
    for argument in schema.arguments:
        if "Device" in str(argument.type) and given.get(argument.name) is not None:
            raise BundleError(f"node {node.name} names a device, which no program does")
    if any("List" in str(returned.type) for returned in schema.returns) and _pieces(given) > MOST_PIECES:
        raise BundleError(f"node {node.name} splits a tensor into more than {MOST_PIECES} pieces")


def _pieces(given: dict[str, Any]) -> int:
    """How many tensors an operator returns at most, by the numbers that it is given."""
    found = next((item for item in given.values() if isinstance(item, torch.Tensor)), None)
    if found is None:
        return max((len(item) for item in given.values() if isinstance(item, (list, tuple))), default=0)
    size = given.get("split_size")
    numbers = [item for name in ("chunks", "sections") if isinstance(item := given.get(name), int)]
    if numbers:
        return max(numbers)
    if any(isinstance(item, (list, tuple)) for item in given.values()):
        return max(len(item) for item in given.values() if isinstance(item, (list, tuple)))
    dim = given.get("dim", 0)
    length = found.shape[dim] if found.dim() else 1
    if not isinstance(length, int):
        return 0
    return length // max(1, size) if isinstance(size, int) else length


def _check_result(node: fx.Node) -> None:
    made = node.meta["val"]
    for item in made if isinstance(made, (tuple, list)) else (made,):
        if isinstance(item, torch.Tensor):
            fixed = [size for size in item.shape if isinstance(size, int)]
            if prod(fixed) > MOST_ELEMENTS:
                raise BundleError(f"node {node.name} makes a tensor of {prod(fixed)} elements")
            sizes: list[Any] = [size for size in item.shape if isinstance(size, torch.SymInt)]
        elif isinstance(item, _NUMBERS):
            sizes = [item]
        elif item is None:
            continue
        else:
            raise BundleError(f"node {node.name} makes a {type(item).__name__}, which no program holds")
        for size in sizes:
            _check_number(node, size)


def _check_number(node: fx.Node, size: Any) -> None:
    if isinstance(size, int) and abs(size) > LARGEST_NUMBER:
        raise BundleError(f"node {node.name} computes a number beyond 64 bits")
    if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        expression = size.node.expr
        if hasattr(expression, "count_ops") and expression.count_ops() > LONGEST_EXPRESSION:
            raise BundleError(f"node {node.name} computes a size by an endless expression")


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    """Stops a program whose operators unroll into too many others."""

    def __init__(self, left: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.node: fx.Node | None = None
        self._left = left

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left < 0:
            raise BundleError(f"node {self.node} unrolls into too many operators")
        return func(*args, **(kwargs or {}))
