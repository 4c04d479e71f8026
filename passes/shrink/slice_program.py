"""Removes units from a program: slices parameters, and updates the sizes and indices in calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import gcd
from operator import floordiv, mul
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.coupling.coupled_dims import Labels, Spread
from bmgraph.analysis.coupling.op_rules import DimRef
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import NodeRole
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import propagate

aten = torch.ops.aten

Kept = dict[DimRef, torch.Tensor]
"""Dimension -> bool[size]: which of its indices stay."""


def remove_units(program: Program, spread: Spread, removed: Iterable[int], by: str, site: str) -> None:
    """Remove units in place: every tensor and call that `spread` reaches shrinks.

    `removed` are indices of units. `site` names new parameters: indices into a mask or bias that other calls read whole, and
    into an output that keeps its size.
    """
    removed_units = torch.tensor(sorted(removed))
    kept = {dim: ~torch.isin(labels, removed_units) for dim, labels in spread.labels.items()}
    nodes = list(dict.fromkeys(node for node, _ in kept))
    calls = _calls(nodes)
    with program.edit(by=by) as editor:
        for (reader, operand, dim), labels in spread.cuts.items():
            _select_kept(editor, reader, operand, dim, labels, removed_units, site)
        for node in calls:
            rewrite = REWRITES.get(getattr(node.target, "overloadpacket", None))
            if rewrite is not None:
                rewrite(_Call(editor, node, kept, site))
        for node in nodes:
            if node.op == "get_attr":
                _slice_tensor(program, node, kept)
        for node in (*nodes, *calls):
            node.meta.pop("val", None)
        propagate(program)
        for (node, dim), labels in spread.outputs.items():
            _refill(editor, node, dim, ~torch.isin(labels, removed_units), site)
    for (node, dim), mask in kept.items():
        size = node.meta["val"].shape[dim]
        assert isinstance(size, torch.SymInt) or size == int(mask.sum()), f"{node} kept its size"


def _kept_indices(mask: torch.Tensor) -> torch.Tensor:
    """The indices that stay."""
    return mask.nonzero().flatten()


def _calls(nodes: list[fx.Node]) -> list[fx.Node]:
    """The calls that shrink or read something that does."""
    found = dict.fromkeys(nodes) | dict.fromkeys(user for node in nodes for user in node.users)
    return [node for node in found if node.op == "call_function"]


def _slice_tensor(program: Program, node: fx.Node, kept: Kept) -> None:
    """Replace a parameter or buffer by the part that stays, in new memory."""
    name = program.ties.get(str(node.target), str(node.target))
    table = program.parameters if name in program.parameters else program.buffers
    value = table[name]
    for dim in range(value.dim()):
        if (node, dim) in kept:
            value = value.index_select(dim, _kept_indices(kept[node, dim]).to(value.device))
    table[name] = value


def _select_kept(
    editor: Editor,
    reader: fx.Node,
    operand: fx.Node,
    dim: int,
    labels: Labels,
    removed_units: torch.Tensor,
    site: str,
) -> None:
    """Let one reader select the part that stays of an operand that is not sliced."""
    indices = _kept_indices(~torch.isin(labels, removed_units)).to(editor.program.device)
    index = editor.parameter(editor.fresh(f"{site}_kept"), indices, frozen=True, part=NodeRole.KEPT)
    part = editor.call(
        aten.index_select.default, operand, dim, index, like=reader, site=site, part=NodeRole.KEPT
    )
    reader.replace_input_with(operand, part)


def _refill(editor: Editor, node: fx.Node, dim: int, kept: torch.Tensor, site: str) -> None:
    """Let the outputs of the program have their size, with zeros in the place of what is gone."""
    output = output_node(editor.graph)
    left = int(kept.sum())
    places = torch.where(kept, kept.cumsum(0) - 1, left).to(editor.program.device)
    index = editor.parameter(editor.fresh(f"{site}_places"), places, frozen=True, part=NodeRole.PLACES)
    widths = [0, 0] * (int(node.meta["val"].dim()) - 1 - dim) + [0, 1]
    padded = editor.call(
        aten.constant_pad_nd.default, node, widths, like=output, site=site, part=NodeRole.PLACES
    )
    whole = editor.call(
        aten.index_select.default, padded, dim, index, like=output, site=site, part=NodeRole.PLACES
    )
    output.replace_input_with(node, whole)


class _Call:
    """A call whose operands or output shrink."""

    def __init__(self, editor: Editor, node: fx.Node, kept: Kept, site: str) -> None:
        self.editor, self.node, self.site = editor, node, site
        self._kept = kept

    def output(self, dim: int) -> torch.Tensor | None:
        """Which indices of the output stay; None if all do."""
        return self._kept.get((self.node, dim))

    def input(self, dim: int) -> torch.Tensor | None:
        """Which indices of the first argument stay; None if all do."""
        source: Any = self.node.args[0]
        return self._kept.get((source, dim))

    @property
    def rank(self) -> int:
        """The number of dimensions of the output."""
        return int(self.node.meta["val"].dim())


def _sizes(call: _Call, position: int = 1, first: int = 0) -> None:
    """Update argument `position`, the sizes of the output's dimensions from `first` on."""
    listed: Any = call.node.args[position]
    sizes = list(listed)
    for offset, size in enumerate(sizes):
        mask = call.output(first + offset)
        if mask is None or size == -1:
            continue
        left, whole = int(mask.sum()), len(mask)
        sizes[offset] = (
            _scale_size(call, size, left, whole) if isinstance(size, fx.Node) else size * left // whole
        )
    call.node.update_arg(position, sizes)


