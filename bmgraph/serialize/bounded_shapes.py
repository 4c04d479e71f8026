"""Shape inference for graphs of untrusted files, with limits on memory, time and the size of numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from bmgraph.errors import BundleError
from bmgraph.ir.evaluation import arguments
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import creates_tensor, reset_values, value
from bmgraph.utils.element_count import element_count
from bmgraph.utils.torch_internals import FakeTensorMode, python_dispatcher

MOST_PIECES = 2**12
MOST_ELEMENTS = 2**40
MOST_STEPS = 6_000
STEPS_PER_NODE = 20
"""All nodes together may dispatch at most MOST_STEPS + STEPS_PER_NODE * nodes operators during shape inference. (A
recurrent operator dispatches several per time step.)"""
HIGHEST_POWER = 8
HIGHEST_DEGREE = 64
MOST_SYMBOLS = 64
MOST_FACTORS = 32
LARGEST_NUMBER = 2**62
LONGEST_EXPRESSION = 1000

_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_POWER = re.compile(r"\*\*\s*([0-9]{1,3}(?![0-9]))?")
_NUMBERS = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def check_sizes(sizes: Sequence[str]) -> None:
    """Raise BundleError if the sizes of inputs and outputs name too many symbols, or multiply or raise them too often.

    Checked before anything evaluates them.
    """
    names = {name for size in sizes for name in _SYMBOL.findall(size)}
    if len(names) > MOST_SYMBOLS:
        raise BundleError(f"the sizes name {len(names)} symbols: at most {MOST_SYMBOLS} are allowed")
    for size in sizes:
        powers = [int(digits) if digits else HIGHEST_POWER + 1 for digits in _POWER.findall(size)]
        if (
            len(powers) > 1
            or any(power > HIGHEST_POWER for power in powers)
            or size.count("*") > MOST_FACTORS
        ):
            raise BundleError(
                f"the size {size[:60]!r} is raised to a power above {HIGHEST_POWER} or has more than {MOST_FACTORS} factors"
            )


def propagate_untrusted(program: Program) -> None:
    """Compute the fake values of all nodes; raises BundleError naming a node that exceeds a limit."""
    for entry in program.entries():
        graph = entry.graph
        mode = reset_values(entry)
        budget = _OperatorBudget(MOST_STEPS + STEPS_PER_NODE * len(graph.nodes))
        mode.allow_fallback_kernels = False  # they would allocate real zeros of the sizes in the file
        for node in graph.nodes:
            if node.op == "get_attr":
                with mode:
                    real = program.tensor(str(node.target))
                    node.meta["val"] = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype)
            elif node.op == "call_function":
                _call(node, mode, program, budget)
                _check_result(node)


def _call(node: fx.Node, mode: FakeTensorMode, program: Program, budget: _OperatorBudget) -> None:
    args, kwargs = arguments(node, value)
    if isinstance(node.target, torch._ops.OpOverload):
        _check_operator(node, node.target, args, kwargs)
    else:
        _check_size_function(node, args, kwargs)
    if program.device.type != "cpu" and creates_tensor(node):
        kwargs["device"] = program.device
    assert callable(node.target)
    budget.node = node
    with mode, budget, torch.no_grad(), python_dispatcher():
        node.meta["val"] = node.target(*args, **kwargs)


def _check_size_function(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse arguments that are not numbers: on a string or list, `mul` and `mod` could allocate gigabytes."""
    is_getitem = getattr(node.target, "__name__", "") == "getitem"
    first = (tuple, list) if is_getitem else _NUMBERS
    if (
        kwargs
        or not args
        or not isinstance(args[0], first)
        or not all(isinstance(arg, _NUMBERS) for arg in args[1:])
    ):
        raise BundleError(f"node {node.name} computes a size from a value that is not a number")
    if getattr(node.target, "__name__", "") == "pow" and not (
        isinstance(args[-1], (int, float)) and abs(args[-1]) <= HIGHEST_POWER
    ):
        raise BundleError(f"node {node.name} raises a size to a power above {HIGHEST_POWER}")


