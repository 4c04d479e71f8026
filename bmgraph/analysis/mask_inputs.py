"""Finds the inputs that are masks: those whose zeros, or ones, hide keys in attention or positions from a sum over them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from bmgraph.analysis.attention_mask import evaluate_on, hides_keys
from bmgraph.analysis.mask_probing import hiding_number
from bmgraph.analysis.structure.value_origins import Core, walk
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.program import Program, placeholders
from bmgraph.ir.symbolic_dim import size_of
from bmgraph.ops.trait_row import Dims, Kind
from bmgraph.ops.traits import calls, traits_of

aten = torch.ops.aten

Expression = tuple[fx.Node, bool]
"""A mask expression, and whether it is true where it hides."""

KINDS = {0: InputKind.MASK, 1: InputKind.INVERSE_MASK}
"""The number that hides -> the kind of the input."""

ALONG = frozenset({Kind.RESHAPE, Kind.LAYOUT, Kind.CAST, Kind.SOFTMAX, Kind.SCALING, Kind.QUOTIENT, Kind.SUM})
"""Calls between a gate and what brings positions together."""


def mask_kinds(program: Program) -> dict[str, InputKind]:
    """The kind of each input that is a mask, or that the scores of an attention read in another form, by name."""
    cores = walk(program.graph).cores
    masks = list(dict.fromkeys(item for core in cores for item in _expressions(core)))
    found = {}
    for name, node in placeholders(program.graph).items():
        kind = _kind(program, node, cores, masks)
        if kind is not None:
            found[name] = kind
    return found


def _kind(program: Program, node: fx.Node, cores: list[Core], masks: list[Expression]) -> InputKind | None:
    value = node.meta["val"]
    if value.dim() < 2 or not _zeros_and_ones(program, node):
        is_bias = value.dim() > 1 and value.is_floating_point() and _is_bias(node, cores)
        return InputKind.ATTENTION_BIAS if is_bias else None
    if value.dim() == 2:
        kind = _hiding(program, node, cores, masks) if cores else _gate(program, node)
        if kind is not None:
            return kind
    return InputKind.ATTENTION_BIAS if _is_bias(node, cores) else None


def _zeros_and_ones(program: Program, node: fx.Node) -> bool:
    """Whether an input holds nothing else in the example; on the meta device, whether it may."""
    value = program.example.get(str(node.target))
    if value is None or value.device.type == "meta":
        return not node.meta["val"].is_floating_point()
    return bool(((value == 0) | (value == 1)).all())


def _hiding(program: Program, node: fx.Node, cores: list[Core], masks: list[Expression]) -> InputKind | None:
    """What hides keys in an attention, as its masks say, or its weights where masks have another form than [B, 1, Q, K]."""
    name = str(node.target)
    for held, kind in KINDS.items():
        if any(hides_keys(program, mask, name, held, negated) for mask, negated in masks):
            return kind
    found = hiding_number(program, node, [core for core in cores if _reaches(node, core)])
    return None if found is None else KINDS[found]


def _expressions(core: Core) -> Iterator[Expression]:
    """What masks the scores of an attention."""
    if core.mask is not None:
        yield core.mask, False
    if core.scores is None or core.softmax is None:
        return
    seen, stack = {core.scores}, [core.softmax]
    while stack:
        item = stack.pop()
        if item in seen or item.op != "call_function":
            continue
        seen.add(item)
        row, args = traits_of(item), item.args
        if calls(item, aten.where) and len(args) == 3:
            chosen = args[1] if isinstance(args[1], fx.Node) and _depends(args[1], core.scores) else args[2]
            yield args[0], chosen is args[2]  # type: ignore[misc]
            stack += [chosen] if isinstance(chosen, fx.Node) else []
        elif row.kind is Kind.MASKING:
            yield args[1], True  # type: ignore[misc]
            stack.append(args[0])  # type: ignore[arg-type]
        else:
            for operand in item.all_input_nodes:
                if _depends(operand, core.scores):
                    stack.append(operand)
                elif row.kind is Kind.SUM and not row.lowers:
                    yield operand, False


def _depends(node: fx.Node, source: fx.Node, without: fx.Node | None = None) -> bool:
    """Whether a value is computed from the values of another, other than through the node `without`."""
    seen = {without}
    stack = [node]
    while stack:
        item = stack.pop()
        if item is source:
            return True
        if item not in seen and item.target is not aten.sym_size.int:
            seen.add(item)
            stack.extend(item.all_input_nodes)
    return False


def _is_bias(source: fx.Node, cores: list[Core]) -> bool:
    """Whether the scores of attentions read an input's values, and the queries of the first do not."""
    return any(_reaches(source, core) for core in cores) and not _depends(cores[0].q, source)


