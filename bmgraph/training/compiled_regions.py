"""Runs of elementwise calls, reductions and views of a step graph, each compiled by torch.compile (Inductor) into kernels.

Regions of equal structure, such as those of equal layers, share what is compiled. A compiled region is compared with the calls that it
replaces the first time that it runs at the sizes of a batch, for which it may be compiled anew; one that differs, or cannot be
compiled, stays as it is.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

from bmgraph.training.region_choice import Chosen, choose_regions, tensor_of
from bmgraph.utils.graph_copies import copy_node

CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest relative distance (L2) of a compiled region's result from that of its calls, by the coarsest type of the region: a
compiled chain rounds its result alone."""

Values = Sequence[Any]
Sizes = tuple[torch.Size, ...]


class Region:
    """Calls of one structure: run one by one until their compiled form is known to agree."""

    def __init__(self, graph: fx.Graph, regions: CompiledRegions) -> None:
        self._module = fx.GraphModule({}, graph)
        self._regions = regions
        self._tolerance = max(
            CLOSE.get(value.dtype, 0.0) for node in graph.nodes if (value := tensor_of(node)) is not None
        )
        self._compiled: Callable[..., Values] | None = torch.compile(self._module, fullgraph=True)
        self._agrees: set[Sizes] = set()

    @property
    def compiled(self) -> bool:
        """Whether it runs compiled, at sizes of batches that it has seen."""
        return self._compiled is not None and bool(self._agrees)

    def __call__(self, *values: Any) -> Values:
        sizes, compiled = self._regions.sizes, self._compiled
        if compiled is not None and sizes in self._agrees:
            return compiled(*values)
        expected: Values = self._module(*values)
        if compiled is None or self._regions.failed:
            return expected
        if any(bool(value.isnan().any()) for value in expected):
            return expected  # says nothing; the next run may
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
            return expected
        apart = [
            text
            for pair in zip(found, expected, strict=True)
            if (text := _difference(*pair, self._tolerance))
        ]
        if apart:
            self._regions.kept_apart.append(f"{self._module.graph}: {'; '.join(apart)}")
            self._compiled = None
        self._agrees.add(sizes)
        return expected


@dataclass
class CompiledRegions:
    """The compiled regions of a step, by structure. `kept_apart`: those that differ from their calls and stay these,
    with how far; `failed`: why no more are compiled; `places`: how many regions the graphs have; `sizes`: of the batch that a
    step runs on."""

    by_structure: dict[str, Region] = field(default_factory=dict)
    kept_apart: list[str] = field(default_factory=list)
    failed: str = ""
    places: int = 0
    sizes: Sizes = ()

    def replace(self, graph: fx.Graph) -> None:
        """Let regions of a graph, in the form that runs, be compiled; in place."""
        for chosen in choose_regions(graph):
            self._place(graph, chosen)

    def _place(self, graph: fx.Graph, chosen: Chosen) -> None:
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


def _body(chosen: Chosen) -> tuple[fx.Graph, list[fx.Node]]:
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
            (value.dtype, value.device, *map(str, (value.shape, value.stride())))
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
