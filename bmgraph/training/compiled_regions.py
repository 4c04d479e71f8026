"""Runs of elementwise calls, reductions and views of a step graph, each compiled by torch.compile (Inductor) into kernels.

Products, attention, collectives and what writes to memory in place stay calls of their own, in their order. Regions of equal
structure, such as those of equal layers, share what is compiled. A compiled region is compared with the calls that it
replaces the first time that it runs; one that differs, or cannot be compiled, stays as it is.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

from bmgraph.ops.fusible import is_fusible, is_view
from bmgraph.ops.trait_row import Dims
from bmgraph.ops.traits import row_of
from bmgraph.utils.graph_copies import copy_node

NEAR = 4
"""So many calls of other kinds may stand between an elementwise call and its user, for the two to come together."""
FEWEST = 2
"""A region computes with so many calls at least; a single one has a kernel already."""
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest relative distance (L2) of a compiled region's result from that of its calls, by the coarsest type of the region: a
compiled chain rounds its result alone."""

Values = Sequence[Any]


class Region:
    """Calls of one structure: run one by one until their compiled form is known to agree."""

    def __init__(self, graph: fx.Graph, regions: CompiledRegions) -> None:
        self._module = fx.GraphModule({}, graph)
        self._regions = regions
        self._tolerance = max(
            CLOSE.get(value.dtype, 0.0) for node in graph.nodes if (value := _tensor(node)) is not None
        )
        self._call: Callable[..., Values] | None = None

    @property
    def compiled(self) -> bool:
        """Whether it runs compiled, and no longer its calls."""
        return self._call is not None and self._call is not self._module

    def __call__(self, *values: Any) -> Values:
        if self._call is not None:
            return self._call(*values)
        expected: Values = self._module(*values)
        if self._regions.failed:
            self._call = self._module
            return expected
        if any(bool(value.isnan().any()) for value in expected):
            return expected  # says nothing; the next run may
        compiled = torch.compile(self._module, fullgraph=True)
        try:
            found = compiled(*values)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            self._regions.failed = first[:200]
            warnings.warn(
                f"torch_compile: a step runs as it is, since torch.compile fails: {first[:200]}", stacklevel=2
            )
            self._call = self._module
            return expected
        apart = [
            text
            for pair in zip(found, expected, strict=True)
            if (text := _difference(*pair, self._tolerance))
        ]
        if apart:
            self._regions.kept_apart.append(f"{self._module.graph}: {'; '.join(apart)}")
        self._call = self._module if apart else compiled
        return expected


@dataclass
class CompiledRegions:
    """The compiled regions of a step, by structure. `kept_apart`: those that differ from their calls and stay these,
    with how far; `failed`: why none is compiled; `places`: how many regions the graphs have."""

    by_structure: dict[str, Region] = field(default_factory=dict)
    kept_apart: list[str] = field(default_factory=list)
    failed: str = ""
    places: int = 0

    def replace(self, graph: fx.Graph) -> None:
        """Let regions of a graph, in the form that runs, be compiled; in place."""
        _gather_items(graph)
        _delay(graph)
        for run in list(_runs(graph)):
            region = _chosen(run)
            if region is not None:
                self._place(graph, region)

    def _place(self, graph: fx.Graph, chosen: _Chosen) -> None:
        body, inputs = _body(chosen)
        key = _structure(body)
        if key not in self.by_structure:
            self.by_structure[key] = Region(body, self)
        self.places += 1
        shared = self.by_structure[key]

        def compiled_region(*values: Any) -> Values:  # a module's name for it must be a function
            return shared(*values)

        with graph.inserting_after(chosen.last):
            call = graph.call_function(compiled_region, tuple(inputs))
        at, outside = call, dict[fx.Node, fx.Node]()
        for place, member in enumerate(chosen.results):
            with graph.inserting_after(at):
                at = graph.call_function(operator.getitem, (call, place))
            outside[member] = at
        for view in chosen.views:
            source, target = cast("fx.Node", view.args[0]), cast("Callable[..., Any]", view.target)
            with graph.inserting_after(at):
                at = graph.call_function(target, (outside[source], *view.args[1:]), view.kwargs)
            outside[view] = at
        for member, stands in outside.items():
            stands.meta = dict(member.meta)
            member.replace_all_uses_with(stands)
        for member in reversed(chosen.members):
            graph.erase_node(member)
        for view in reversed(chosen.views):
            if view not in chosen.members:
                graph.erase_node(view)