def _reaches(source: fx.Node, core: Core) -> bool:
    """Whether the scores of an attention read an input's values, other than through queries and keys."""
    ends = [item for item in (core.mask, core.softmax) if item is not None]
    return any(_depends(end, source, without=core.scores) for end in ends)


def _gate(program: Program, node: fx.Node) -> InputKind | None:
    """What takes positions out of a model without attention; None unless all that an input multiplies or selects agrees."""
    hidden = {_held_where_hidden(program, node, gate) for gate in _gates(node)}
    return KINDS.get(hidden.pop()) if len(hidden) == 1 else None  # type: ignore[arg-type]


def _gates(source: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(call, operand) where values made of an input alone meet the values of positions, which are then brought together."""
    alone, graph = {source}, source.graph
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        inputs = [item for item in node.all_input_nodes if isinstance(item.meta.get("val"), torch.Tensor)]
        mine = [item for item in inputs if item in alone]
        if mine and len(mine) == len(inputs):
            alone.add(node)
        elif mine and traits_of(node).kind in (Kind.SCALING, Kind.MASKING) and _is_brought_together(node):
            yield from ((node, operand) for operand in mine if _fits_positions(source, operand, node))


def _fits_positions(source: fx.Node, operand: fx.Node, call: fx.Node) -> bool:
    """Whether an operand [B, S, 1] made of an input [B, S] meets values [B, S, D], or [B, S] meets [B, S]."""
    sizes = [[str(size) for size in node.meta["val"].shape] for node in (source, operand, call)]
    positions, mine, values = sizes
    return len(mine) == len(values) <= 3 and mine[:2] == positions == values[:2]


def _is_brought_together(node: fx.Node) -> bool:
    """Whether the values of positions meet in what reads a call."""
    stack, seen = [node], {node}
    positions_alone = node.meta["val"].dim() == 2
    while stack:
        for user in stack.pop().users:
            if _mixes(user) or (positions_alone and traits_of(user).kind is Kind.SOFTMAX):
                return True
            if user not in seen and traits_of(user).kind in ALONG:
                seen.add(user)
                stack.append(user)
    return False


def _mixes(node: fx.Node) -> bool:
    """Whether a call brings positions together."""
    row = traits_of(node)
    if row.kind in (Kind.CONVOLUTION, Kind.BATCHED_PRODUCT) or row.dims is Dims.REDUCED:
        return True
    return calls(node, aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)


def _held_where_hidden(program: Program, source: fx.Node, gate: tuple[fx.Node, fx.Node]) -> int | None:
    """The number of an input for which a gate lets nothing through; None unless it is one of 0 and 1."""
    call, operand = gate
    try:
        passed = [_lets_through(call, _at(program, source, operand, held)) for held in (0, 1)]
    except (RuntimeError, IndexError, KeyError, ValueError):
        return None
    return passed.index(False) if set(passed) == {True, False} else None


def _at(program: Program, source: fx.Node, operand: fx.Node, held: int) -> torch.Tensor:
    """The value of an operand where an input holds one number everywhere."""
    sizes, batch = {dim: 2 for spec in program.inputs for dim in spec.shape if isinstance(dim, str)}, {}
    for spec in program.inputs:
        shape = [size_of(dim, sizes) or 2 for dim in spec.shape]
        value = held if spec.name == source.target else 1
        batch[spec.name] = torch.full(shape, value, dtype=spec.dtype)
    return evaluate_on(program, operand, batch)


def _lets_through(call: fx.Node, value: torch.Tensor) -> bool | None:
    """Whether a gate whose operand has one value everywhere lets positions through; None if that cannot be told."""
    if not bool((value == value.flatten()[0]).all()):
        return None
    held = bool(value.flatten()[0] != 0)
    return not held if calls(call, aten.masked_fill) or _fills(call) else held


def _fills(call: fx.Node) -> bool:
    """Whether a `where` puts a number in the place of positions where it is true."""
    return calls(call, aten.where) and not isinstance(_values(call.args[1]), torch.Tensor)


def _values(argument: object) -> torch.Tensor | None:
    """The value of an argument that is a tensor with axes."""
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    return value if isinstance(value, torch.Tensor) and value.dim() else None
