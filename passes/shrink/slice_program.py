"""Taking units out of a program: parameters are sliced, and what calls say about sizes and places is said anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import gcd
from operator import floordiv, mul
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.coupling.coupled_dims import Labels, Spread
from bmgraph.analysis.coupling.op_rules import DimRef
from bmgraph.analysis.structure.value_origins import SPLITS, stem
from bmgraph.ir.editor import Editor
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import propagate

aten = torch.ops.aten

Kept = dict[DimRef, torch.Tensor]
"""Dimension -> bool[size]: which of its indices stay."""


def take_out(program: Program, spread: Spread, removed: Iterable[int], by: str, site: str) -> None:
    """Remove units, in place: every tensor and call that `spread` reaches becomes smaller.

    `removed` are numbers of units. The site names what has to be added: positions that are picked from a mask or bias
    which others read too.
    """
    gone = torch.tensor(sorted(removed))
    kept = {place: ~torch.isin(labels, gone) for place, labels in spread.labels.items()}
    nodes = list(dict.fromkeys(node for node, _ in kept))
    calls = _calls(nodes)
    with program.edit(by=by) as editor:
        for (reader, operand, dim), labels in spread.cuts.items():
            _pick(editor, reader, operand, dim, labels, gone, site)
        for node in calls:
            rewrite = REWRITES.get(stem(node))
            if rewrite is not None:
                rewrite(_Call(editor, node, kept, site))
        for node in nodes:
            if node.op == "get_attr":
                _slice(program, node, kept)
        for node in (*nodes, *calls):
            node.meta.pop("val", None)
        propagate(program)
    for (node, dim), mask in kept.items():
        size = node.meta["val"].shape[dim]
        assert isinstance(size, torch.SymInt) or size == int(mask.sum()), f"{node} kept its size"


def kept_places(mask: torch.Tensor) -> torch.Tensor:
    """The indices that stay."""
    return mask.nonzero().flatten()


def _calls(nodes: list[fx.Node]) -> list[fx.Node]:
    """The calls that become smaller, and those that read something that does."""
    found = dict.fromkeys(nodes) | dict.fromkeys(user for node in nodes for user in node.users)
    return [node for node in found if node.op == "call_function"]


def _slice(program: Program, node: fx.Node, kept: Kept) -> None:
    """Keep a part of a parameter or buffer, in a tensor of its own."""
    name = program.ties.get(str(node.target), str(node.target))
    table = program.parameters if name in program.parameters else program.buffers
    value = table[name]
    for dim in range(value.dim()):
        if (node, dim) in kept:
            value = value.index_select(dim, kept_places(kept[node, dim]).to(value.device))
    table[name] = value


def _pick(
    editor: Editor, reader: fx.Node, operand: fx.Node, dim: int, labels: Labels, gone: torch.Tensor, site: str
) -> None:
    """Let one reader have a part of an operand that stays whole."""
    places = kept_places(~torch.isin(labels, gone)).to(editor.program.device)
    index = editor.parameter(editor.fresh(f"{site}_kept"), places, frozen=True, part="kept")
    part = editor.call(aten.index_select.default, operand, dim, index, like=reader, site=site, part="kept")
    reader.replace_input_with(operand, part)


class _Call:
    """A call whose operands or output become smaller."""

    def __init__(self, editor: Editor, node: fx.Node, kept: Kept, site: str) -> None:
        self.editor, self.node, self.site = editor, node, site
        self._kept = kept

    def output(self, dim: int) -> torch.Tensor | None:
        """Which indices of the output stay, None where all do."""
        return self._kept.get((self.node, dim))

    def input(self, dim: int) -> torch.Tensor | None:
        """Which indices of the first argument stay, None where all do."""
        source: Any = self.node.args[0]
        return self._kept.get((source, dim))

    @property
    def rank(self) -> int:
        """Of the output."""
        return int(self.node.meta["val"].dim())


def _sizes(call: _Call, place: int = 1, first: int = 0) -> None:
    """Argument `place` lists the sizes of the output's dimensions from `first` on."""
    listed: Any = call.node.args[place]
    sizes = list(listed)
    for offset, size in enumerate(sizes):
        mask = call.output(first + offset)
        if mask is None or size == -1:
            continue
        left, whole = int(mask.sum()), len(mask)
        sizes[offset] = (
            _scaled(call, size, left, whole) if isinstance(size, fx.Node) else size * left // whole
        )
    call.node.update_arg(place, sizes)


