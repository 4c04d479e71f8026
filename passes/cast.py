"""Cast: compute in another floating-point type, such as fp32 for an engine without bfloat16."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from bmgraph.errors import InputError, PassError, VerificationError
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import propagate
from bmgraph.ir.tensor_spec import DTYPE_NAMES
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.verify.kept_calls import check_kept_calls, equal
from bmgraph.verify.proof import Proof

aten = torch.ops.aten

TYPES: dict[str, tuple[torch.dtype, frozenset[torch.dtype]]] = {
    "fp32": (torch.float32, frozenset({torch.bfloat16, torch.float16, torch.float64})),
    "fp16": (torch.float16, frozenset({torch.bfloat16})),
}
"""By option `to`: the type, and the types that become it. fp32 stays in "fp16": half-precision models use it on purpose."""


@dataclass(frozen=True, repr=False)
class Cast(ModelPass):
    """Replace the floating-point types of weights, buffers, inputs and casts in the graph by another type.

    to: "fp32" replaces bfloat16, float16 and float64; "fp16" replaces bfloat16 and keeps fp32. bfloat16 weights are
    exact in fp32. Finite numbers beyond the range of the type become its largest. Raises PassError where nothing has
    a type to replace, and for a graph that reads the bits of a value.

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import Cast
        >>> program = bg.capture(torch.nn.Linear(6, 4).bfloat16(), (torch.randn(3, 6).bfloat16(),))
        >>> bg.Pipeline([Cast("fp32")]).run(program).parameters["weight"].dtype
        torch.float32
    """

    effect: ClassVar[Effect] = "approximate"
    changes: ClassVar[frozenset[str]] = frozenset({"types"})
    default_drift: ClassVar[float] = 0.1

    to: str = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to not in TYPES:
            raise InputError(f"to={self.to!r}: choose one of {', '.join(map(repr, TYPES))}")

    def run(self, program: Program, context: Context) -> Program:
        """Cast the tensors, then the graphs, whose shapes and types are inferred anew."""
        wanted, replaced = TYPES[self.to]
        cast: dict[str, torch.dtype] = {}
        for group in (program.parameters, program.buffers, program.example):
            for name, tensor in group.items():
                if tensor.dtype in replaced:
                    cast[name] = tensor.dtype
                    group[name] = _cast(tensor, wanted)
        program.inputs = tuple(
            replace(spec, dtype=wanted) if spec.dtype in replaced else spec for spec in program.inputs
        )
        for graph in program.graphs.values():
            for node in graph.nodes:
                if node.op == "call_function":
                    _cast_call(node, wanted, replaced)
        propagate(program, everything=True)
        for graph in program.graphs.values():
            _drop_casts_without_effect(graph)
        for name, dtype in cast.items():
            context.edited(name, f"{DTYPE_NAMES[dtype]} to {DTYPE_NAMES[wanted]}")
        return program

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """Tensors must be cast and calls be what they were, but for types and for numbers that the type cannot hold."""
        _, replaced = TYPES[self.to]
        for name, old in before.tensors().items():
            new = after.tensors().get(name)
            if new is not None and old.dtype in replaced and not _same_numbers(old, new):
                raise VerificationError(f"{name}: its values are not those that were cast")
        check_kept_calls(before, after, str(self), _same_but_type)


def _same_numbers(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether `new` holds the numbers of `old`, those that its type cannot hold cut to its range."""
    limits = torch.finfo(new.dtype)
    exact = old.double()
    held = torch.where(exact.isfinite(), exact.clamp(limits.min, limits.max), exact).to(new.dtype)
    return torch.equal(held.nan_to_num(), new.nan_to_num())


def _same_but_type(old: Any, new: Any) -> bool:
    if isinstance(old, torch.dtype):
        return isinstance(new, torch.dtype)
    if isinstance(old, float) and isinstance(new, float):
        return old == new or abs(old) > torch.finfo(torch.float16).max
    return equal(old, new)


def computes_in(program: Program, dtype: torch.dtype) -> str:
    """A tensor, input or node of the program that has a type; empty if none has."""
    for name, tensor in program.tensors().items():
        if tensor.dtype == dtype:
            return name
    for spec in program.inputs:
        if spec.dtype == dtype:
            return spec.name
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype == dtype:
            return str(node.meta.get("scope") or node.name)
    return ""


def _cast(tensor: torch.Tensor, wanted: torch.dtype) -> torch.Tensor:
    """The tensor in another type; finite values stay finite, so that a mask's lowest number times 0 stays 0."""
    limits = torch.finfo(wanted)
    cast = tensor.to(wanted)
    return torch.where(tensor.isfinite(), cast.clamp(limits.min, limits.max), cast)


def _cast_call(node: fx.Node, wanted: torch.dtype, replaced: frozenset[torch.dtype]) -> None:
    """Replace types and numbers among the arguments of a call."""
    if node.target is aten.view.dtype:
        raise PassError(
            f"{node.name} in {node.meta.get('scope') or 'the root'} reads the bits of a value: it cannot be cast"
        )
    limits = torch.finfo(wanted)
    value = node.meta.get("val")
    changes = isinstance(value, torch.Tensor) and value.dtype in replaced

    def change(item: Any) -> Any:
        if isinstance(item, torch.dtype):
            return wanted if item in replaced else item
        if changes and isinstance(item, float) and abs(item) != float("inf"):
            return min(max(item, limits.min), limits.max)
        return item

    node.args = fx.node.map_aggregate(node.args, change)
    node.kwargs = fx.node.map_aggregate(node.kwargs, change)


def _drop_casts_without_effect(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target is not aten.to.dtype:
            continue
        source = node.args[0]
        if source.meta["val"].dtype == node.meta["val"].dtype:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