@dataclass
class _Chosen:
    """Calls in the order of the graph: those of a region, those whose results others read, and views of these results that
    others read; `last`: the last in the graph."""

    members: list[fx.Node]
    results: list[fx.Node]
    views: list[fx.Node]
    last: fx.Node


def _gather_items(graph: fx.Graph) -> None:
    """Put the items of a result right behind the call that gives it."""
    for node in list(graph.nodes):
        source: Any = node.args[0] if node.args else None
        if node.target is operator.getitem and source.op == "call_function":
            source.append(node)


def _delay(graph: fx.Graph) -> None:
    """Put an elementwise call of one tensor in front of its one user, where that is fusible too and only a few other calls
    stand between: these part them no longer. What it reads must be a computed value that nothing writes to, and no larger
    than its result, since it is kept for longer."""
    written, apart, count = _written(graph), dict[fx.Node, int](), 0
    for node in graph.nodes:
        count += node.op == "call_function" and not _moves(node) and not is_fusible(node.target)
        apart[node] = count
    for node in reversed(list(graph.nodes)):
        sources = node.all_input_nodes
        if (
            len(node.users) != 1
            or len(sources) != 1
            or not _is_computing(node)
            or node.target._schema.is_mutable
        ):
            continue
        (user,), base = node.users, _base(sources[0])
        given, made = _tensor(sources[0]), _tensor(node)
        if (
            user.op == "call_function" and is_fusible(user.target) and apart[user] - apart[node] <= NEAR
            and given is not None and made is not None and given.dtype.itemsize <= made.dtype.itemsize
            and row_of(node.target).dims is Dims.ELEMENTWISE and _is_computed(base) and base not in written
        ):  # fmt: skip
            user.prepend(node)


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Whose memory some call writes to, or may write to or release: calls that are no operators."""
    found = set()
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        mutates = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        if mutates or not isinstance(node.target, torch._ops.OpOverload):
            found |= {_base(source) for source in node.all_input_nodes if _tensor(source) is not None}
    return found


def _is_computed(node: fx.Node) -> bool:
    return node.op == "call_function" and (
        isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
    )


def _base(node: fx.Node) -> fx.Node:
    """The call whose result a value may lie in."""
    while node.op == "call_function" and (_moves(node) or node.target is operator.getitem):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            break
        node = source
    return node


def _tensor(node: fx.Node) -> torch.Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def _moves(node: fx.Node) -> bool:
    """Whether a call gives a view of its first argument, or may give one."""
    return is_view(node.target) or getattr(node.target, "overloadpacket", None) is torch.ops.aten.reshape


def _is_computing(node: fx.Node) -> bool:
    return node.op == "call_function" and is_fusible(node.target) and not _moves(node)


def _runs(graph: fx.Graph) -> Iterable[list[fx.Node]]:
    """Calls that follow each other directly and may be in one region."""
    run: list[fx.Node] = []
    for node in graph.nodes:
        if _may_join(node, run):
            run.append(node)
            continue
        yield run
        run = [node] if _may_join(node, []) else []
    yield run


def _may_join(node: fx.Node, run: list[fx.Node]) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return node.args[0] in run
    value = node.meta.get("val")
    if isinstance(value, (torch.SymInt, int)):  # a size, of what is there before the region
        return not any(source in run and _tensor(source) is not None for source in node.all_input_nodes)
    if not isinstance(node.target, torch._ops.OpOverload) or not (
        is_fusible(node.target) or is_view(node.target)
    ):
        return False
    first: Any = node.args[0] if node.args else None
    if node.target._schema.is_mutable and not (first in run and _base(first) in run):
        return False
    values = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(item, torch.Tensor) or item is None for item in values)


def _chosen(run: list[fx.Node]) -> _Chosen | None:
    """The region of a run; None if too little is computed in it.

    Sizes and views of what is outside of it stay outside, in front of it; views of its results behind it. A reshape of a view
    may copy, and then does so within.
    """
    device = next(
        (value.device for node in run if _is_computing(node) and (value := _tensor(node)) is not None), None
    )
    members: dict[fx.Node, None] = {}
    for node in run:
        value = _tensor(node)
        if isinstance(node.meta.get("val"), (torch.SymInt, int)) or (
            value is not None and value.device != device
        ):
            continue
        if not _moves(node) or any(source in members for source in node.all_input_nodes):
            members[node] = None
    if sum(map(_is_computing, members)) < FEWEST or any(
        source in members for node in run if node not in members for source in node.all_input_nodes
    ):
        return None
    last = next(node for node in reversed(run) if node in members)
    read = {node: None for node in members if any(user not in members for user in node.users)}
    views: list[fx.Node] = []
    for node in reversed(
        list(members)
    ):  # a kernel's result has memory of its own; a view of it is made behind it
        source: Any = node.args[0] if node.args else None
        if node in read and (is_view(node.target) or (_moves(node) and not _moves(source))):
            views.insert(0, node)
            read[source] = None
            if not any(user in members for user in node.users):
                del members[node]
    results = [node for node in members if node in read and node not in views]
    if any(_tensor(node) is None for node in results):
        return None
    return _Chosen(list(members), results, views, last)


def _body(chosen: _Chosen) -> tuple[fx.Graph, list[fx.Node]]:
    """A region as a graph of its own, and the values that it takes."""
    inside = set(chosen.members)
    inputs = list(
        dict.fromkeys(
            source for node in chosen.members for source in node.all_input_nodes if source not in inside
        )
    )
    body, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for place, source in enumerate(inputs):
        copies[source] = body.placeholder(f"value_{place}")
        copies[source].meta = dict(source.meta)
    for node in chosen.members:
        copies[node] = copy_node(body, node, copies.__getitem__)
    body.output(tuple(copies[node] for node in chosen.results))
    return body, inputs


def _structure(body: fx.Graph) -> str:
    """Equal for graphs that compute the same on values of the same types and sizes."""
    numbers = {node: index for index, node in enumerate(body.nodes)}
    lines = []
    for node in body.nodes:
        value = node.meta.get("val")
        kind = (
            (value.dtype, tuple(map(str, value.shape)))
            if isinstance(value, torch.Tensor)
            else type(value).__name__
        )
        what = kind if node.op == "placeholder" else node.target
        lines.append(f"{what} {fx.map_arg((node.args, node.kwargs), lambda item: f'%{numbers[item]}')}")
    return "\n".join(lines)


def _difference(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str:
    """How a compiled region's result differs from that of its calls; empty if it does not."""
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return f"{found.dtype}{list(found.shape)} for {expected.dtype}{list(expected.shape)}"
    strides = found.stride(), expected.stride()
    if any(size > 1 and one != other for size, one, other in zip(found.shape, *strides)):
        return f"strides {strides[0]} for {strides[1]}"  # a view may follow
    if not expected.is_floating_point():
        return "" if torch.equal(found, expected) else f"other {expected.dtype} values"
    finite = expected.isfinite()
    if not torch.equal(found[~finite], expected[~finite]):
        return "infinities elsewhere"
    wide, zero = torch.promote_types(expected.dtype, torch.float32), expected.new_zeros(())
    size = torch.linalg.vector_norm(torch.where(finite, expected, zero), dtype=wide)
    apart = torch.linalg.vector_norm(torch.where(finite, found - expected, zero), dtype=wide)
    error = float(apart / size.clamp(min=torch.finfo(wide).tiny))
    return "" if error <= tolerance else f"an error of {error:.2g} in {expected.dtype}"