def _scale_size(call: _Call, size: fx.Node, left: int, whole: int) -> fx.Node:
    """A dynamic size times `left` / `whole`."""
    common = gcd(left, whole)
    scaled = call.editor.call(mul, size, left // common, like=call.node)
    return call.editor.call(floordiv, scaled, whole // common, like=call.node)


def _unflatten(call: _Call) -> None:
    _sizes(call, position=2, first=_axis(call.node, 1))


def _shifted(mask: torch.Tensor, index: Any) -> Any:
    """An index among all as an index among those that stay."""
    if index is None or not isinstance(index, int) or index >= len(mask):
        return index
    return int(mask[: max(0, index + len(mask) if index < 0 else index)].sum())


def _update_slice(call: _Call) -> None:
    """slice(x, dim, start, end)."""
    mask = call.input(_axis(call.node, 1))
    if mask is None:
        return
    steps = len(call.node.args) > 4 and call.node.args[4] != 1
    for position in (3,) if steps else (2, 3):  # a step takes one of each block, and whole blocks are removed
        if len(call.node.args) > position:
            call.node.update_arg(position, _shifted(mask, call.node.args[position]))


def _select(call: _Call) -> None:
    """select(x, dim, index)."""
    mask = call.input(_axis(call.node, 1))
    if mask is not None:
        call.node.update_arg(2, _shifted(mask, call.node.args[2]))


def _split(call: _Call) -> None:
    """Becomes split_with_sizes, since parts may have different sizes afterwards."""
    dim = _axis(call.node, 2)
    mask = call.input(dim)
    if mask is None:
        return
    values: Any = call.node.meta["val"]
    sizes = [int(value.shape[dim]) for value in values]
    call.node.target = aten.split_with_sizes.default
    call.node.args = (call.node.args[0], [int(part.sum()) for part in torch.split(mask, sizes)], dim)


def _index_select(call: _Call) -> None:
    """index_select(x, dim, indices)."""
    _renumber(call, _axis(call.node, 1), call.node.args[2])


def _index(call: _Call) -> None:
    """index(x, [None, indices, ...])."""
    indices: Any = call.node.args[1]
    for dim, index in enumerate(indices):
        _renumber(call, dim, index)


def _renumber(call: _Call, dim: int, index: Any) -> None:
    """Renumber constant indices along a dimension to those that stay; indices of removed elements are dropped."""
    mask = call.input(dim)
    if mask is None or index is None:
        return
    program = call.editor.program
    old = program.tensor(str(index.target)).cpu()
    old = torch.where(old < 0, old + len(mask), old)
    new = (mask.cumsum(0) - 1)[old[mask[old]]].to(program.device)
    name = call.editor.fresh(f"{call.site}_places")
    call.node.replace_input_with(index, call.editor.parameter(name, new, frozen=True, part=NodeRole.PLACES))


def _norm(call: _Call) -> None:
    """layer_norm(x, sizes, ...) over the last dimensions."""
    sizes: Any = call.node.args[1]
    _sizes(call, first=call.rank - len(sizes))


def _attention(call: _Call) -> None:
    """The scale of the scores stays what it was, where it follows from the number of features of a head."""
    mask = call.input(call.rank - 1)
    if mask is not None and call.node.kwargs.get("scale") is None:
        call.node.update_kwarg("scale", len(mask) ** -0.5)


def _repeat_interleave(call: _Call) -> None:
    """repeat_interleave(x, times, dim, output_size=...): where x stays whole, each of its elements is repeated fewer times."""
    axis = _axis(call.node, 2)
    mask = call.output(axis)
    if mask is None:
        return
    times = call.node.args[1]
    if call.input(axis) is None and isinstance(times, int):
        call.node.update_arg(1, int(mask[:times].sum()))
    if call.node.kwargs.get("output_size") is not None:
        call.node.update_kwarg("output_size", int(mask.sum()))


def _axis(node: fx.Node, position: int) -> int:
    """The dimension that an argument names, counted from the left; the first by default."""
    source: Any = node.args[0]
    dim: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return int(dim) % int(source.meta["val"].dim())


REWRITES: dict[Any, Callable[[_Call], None]] = {
    **dict.fromkeys((aten.reshape, aten.view, aten.expand), _sizes),
    aten.unflatten: _unflatten,
    aten.slice: _update_slice,
    aten.select: _select,
    aten.index: _index,
    aten.index_select: _index_select,
    **dict.fromkeys((aten.layer_norm, aten.rms_norm), _norm),
    aten.repeat_interleave: _repeat_interleave,
    aten.scaled_dot_product_attention: _attention,
    **dict.fromkeys((aten.chunk, aten.split, aten.split_with_sizes, aten.tensor_split), _split),
}
"""Operator -> the function that updates its sizes and indices; other operators follow their operands."""
