"""Finds what each input of a program holds (ids, positions, a mask, labels, ...) in the dataflow; no name decides anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.mask_inputs import mask_kinds
from bmgraph.analysis.structure.value_origins import SCALARS, walk
from bmgraph.ir.cache_spec import CacheLayout
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.matching import plain_size
from bmgraph.ir.program import Program, output_node, placeholders
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.ops.trait_row import Dims, Kind, Lookup
from bmgraph.ops.traits import calls, is_elementwise, traits_of

aten = torch.ops.aten

KEPT = frozenset({Kind.RESHAPE, Kind.LAYOUT, Kind.CAST})
"""Calls whose elements are those of their first argument."""

ON_THE_WAY = KEPT | {Kind.SELECTION, Kind.JOIN, Kind.MASKING}
"""What labels go through on their way to a loss."""

ARITHMETIC = KEPT | {Kind.JOIN, Kind.BATCHED_PRODUCT}
"""How positions become angles, besides what is elementwise."""

PRODUCTS = frozenset({Kind.LINEAR, Kind.BATCHED_PRODUCT, Kind.PRODUCT})
"""Calls that multiply by a table which ids are looked up in, to score them."""


def known_kinds(program: Program) -> Program:
    """A program whose inputs say what they hold: the program itself where they do, as all do that capture makes."""
    if all(spec.kind is not None for entry in program.entries() for spec in entry.inputs):
        return program
    known = program.clone()
    for entry in known.entries():
        entry.inputs = with_kinds(entry)
    return known


def with_kinds(program: Program) -> tuple[TensorSpec, ...]:
    """The program's input specs; those that do not say their kind with the one that is found."""
    if all(spec.kind is not None for spec in program.inputs):
        return program.inputs
    found = _kinds(program)
    return tuple(
        spec if spec.kind is not None else replace(spec, kind=found.get(spec.name, InputKind.OTHER))
        for spec in program.inputs
    )


def _kinds(program: Program) -> dict[str, InputKind]:
    nodes = placeholders(program.graph)
    masks, tables = mask_kinds(program), _tables(program)
    looked_up = _of_lookups(program, tables)
    found: dict[str, InputKind] = {}
    for spec in program.inputs:
        node = nodes[spec.name]
        if spec.names:
            found[spec.name] = InputKind.CHOICE
        elif spec.name in looked_up:
            found[spec.name] = looked_up[spec.name]
        elif _is_label(program, node):
            found[spec.name] = InputKind.LABELS
        elif spec.name in masks:
            found[spec.name] = masks[spec.name]
        elif not spec.dtype.is_floating_point and _becomes_angles(program, node):
            found[spec.name] = InputKind.POSITIONS
        elif spec.dtype.is_floating_point:
            found[spec.name] = InputKind.FEATURES
    return found if program.cache is None else found | _of_cache(program.cache)


def _of_cache(cache: CacheLayout) -> dict[str, InputKind]:
    """The kinds of the inputs that a KV cache declares."""
    declared: dict[str | None, InputKind] = {
        cache.tokens: InputKind.IDS,
        cache.mask: InputKind.MASK,
        cache.positions: InputKind.POSITIONS,
        cache.scored: InputKind.SCORED,
        cache.extent: InputKind.CACHE,
        **dict.fromkeys(cache.memories, InputKind.MEMORY),
        **dict.fromkeys((slot.past for slot in cache.slots), InputKind.CACHE),
    }
    return {name: kind for name, kind in declared.items() if name is not None}


