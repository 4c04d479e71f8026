"""The half-precision form of a program: what a training step with precision="bf16" or "fp16" computes.

Products of matrices, convolutions and attention compute in half precision. What a row of the table of operators calls precise
(`Traits.precise`: norms, softmax, sums, powers, losses) computes in float32. Everything else computes in the dtype that its
operands have. What trains is stored in half precision; parameters that do not train, buffers, and what is computed of
buffers and integers alone (positions, angles, masks) stay as they are, and are cast where they meet half precision.

A value in float32 is **loose** if half precision is enough for it: the results of norms, softmax and frozen embeddings,
inputs, and half values that met constants in float32 (a mask, angles). It is rounded where something else than a precise
call reads it, so a mask's lowest number is never rounded on its way to a softmax, and hidden states stay in half precision.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from bmgraph.ir.program import Program, output_node, placeholders
from bmgraph.ir.shape_inference import carry, fake_parameter, infer, reset_values
from bmgraph.ops.trait_row import Flops, Kind, Traits
from bmgraph.ops.traits import argument, is_elementwise, traits_of
from bmgraph.training.fp32_form import NARROWED, WIDENED
from bmgraph.utils.stored_tensor import as_dtype
from bmgraph.utils.torch_internals import FakeTensorMode

aten = torch.ops.aten

PRODUCTS = (Kind.LINEAR, Kind.BATCHED_PRODUCT, Kind.PRODUCT, Kind.CONVOLUTION, Kind.ATTENTION, Kind.EXPERTS)
MOVES = (Kind.RESHAPE, Kind.LAYOUT, Kind.SPLIT, Kind.SELECTION, Kind.MASKING)
ROUNDED = (Kind.NORM, Kind.SOFTMAX, Kind.EMBEDDING)
"""Results in float32 that half precision is enough for."""


def in_half(program: Program, dtype: torch.dtype, trained: Collection[str]) -> Program:
    """A copy of a program in float32 form (`fp32_form.py`) that computes in half precision; `trained` is stored in it.

    Outputs and new values of buffers keep their dtypes.
    """
    half = program.clone()
    for name in trained:
        half.parameters[name] = as_dtype(half.parameters[name], dtype)
    wanted = [_dtype_of(value) for value in _returned(half)]
    mode = reset_values(half)
    form = _HalfForm(half, dtype, mode)
    for node in list(half.graph.nodes):
        form.visit(node)
    output = output_node(half.graph)
    values = [
        value if _dtype_of(value) == kept else form.cast(value, kept, output)
        for value, kept in zip(_returned(half), wanted)
    ]
    output.args = (tuple(values),)
    return half


class _HalfForm:
    """Walks over a graph in order, and inserts casts in front of calls."""

    def __init__(self, program: Program, dtype: torch.dtype, mode: FakeTensorMode) -> None:
        self._program, self._dtype, self._mode = program, dtype, mode
        self._signals: set[fx.Node] = set()
        """Values that depend on parameters or on inputs that are no whole numbers."""
        self._loose: set[fx.Node] = set()
        self._casts: dict[tuple[fx.Node, torch.dtype | None], fx.Node] = {}

    def visit(self, node: fx.Node) -> None:
        """Give a node its operands in the dtypes that it computes in, and its value."""
        if node.op == "placeholder":
            if node in placeholders(self._program.graph).values() and _is_float(node):
                self._signals.add(node)
                self._loose.add(node)
        elif node.op == "get_attr":
            name = str(node.target)
            node.meta["val"] = fake_parameter(self._program.tensor(name), self._mode)
            if name in self._program.parameters:
                self._signals.add(node)
        elif node.op == "call_function":
            self._call(node)

    def cast(self, node: fx.Node, dtype: torch.dtype | None, before: fx.Node) -> fx.Node:
        """A value in another dtype, computed in front of its first reader."""
        if node.meta.get(WIDENED) and _dtype_of(node.all_input_nodes[0]) == dtype:
            return node.all_input_nodes[0]
        if (node, dtype) not in self._casts:
            with self._program.graph.inserting_before(before):
                cast = self._program.graph.call_function(aten.to.dtype, (node, dtype))
            carry(node, cast)
            infer(cast, self._mode, self._program.device)
            self._casts[node, dtype] = cast
            if node in self._signals:
                self._signals.add(cast)
        return self._casts[node, dtype]

    def _call(self, node: fx.Node) -> None:
        row = traits_of(node)
        operands = [item for item in node.all_input_nodes if _is_float(item)]
        signals = [item for item in operands if item in self._signals]
        loose = self._settle(node, row, operands, signals)
        if signals:
            self._signals.add(node)
            _limit_numbers(node, operands)
        infer(node, self._mode, self._program.device)
        if loose and _dtype_of(node) != self._dtype:
            self._loose.add(node)

    def _settle(self, node: fx.Node, row: Traits, operands: list[fx.Node], signals: list[fx.Node]) -> bool:
        """Cast the operands of a call; returns whether its result is loose, if it is in float32."""
        half = [item for item in signals if _dtype_of(item) == self._dtype or item in self._loose]
        if node.target is aten.to.dtype:
            if node.meta.get(NARROWED):
                node.update_arg(1, self._dtype)
            return bool(node.meta.get(WIDENED))
        if row.precise:
            self._all_to(node, operands, torch.float32)
            return row.kind in ROUNDED
        if not signals:
            return False
        if row.kind in PRODUCTS or row.flops is not Flops.NONE:
            self._bound_mask(node, row)
            self._all_to(node, [item for item in operands if item not in _written(node)], self._dtype)
            return True
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
            if isinstance(node.target, torch._ops.OpOverload):
                self._all_to(node, operands, torch.float32)  # an operator of ours: in what it was made for
            return True
        if len(half) < len(signals):
            if not is_elementwise(node):
                self._all_to(node, operands, torch.float32)
            return row.kind in ROUNDED
        if row.kind in MOVES or row.kind is Kind.EMBEDDING:
            if not is_elementwise(node) and len({_dtype_of(item) for item in operands}) > 1:
                self._all_to(node, operands, torch.float32)
            return True
        self._all_to(node, half, self._dtype)
        if not is_elementwise(node):
            self._all_to(node, operands, self._dtype)
        return True

    def _all_to(self, node: fx.Node, operands: list[fx.Node], dtype: torch.dtype) -> None:
        for operand in operands:
            if _dtype_of(operand) != dtype and _dtype_of(operand) != torch.float64:
                node.replace_input_with(operand, self.cast(operand, dtype, node))

    def _bound_mask(self, node: fx.Node, row: Traits) -> None:
        """Keep the numbers of an additive mask finite in half precision: rows that are masked whole would become NaN."""
        mask = argument(node, "attn_mask") if row.kind is Kind.ATTENTION else None
        if not isinstance(mask, fx.Node) or not _is_float(mask) or _dtype_of(mask) == self._dtype:
            return
        limits = torch.finfo(self._dtype)
        with self._program.graph.inserting_before(node):
            bounded = self._program.graph.call_function(aten.clamp.default, (mask, limits.min, limits.max))
        carry(mask, bounded)
        infer(bounded, self._mode, self._program.device)
        if mask in self._signals:
            self._signals.add(bounded)
        node.replace_input_with(mask, self.cast(bounded, self._dtype, node))


def _limit_numbers(node: fx.Node, operands: list[fx.Node]) -> None:
    """Keep numbers among the arguments of a call in the range of its half-precision operands (the lowest of a mask)."""
    halves = [
        _dtype_of(item) for item in node.all_input_nodes if item.meta["val"] is not None and _is_float(item)
    ]
    narrow = [dtype for dtype in halves if dtype is not None and dtype.itemsize == 2]
    if not narrow or len(narrow) < len(halves):
        return
    limits = torch.finfo(narrow[0])

    def limited(item: Any) -> Any:
        if isinstance(item, float) and limits.max < abs(item) < float("inf"):
            return limits.max if item > 0 else limits.min
        return item

    node.args = fx.node.map_aggregate(node.args, limited)
    node.kwargs = fx.node.map_aggregate(node.kwargs, limited)


def _returned(program: Program) -> list[Any]:
    values: Any = output_node(program.graph).args[0]
    return list(values)


def _dtype_of(node: Any) -> torch.dtype | None:
    """The dtype of a tensor, or of the first of several results."""
    found = node.meta.get("val") if isinstance(node, fx.Node) else None
    if isinstance(found, (tuple, list)):
        found = next((item for item in found if isinstance(item, torch.Tensor)), None)
    return found.dtype if isinstance(found, torch.Tensor) else None


def _is_float(node: fx.Node) -> bool:
    dtype = _dtype_of(node)
    return dtype is not None and dtype.is_floating_point


def _written(node: fx.Node) -> list[fx.Node]:
    """The operands that a call writes to."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    return [
        item
        for place, item in zip(arguments, node.args)
        if isinstance(item, fx.Node) and place.alias_info is not None and place.alias_info.is_write
    ]
