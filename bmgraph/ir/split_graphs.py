"""Splits a program of one graph into the graphs that it was joined from (`joined_graphs`), after passes changed it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from bmgraph.errors import VerificationError
from bmgraph.ir.joined_graphs import HANDED, Part, renamed
from bmgraph.ir.omitted_inputs import outputs_of
from bmgraph.ir.program import Program, output_node, placeholders
from bmgraph.ir.shape_inference import dims, propagate
from bmgraph.ir.signature import Signature
from bmgraph.ir.symbolic_dim import is_name, names_of
from bmgraph.ir.tensor_spec import Dim, Range, TensorSpec

aten = torch.ops.aten


def split(joined: Program, parts: Sequence[Part]) -> Program:
    """The program with the graphs that it was joined from (itself if there are no parts), as `with_new_outputs` has them.

    Each graph takes the inputs that were added and that it reads. Raises VerificationError where graphs cannot be told
    apart any more: an output or a value that one handed to another is gone, or one reads what only another one takes.
    """
    if not parts:
        return joined
    program = joined.clone()
    handed = {str(node.meta[HANDED]): node for node in joined.graph.nodes if _is_handed(node)}
    known = {spec.name for part in parts for spec in part.signature.inputs}
    added = [spec.name for spec in joined.inputs if spec.name not in known]
    program.graphs, program.signatures = {}, {}
    for part in parts:
        lost = [name for name in part.fed if name not in handed]
        lost += [name for name in part.outputs if all(spec.name != name for spec in joined.outputs)]
        if lost:
            raise VerificationError(
                f"graph {part.name!r} has lost {', '.join(map(repr, sorted(lost)))}, which it returns or takes from another "
                "graph: a pass must keep what graphs hand to each other, and their outputs"
            )
        _add_part(program, joined, part, handed, added)
    propagate(program, everything=True)
    for part in parts:
        entry = program.at(part.name)
        returned: Any = output_node(entry.graph).args[0]
        entry.outputs = tuple(
            replace(spec, dtype=node.meta["val"].dtype, shape=dims(entry, node.meta["val"]))
            for spec, node in zip(part.signature.outputs, returned)
        )
    for part in parts:  # in running order, so that examples of graphs that feed others are there
        _check_handed(program.at(part.name))
        _complete_example(program.at(part.name), joined.example)
    return program


def with_new_outputs(joined: Program, parts: Sequence[Part]) -> Sequence[Part]:
    """The parts, of which the entry returns what it still does of its outputs and those that no graph had: passes may put others in
    their place."""
    known = {name for part in parts for name in part.outputs}
    new = [spec for spec in joined.outputs if spec.name not in known]
    entry = next((part for part in parts if part.name == joined.entry), None)
    if not new or entry is None:
        return parts
    own = dict(zip(entry.outputs, entry.signature.outputs)) | {spec.name: spec for spec in new}
    kept = {spec.name: own[spec.name] for spec in joined.outputs if spec.name in own}
    changed = replace(
        entry,
        outputs=tuple(kept),
        signature=replace(entry.signature, outputs=tuple(kept.values())),
    )
    return [changed if part is entry else part for part in parts]


def _is_handed(node: fx.Node) -> bool:
    return HANDED in node.meta and node.target is aten.clone.default


def _add_part(
    program: Program, joined: Program, part: Part, handed: Mapping[str, fx.Node], added: Sequence[str]
) -> None:
    """Add one graph, without shapes, with the inputs of its signature."""
    own = {spec.name for spec in part.signature.inputs} | set(added)
    cuts = {handed[name]: name for name in part.fed}
    sources = {name: node for name, node in placeholders(joined.graph).items() if name in own}
    sources |= {name: node for node, name in cuts.items()}
    outputs: Any = output_node(joined.graph).args[0]
    names = [spec.name for spec in joined.outputs]
    by_name = dict(zip(names, outputs)) | dict(zip(joined.writes, outputs[len(names) :]))
    given = {
        name: handed[spec.name]
        for name, spec in zip(part.outputs, part.signature.outputs)
        if spec.name in handed
    }
    by_name |= {
        name: node.args[0] for name, node in given.items()
    }  # uncut by what shortens outputs, such as a prompt
    returned = [by_name[name] for name in (*part.outputs, *part.signature.writes)]
    copier = _Copier(part.name, joined.graph, sources, cuts)
    needed = copier.needed(returned)
    order = [spec.name for spec in part.signature.inputs if spec.name in sources]
    order += [name for name in added if sources[name] in needed]
    program.graphs[part.name] = copier.copied(order, returned, needed)
    program.signatures[part.name] = _signature(joined, part, handed, order)


def _signature(joined: Program, part: Part, handed: Mapping[str, fx.Node], order: Sequence[str]) -> Signature:
    """The signature of a graph with the inputs in `order`; its outputs are as they were."""
    back: dict[str, Dim] = {str(there): own for own, there in part.sizes.items() if is_name(there)}
    specs = {spec.name: spec for spec in joined.inputs}
    external = {
        name: replace(specs[name], shape=tuple(renamed(dim, back) for dim in specs[name].shape))
        for name in order
        if name in specs and name not in part.fed
    }
    sizes = {dim for spec in external.values() for dim in spec.shape if is_name(dim)}
    before = {spec.name: spec for spec in part.signature.inputs}
    fed = {
        name: _fed_spec(before[name], joined, handed[name], back, sizes) for name in order if name in part.fed
    }
    ranges = {renamed(name, back): bounds for name, bounds in joined.ranges.items()}
    inputs = tuple({**external, **fed}[name] for name in order)
    used = {dim for spec in inputs for dim in spec.shape if isinstance(dim, str)}
    return replace(
        part.signature,
        inputs=inputs,
        ranges={
            **{name: bounds for name, bounds in part.signature.ranges.items() if name not in used},
            **{
                str(name): ranges.get(name, Range())
                for name in sorted(used)
                if name in ranges or is_name(name)
            },
        },
        symbols={},
        losses=tuple(
            spec.name for name, spec in zip(part.outputs, part.signature.outputs) if name in joined.losses
        ),
        ignored=tuple(
            dict.fromkeys(
                (
                    *part.signature.ignored,
                    *(spec.name for spec in part.signature.inputs if spec.name in joined.ignored),
                )
            )
        ),
    )


def _fed_spec(
    before: TensorSpec, joined: Program, node: fx.Node, back: Mapping[str, Dim], sizes: set[Dim]
) -> TensorSpec:
    """The spec of an input that another graph gives.

    A size that is an expression now, such as a sequence behind a prompt, is named as before if it was a name that no other
    input has; else it stays an expression, if its names are those of other inputs.
    """
    shape: list[Dim] = []
    for was, dim in zip(before.shape, (renamed(dim, back) for dim in dims(joined, node.meta["val"]))):
        if isinstance(dim, str) and not is_name(dim) and not sizes.issuperset(names_of(dim) or (None,)):
            free = is_name(was) and was not in sizes
            dim = was if free else f"{before.name}_{len(shape)}"
        shape.append(dim)
    return replace(before, dtype=node.meta["val"].dtype, shape=tuple(shape))


class _Copier:
    """Copies what one graph needs out of the joined one; `cuts` are the values that it takes as inputs."""

    def __init__(
        self, name: str, graph: fx.Graph, sources: Mapping[str, fx.Node], cuts: Mapping[fx.Node, str]
    ) -> None:
        self._name, self._graph, self._sources, self._cuts = name, graph, sources, cuts
        own = set(sources.values())
        self._foreign: set[fx.Node] = set()
        """What is computed from inputs that only other graphs take."""
        for node in graph.nodes:
            if node in own:
                continue
            if node.op == "placeholder" or any(item in self._foreign for item in node.all_input_nodes):
                self._foreign.add(node)
        self._size_sources = {
            size.node.expr: (node, axis)
            for node in reversed(list(sources.values()))
            for axis, size in enumerate(node.meta["val"].shape)
            if isinstance(size, torch.SymInt)
        }

    def needed(self, returned: Sequence[fx.Node]) -> set[fx.Node]:
        """The nodes to copy. Raises VerificationError where one reads what only another graph takes."""
        found: set[fx.Node] = set()
        left = list(returned)
        while left:
            node = left.pop()
            if node in found:
                continue
            found.add(node)
            if node in self._cuts or node.op == "placeholder":
                if node in self._foreign:
                    raise VerificationError(
                        f"graph {self._name!r} reads the input {node.target!r} now, which only another graph takes: a pass must "
                        "keep what graphs hand to each other"
                    )
                continue
            own_size = self._own_size(node)
            left += node.all_input_nodes if own_size is None else [own_size[0]]
        return found

    def _own_size(self, node: fx.Node) -> tuple[fx.Node, int] | None:
        """Where to read a size that the joined graph reads of another graph's input; None for all other nodes."""
        value = node.meta.get("val")
        if node not in self._foreign or not isinstance(value, torch.SymInt):
            return None
        return self._size_sources.get(value.node.expr)

    def copied(self, inputs: Sequence[str], returned: Sequence[fx.Node], needed: set[fx.Node]) -> fx.Graph:
        """The graph, with placeholders in the order of `inputs`."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for name in inputs:
            source = self._sources[name]
            copies[source] = graph.placeholder(name)
            copies[source].meta = _without_value(source) if source.op == "placeholder" else {}
        for node in self._graph.nodes:
            if node not in needed or node in copies:
                continue
            own_size = self._own_size(node)
            if own_size is not None:
                source, axis = own_size
                copies[node] = graph.call_function(aten.sym_size.int, (copies[source], axis))
            else:
                copies[node] = graph.node_copy(node, lambda item: copies[item])
            copies[node].meta = _without_value(node)
        graph.output(tuple(copies[node] for node in returned))
        return graph


def _without_value(node: fx.Node) -> dict[str, Any]:
    return {key: value for key, value in node.meta.items() if key not in ("val", HANDED)}


def _check_handed(program: Program) -> None:
    """Raise VerificationError where an input is no longer what another graph gives."""
    taken = {spec.name: spec for spec in program.inputs}
    for feeder in program.feeders():
        for spec in feeder.outputs:
            wanted = taken.get(spec.name)
            if wanted is not None and (wanted.dtype != spec.dtype or len(wanted.shape) != len(spec.shape)):
                raise VerificationError(
                    f"graph {program.entry!r} takes {wanted}, and graph {feeder.entry!r} gives {spec}: a pass must keep what "
                    "graphs hand to each other"
                )


def _complete_example(program: Program, example: Mapping[str, torch.Tensor]) -> None:
    """Take the example of a graph from that of the joined one; what other graphs give is computed."""
    feeders = program.feeders()
    given = dict(example)
    if example and feeders and program.device.type != "meta":
        given |= outputs_of(
            feeders, {**example, **{k: v for feeder in feeders for k, v in feeder.example.items()}}
        )
    program.example = {spec.name: given[spec.name] for spec in program.inputs if spec.name in given}