def _values_of(source: fx.Node, through: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The values that hold elements of an input, after some calls that take them first."""
    reached = {source}
    for node in source.graph.nodes:
        if node.op != "call_function" or not through(node):
            continue
        first: Any = node.args if calls(node, aten.where) else node.args[0]
        if reached.intersection(first if isinstance(first, (list, tuple)) else [first]):
            reached.add(node)
    return reached


def _keeps_values(node: fx.Node) -> bool:
    """Whether a call's output holds every element of its first argument, and no other value."""
    row = traits_of(node)
    return row.keeps_values or row.kind is Kind.CAST


def _tables(program: Program) -> dict[str, list[fx.Node]]:
    """The tables that each integer input is looked up in as it is, by name."""
    weights = walk(program.graph).weights
    found = {}
    for name, node in placeholders(program.graph).items():
        if node.meta["val"].is_floating_point():
            continue
        holds = _values_of(node, _keeps_values)
        tables = [table for item in holds for user in item.users for table in _looked_up_in(user, item)]
        tables = [table for table in tables if weights.get(table)]
        if tables:
            found[name] = tables
    return found


def _looked_up_in(call: fx.Node, ids: fx.Node) -> Iterator[fx.Node]:
    if call.op != "call_function":
        return
    row, args = traits_of(call), call.args
    indices: Any = None
    if row.lookup is Lookup.ROWS:
        indices = args[1]
    elif row.lookup is Lookup.LIST and isinstance(args[1], (list, tuple)) and len(args[1]) == 1:
        indices = args[1][0]
    elif row.dims is Dims.INDEX_SELECT:
        indices = args[2]
    if indices is ids and ids.meta["val"].dtype is not torch.bool:
        yield args[0]  # type: ignore[misc]


def _of_lookups(program: Program, tables: dict[str, list[fx.Node]]) -> dict[str, InputKind]:
    """Ids, positions or token types: of the inputs of one shape [B, S] that are not ids, those that count up in the example hold
    positions."""
    specs = {spec.name: spec for spec in program.inputs}
    found: dict[str, InputKind] = {}
    for shape in dict.fromkeys(specs[name].shape for name in tables):
        alike = {name: looked_up for name, looked_up in tables.items() if specs[name].shape == shape}
        embedded = any(
            spec.dtype.is_floating_point and len(spec.shape) == 3 and spec.shape[:2] == shape
            for spec in program.inputs
        )
        ids = _ids_among(program, alike, embedded)
        for name in alike:
            if name in ids or len(shape) < 2:
                found[name] = InputKind.IDS
            elif _counts_up(program, name) or _is_angles(program, tables[name]):
                found[name] = InputKind.POSITIONS
            else:
                found[name] = InputKind.TOKEN_TYPES
    return found


def _ids_among(program: Program, alike: dict[str, list[fx.Node]], embedded: bool) -> list[str]:
    """Of inputs of one shape that are looked up, those that hold ids: of a table that scores the outputs too; else of a table as
    long as there are scores; else of the largest table, where the example does not speak against it. None if what ids become is
    an input itself (`embedded`), and the others tell nothing apart but positions."""
    rows = {name: max(_rows(table) for table in found) for name, found in alike.items()}
    tied = [name for name, found in alike.items() if any(map(_scores_too, found))]
    if tied:
        return tied
    scored = {
        spec.shape[-1] for spec in program.outputs if len(spec.shape) == 3 and spec.dtype.is_floating_point
    }
    counted = [name for name in alike if _counts_up(program, name)]
    vocabulary = [name for name in alike if rows[name] in scored]
    if vocabulary:
        return [name for name in vocabulary if name not in counted] or vocabulary
    rest = [name for name in alike if name not in counted and not _is_one_number(program, name)]
    if embedded and not rest:
        return []
    chosen = rest or list(alike)
    return [name for name in chosen if rows[name] == max(rows[item] for item in chosen)]


def _scores_too(table: fx.Node) -> bool:
    """Whether values are multiplied by a table as well."""
    readers = [item for user in table.users for item in (user, *user.users)]
    return any(traits_of(item).kind in PRODUCTS for item in readers)


def _rows(table: fx.Node) -> int:
    size = plain_size(table.meta["val"].shape[0]) if table.meta["val"].dim() else 1
    return size if isinstance(size, int) else 0


def _counts_up(program: Program, name: str) -> bool:
    """Whether all rows of an input count up by one from one number in the example; padding may hold any number between."""
    value = program.example.get(name)
    if value is None or value.device.type == "meta" or value.dim() < 2 or value.shape[-1] < 2:
        return False
    steps, first = value.diff(dim=-1), value.amin(-1)
    counts = bool((steps <= 1).all()) and bool((steps == 1).float().mean() >= 0.5)
    return counts and bool((first == first.flatten()[0]).all())


def _is_one_number(program: Program, name: str) -> bool:
    """Whether an input holds one number alone in the example, as token types mostly do."""
    value = program.example.get(name)
    if value is None or value.device.type == "meta" or not value.numel():
        return False
    return bool((value == value.flatten()[0]).all())


def _is_angles(program: Program, tables: list[fx.Node]) -> bool:
    """Whether tables hold cosines and sines rather than what a model learned: they are no parameters."""
    return all(table.op != "get_attr" or str(table.target) not in program.parameters for table in tables)


def _becomes_angles(program: Program, source: fx.Node) -> bool:
    """Whether an input's values, with constants alone, end in a cosine or sine."""
    weights = walk(program.graph).weights
    reached = {source}
    for node in program.graph.nodes:
        if node.op != "call_function" or not reached.intersection(node.all_input_nodes):
            continue
        if calls(node, aten.cos, aten.sin):
            return True
        values = [item for item in node.all_input_nodes if isinstance(item.meta.get("val"), torch.Tensor)]
        known = all(item in reached or weights.get(item) for item in values)
        if known and (traits_of(node).kind in ARITHMETIC or is_elementwise(node)):
            reached.add(node)
    return False


def _is_label(program: Program, source: fx.Node) -> bool:
    """Whether an input's values reach losses alone, or are the labels of one."""
    if any(
        traits_of(user).dims is Dims.CLASS_LOSS and len(user.args) > 1 and user.args[1] is item
        for item in _values_of(source, lambda node: traits_of(node).kind in ON_THE_WAY)
        for user in item.users
        if user.op == "call_function"
    ):
        return True
    reached = {source}
    for node in program.graph.nodes:
        is_value = node.op == "call_function" and not isinstance(node.meta.get("val"), SCALARS)
        if is_value and reached.intersection(node.all_input_nodes):
            reached.add(node)
    returned: Any = output_node(program.graph).args[0]
    ends = {spec.name for spec, node in zip(program.outputs, returned) if node in reached}
    return bool(ends) and ends <= set(program.losses)