def _check_operator(
    node: fx.Node, target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    schema = target._schema
    given = {argument.name: item for argument, item in zip(schema.arguments, args)} | kwargs
    for argument in schema.arguments:
        if "Device" in str(argument.type) and given.get(argument.name) is not None:
            raise BundleError(f"node {node.name} names a device, which is not allowed in a file")
    if given.get("rounding_mode") == "trunc":
        _check_divisor(node, given)
    if any("List" in str(returned.type) for returned in schema.returns) and _pieces(given) > MOST_PIECES:
        raise BundleError(f"node {node.name} splits a tensor into more than {MOST_PIECES} pieces")


def _check_divisor(node: fx.Node, given: dict[str, Any]) -> None:
    """Refuse integer division that can end the process: the least number by -1."""
    whole = [not item.is_floating_point() for item in given.values() if isinstance(item, torch.Tensor)]
    divisor = given.get("other")
    known = isinstance(divisor, (int, float)) and divisor not in (0, -1)
    if all(whole) and not known:
        raise BundleError(
            f"node {node.name} divides integers, rounding to zero, by what is not a constant beyond -1 and 0"
        )


def _pieces(given: dict[str, Any]) -> int:
    """An upper bound of the number of tensors that an operator returns, from its arguments."""
    tensor = next((item for item in given.values() if isinstance(item, torch.Tensor)), None)
    if tensor is None:
        return max((len(item) for item in given.values() if isinstance(item, (list, tuple))), default=0)
    counts = [item for name in ("chunks", "sections") if isinstance(item := given.get(name), int)]
    if counts:
        return max(counts)
    if any(isinstance(item, (list, tuple)) for item in given.values()):
        return max(len(item) for item in given.values() if isinstance(item, (list, tuple)))
    dim = given.get("dim", 0)
    length = tensor.shape[dim] if tensor.dim() else 1
    if not isinstance(length, int):
        return 0
    split_size = given.get("split_size")
    return length // max(1, split_size) if isinstance(split_size, int) else length


def _check_result(node: fx.Node) -> None:
    result = node.meta["val"]
    for item in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(item, torch.Tensor):
            fixed = [size for size in item.shape if isinstance(size, int)]
            if (count := element_count(fixed)) > MOST_ELEMENTS:
                raise BundleError(f"node {node.name} makes a tensor of {count} elements")
            sizes: list[Any] = [size for size in item.shape if isinstance(size, torch.SymInt)]
        elif isinstance(item, _NUMBERS):
            sizes = [item]
        elif item is None:
            continue
        else:
            raise BundleError(f"node {node.name} makes a {type(item).__name__}: expected tensors or numbers")
        for size in sizes:
            _check_number(node, size)


def _check_number(node: fx.Node, size: Any) -> None:
    if isinstance(size, int) and abs(size) > LARGEST_NUMBER:
        raise BundleError(f"node {node.name} computes a number of more than 64 bits")
    if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        expression = size.node.expr
        if hasattr(expression, "count_ops") and expression.count_ops() > LONGEST_EXPRESSION:
            raise BundleError(
                f"node {node.name} computes a size by an expression of more than {LONGEST_EXPRESSION} operations"
            )
        if _degree(expression) > HIGHEST_DEGREE:
            raise BundleError(f"node {node.name} computes a size of a degree above {HIGHEST_DEGREE}")


def _degree(expression: Any) -> int:
    """The largest power in a size. (Each node multiplies it by HIGHEST_POWER at most, so it is seen before it is large.)"""
    import sympy

    return max((abs(int(item.exp)) for item in expression.atoms(sympy.Pow) if item.exp.is_Integer), default=1)


class _OperatorBudget(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    """Raises BundleError when operators unroll into too many others."""

    def __init__(self, left: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.node: fx.Node | None = None
        self._left = left

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left < 0:
            raise BundleError(f"node {self.node} unrolls into too many operators")
        return func(*args, **(kwargs or {}))
