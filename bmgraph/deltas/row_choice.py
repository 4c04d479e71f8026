"""Puts stacks of deltas on linears, of which each row of a batch gathers its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from bmgraph.analysis.structure.sites import Linear
from bmgraph.deltas.delta_calls import DeltaCalls, delta_input
from bmgraph.deltas.family import Change, Part, Room
from bmgraph.errors import MisplacedError, PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.pass_record import Edit
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import dim_text
from bmgraph.utils.finite import is_finite

if TYPE_CHECKING:
    from bmgraph.deltas.linear_family import LinearFamily

aten = torch.ops.aten


def attach_stacks(
    family: LinearFamily,
    editor: Editor,
    selector: fx.Node,
    parts: Mapping[int, Part],
    names: tuple[str, ...],
    changes: Mapping[Linear, Mapping[int, Change]],
    room: Room,
) -> list[Edit]:
    """Stack the changes of each linear, by number, and let row i take entry `selector[i]`; see `DeltaFamily.attach_rows`."""
    options = _options_of_all(family, parts, names)
    nodes = {node.name: node for node in editor.graph.nodes}
    sources = family.sources(editor.program)
    alike = _Alike(family, editor, parts, names)
    edits = []
    for linear, by_number in changes.items():
        stacked = family.stacked(by_number, len(names))
        _check_stacked(family, linear.name, stacked, len(names))
        stacked = with_rank(family, linear.name, stacked, room.rank)
        uses = [nodes[use.node] for use in linear.uses]
        readers = _stacked_parameters(family, editor, linear.name, stacked, uses[0], room.dtype)
        for use in uses:
            x = _input_of_rows(editor.program, linear.name, delta_input(use), selector)
            source = _source(family, editor.program, linear.name, sources.get(use.name), nodes, selector)
            call = DeltaCalls(editor, use, linear.name, family.role_for(stacked), source, options)
            chosen = {
                key: call(aten.index_select.default, reader, 0, selector) for key, reader in readers.items()
            }
            if room.dtype not in (None, use.meta["val"].dtype):
                chosen = {
                    key: call(aten._to_copy.default, value, dtype=use.meta["val"].dtype)
                    for key, value in chosen.items()
                }
            family.build_rows(call, x, chosen | alike.read(linear.name, by_number, use))
        who = ", ".join(names[number - 1] for number in by_number)
        free = names.count("")
        size = sum(editor.program.tensor(str(reader.target)).nbytes for reader in readers.values()) / 1e6
        more = f"; {free} more have room, {size:.2f} MB in all" if free else ""
        edits.append(Edit(linear.name, f"{family.describe(stacked)}: {who}{more}"))
    return edits


def with_rank(family: LinearFamily, site: str, stacked: Change, rank: int | None) -> Change:
    """Stacked changes with room for a rank, filled up with what changes nothing.

    Raises PassError for a family without ranks, and where a delta has a larger one.
    """
    if rank is None:
        return stacked
    axes = family.rank_axes
    if not axes:
        raise PassError(
            f"rank={rank}: deltas of the family {family.name!r} have no rank; leave it out, their entries have one size"
        )
    grown = dict(stacked.tensors)
    for key, axis in axes.items():
        tensor = grown[key]
        if tensor.shape[axis] > rank:
            raise PassError(
                f"{site} has a delta of rank {tensor.shape[axis]}: rank={rank} must be at least that"
            )
        sizes = list(tensor.shape)
        sizes[axis] = rank
        nothing = float(tensor[0].reshape(-1)[0]) if tensor.device.type != "meta" else 0.0
        grown[key] = tensor.new_full(sizes, nothing)
        grown[key][tuple(slice(size) for size in tensor.shape)] = tensor
    return Change(grown, stacked.numbers)


def _options_of_all(
    family: LinearFamily, parts: Mapping[int, Part], names: tuple[str, ...]
) -> Mapping[str, Any]:
    """The options of deltas of which rows choose; raises PassError where one differs that they must have alike."""
    first, *others = parts
    for option in family.alike:
        for number in others:
            mine, other = (parts[item].options.get(option) for item in (first, number))
            if mine != other:
                raise PassError(
                    f"deltas {names[first - 1]!r} and {names[number - 1]!r} have {option}={mine!r} and {other!r}: rows can choose "
                    f"among deltas of the family {family.name!r} with one {option} alone"
                )
    return parts[first].options


class _Alike:
    """The tensors that all deltas of a family have alike: parameters of their own, which no row chooses."""

    def __init__(
        self, family: LinearFamily, editor: Editor, parts: Mapping[int, Part], names: tuple[str, ...]
    ) -> None:
        self._family, self._editor, self._parts, self._names = family, editor, parts, names
        self._made: dict[str, tuple[int, torch.Tensor, str]] = {}
        """Key -> the number of the delta that it was taken of, its value, and its name in the program."""

    def read(self, site: str, by_number: Mapping[int, Change], use: fx.Node) -> dict[str, fx.Node]:
        """The nodes that read them, by key; raises PassError where the deltas of a linear have other values than the rest."""
        readers: dict[str, fx.Node] = {}
        for key in self._family.alike:
            for number, change in by_number.items():
                if key in change.tensors:
                    readers[key] = self._reader(site, key, number, change.tensors[key], use)
        return readers

    def _reader(self, site: str, key: str, number: int, tensor: torch.Tensor, use: fx.Node) -> fx.Node:
        role = self._family.roles[0]
        if key not in self._made:
            program = self._editor.program
            name = self._editor.fresh(f"{self._family.name}_deltas_{key}")
            value = tensor.to(device=program.device, dtype=use.meta["val"].dtype)
            node = self._editor.parameter(name, value, frozen=True, part=role)
            node.meta["site"] = site
            self._made[key] = (number, tensor, name)
            return node
        first, value, name = self._made[key]
        if value is not tensor and not (value.shape == tensor.shape and torch.equal(value, tensor)):
            raise PassError(
                f"deltas {self._names[first - 1]!r} and {self._names[number - 1]!r} have different matrices {key!r}, which deltas of "
                f"the family {self._family.name!r} share: rows can choose only among those that were made with the same ones"
            )
        return self._editor.read(name)


def _source(
    family: LinearFamily,
    program: Program,
    site: str,
    source: fx.Node | None,
    nodes: Mapping[str, fx.Node],
    selector: fx.Node,
) -> fx.Node | None:
    """The input of another linear that a delta reads, if the family has one; it must have a row per row of the batch."""
    if not family.reads_elsewhere:
        return None
    if source is None:
        raise MisplacedError(
            f"{site} takes no delta of the family {family.name!r}: it does not end an attention or a feed-forward, whose "
            "input the delta would read"
        )
    return _input_of_rows(program, site, delta_input(nodes[source.name]), selector)


def _check_stacked(family: LinearFamily, site: str, stacked: Change, count: int) -> None:
    """Raise PassError unless each stacked tensor has one entry for each number, 0 to `count`."""
    for key, tensor in stacked.tensors.items():
        if not tensor.dim() or len(tensor) != count + 1:
            raise PassError(
                f"{site}: the family {family.name!r} stacks {count} deltas as {key} of shape {list(tensor.shape)}: expected "
                f"{count + 1} entries along the first axis, of which entry 0 changes nothing"
            )


def _stacked_parameters(
    family: LinearFamily, editor: Editor, site: str, stacked: Change, like: fx.Node, dtype: torch.dtype | None
) -> dict[str, fx.Node]:
    """The nodes that read the stacked tensors of one linear, which are frozen.

    Raises PassError for numbers that are too large for `dtype`.
    """
    program, readers = editor.program, {}
    for key, tensor in stacked.to(dtype or like.meta["val"].dtype, program.device).tensors.items():
        if dtype is not None and not is_finite(tensor):
            raise PassError(f"{site}: a delta has numbers in {key} that {dtype} cannot hold: leave dtype out")
        name = editor.fresh(f"{site}_deltas_{key}")
        readers[key] = editor.parameter(name, tensor, frozen=True, part=family.roles[0])
    for reader in readers.values():
        reader.meta["site"] = site
    return readers


def _input_of_rows(program: Program, site: str, x: fx.Node, selector: fx.Node) -> fx.Node:
    """A value that a delta reads, which must have one row per row of the batch; raises PassError where it has not."""
    sizes = x.meta["val"].shape
    rows, expected = (dim_text(program, size) for size in (sizes[0], selector.meta["val"].shape[0]))
    if len(sizes) < 2 or rows != expected:
        raise PassError(
            f"{site} takes {rows} rows where the batch has {expected}: deltas cannot be selected per row there; merge "
            "one delta, or use deltas that do not change that linear"
        )
    return x