def _scaled(call: _Call, size: fx.Node, left: int, whole: int) -> fx.Node:
    """A dynamic size of which `left` parts of `whole` stay."""
    common = gcd(left, whole)
    more = call.editor.call(mul, size, left // common, like=call.node)
    return call.editor.call(floordiv, more, whole // common, like=call.node)


def _unflatten(call: _Call) -> None:
    _sizes(call, place=2, first=_axis(call.node, 1))


def _below(mask: torch.Tensor, place: Any) -> Any:
    """A place among all indices as one among those that stay."""
    if place is None or not isinstance(place, int) or place >= len(mask):
        return place
    return int(mask[: max(0, place + len(mask) if place < 0 else place)].sum())


def _cut(call: _Call) -> None:
    """slice(x, dim, start, end)."""
    mask = call.input(_axis(call.node, 1))
    if mask is None:
        return
    for place in (2, 3):
        if len(call.node.args) > place:
            call.node.update_arg(place, _below(mask, call.node.args[place]))


def _select(call: _Call) -> None:
    """select(x, dim, index)."""
    mask = call.input(_axis(call.node, 1))
    if mask is not None:
        call.node.update_arg(2, _below(mask, call.node.args[2]))


def _split(call: _Call) -> None:
    """Parts may be of different sizes afterwards, so every split says them all."""
    dim = _axis(call.node, 2)
    mask = call.input(dim)
    if mask is None:
        return
    values: Any = call.node.meta["val"]
    sizes = [int(value.shape[dim]) for value in values]
    call.node.target = aten.split_with_sizes.default
    call.node.args = (call.node.args[0], [int(part.sum()) for part in torch.split(mask, sizes)], dim)


def _index_select(call: _Call) -> None:
    """index_select(x, dim, places)."""
    _renumber(call, _axis(call.node, 1), call.node.args[2])


def _index(call: _Call) -> None:
    """index(x, [None, places, ...])."""
    indices: Any = call.node.args[1]
    for dim, index in enumerate(indices):
        _renumber(call, dim, index)


def _renumber(call: _Call, dim: int, index: Any) -> None:
    """Fixed places along a dimension, as those among what stays; places of what goes are dropped."""
    mask = call.input(dim)
    if mask is None or index is None:
        return
    program = call.editor.program
    old = program.tensor(str(index.target)).cpu()
    old = torch.where(old < 0, old + len(mask), old)
    new = (mask.cumsum(0) - 1)[old[mask[old]]].to(program.device)
    name = call.editor.fresh(f"{call.site}_places")
    call.node.replace_input_with(index, call.editor.parameter(name, new, frozen=True, part="places"))


def _norm(call: _Call) -> None:
    """layer_norm(x, sizes, ...) over the last dimensions."""
    sizes: Any = call.node.args[1]
    _sizes(call, first=call.rank - len(sizes))


def _repeat_interleave(call: _Call) -> None:
    """repeat_interleave(x, times, dim, output_size=...)."""
    mask = call.output(_axis(call.node, 2))
    if mask is not None and call.node.kwargs.get("output_size") is not None:
        call.node.update_kwarg("output_size", int(mask.sum()))


def _axis(node: fx.Node, place: int) -> int:
    """The dimension that an argument names, counted from the left; the first by default."""
    source: Any = node.args[0]
    dim: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    return int(dim) % int(source.meta["val"].dim())


REWRITES: dict[str, Callable[[_Call], None]] = {
    "reshape": _sizes,
    "view": _sizes,
    "expand": _sizes,
    "unflatten": _unflatten,
    "slice": _cut,
    "select": _select,
    "index": _index,
    "index_select": _index_select,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(SPLITS - {"unbind"}, _split),
}
"""Operator -> what says its sizes and places anew; all others follow their operands."""
