"""In-place operators become pure ones: what a graph writes into buffers, it returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.errors import CaptureError
from bmgraph.ir.shape_inference import carry, infer
from bmgraph.utils.torch_internals import fake_mode_of

aten = torch.ops.aten

RENAMED: dict[Any, Any] = {
    aten.zero_.default: aten.zeros_like.default,
    aten.copy_.default: aten.copy.default,
    aten.fill_.Scalar: aten.full_like.default,
}
"""In-place operators whose pure form has another name than theirs without the underscore."""


def functionalise(graph: fx.Graph, buffers: set[str]) -> dict[str, fx.Node]:
    """Replace every in-place call by its pure form; returns the new value of each buffer that was written.

    A write through views is written back through them. Raises CaptureError for an in-place operator without a
    pure form, naming it and its place.
    """
    if not any(_writes(node) for node in graph.nodes):
        return {}
    mode = fake_mode_of(list(graph.nodes))
    assert mode is not None
    state = _State(graph, mode)
    for node in list(graph.nodes):
        if node.op not in ("call_function", "output"):
            continue
        if node.op == "output" or not _writes(node):
            state.refresh(node)
            continue
        state.write(node)
    return {
        str(node.target): now
        for node, now in state.current.items()
        if node.op == "get_attr" and str(node.target) in buffers and now is not node
    }


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _view_of(node: fx.Node) -> fx.Node | None:
    """What this node is a view of, None where its memory is its own."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or _writes(node):
        return None
    returns = node.target._schema.returns
    if not returns or returns[0].alias_info is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return None
    if node.target in (aten.contiguous.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout):
        return source if before.dtype == after.dtype and before.is_contiguous() else None
    return source


class _State:
    """The graph while it is walked: every tensor variable is the node that first held it, and has a present value."""

    def __init__(self, graph: fx.Graph, mode: Any) -> None:
        self.graph = graph
        self.mode = mode
        self.current: dict[fx.Node, fx.Node] = {}
        self.home: dict[fx.Node, fx.Node] = {}
        self.views: dict[fx.Node, list[fx.Node]] = {}

    def variable(self, node: fx.Node) -> fx.Node:
        """The node that first held this variable."""
        return self.home.get(node, node)

    def now(self, node: fx.Node) -> fx.Node:
        """The present value of the variable that a node held when it was made."""
        variable = self.variable(node)
        return self.current.get(variable, variable)

    def refresh(self, node: fx.Node) -> None:
        """Let a node read the present values of its arguments."""
        source = _view_of(node)
        if source is not None:
            self.views.setdefault(self.variable(source), []).append(node)
        node.args = fx.map_arg(node.args, self.now)
        node.kwargs = dict(fx.map_arg(node.kwargs, self.now))

    def write(self, node: fx.Node) -> None:
        target = node.args[0]
        assert isinstance(target, fx.Node)
        variable = self.variable(target)
        pure = _pure(node)
        args, kwargs = fx.map_arg(node.args, self.now), dict(fx.map_arg(node.kwargs, self.now))
        if pure is aten.zeros_like.default:
            args = args[:1]
        with self.graph.inserting_before(node):
            new = self._same_type(self._call(pure, args, kwargs, node), target)
            root = self._write_back(variable, new, node)
            self._update_views(root, written=variable)
        self.home[node] = variable
        node.replace_all_uses_with(self.current[variable])
        self.graph.erase_node(node)

    def _call(self, target: Any, args: Any, kwargs: dict[str, Any], like: fx.Node) -> fx.Node:
        new = self.graph.call_function(target, tuple(args), kwargs)
        carry(like, new)
        infer(new, self.mode)
        return new

    def _same_type(self, new: fx.Node, target: fx.Node) -> fx.Node:
        """An in-place call keeps the dtype of what it writes to."""
        wanted, found = target.meta["val"], new.meta["val"]
        if found.dtype != wanted.dtype:
            new = self._call(aten.to.dtype, (new, wanted.dtype), {}, target)
        return new

    def _set(self, variable: fx.Node, new: fx.Node) -> None:
        self.current[variable] = new
        self.home[new] = variable

    def _write_back(self, variable: fx.Node, new: fx.Node, like: fx.Node) -> fx.Node:
        """Carry a new value from a view to the tensor that it is a view of; returns that tensor's variable."""
        self._set(variable, new)
        source = _view_of(variable)
        if source is None:
            return variable
        base = self.variable(source)
        return self._write_back(base, self._scatter(variable, self.now(base), new, like), like)

    def _scatter(self, view: fx.Node, base: fx.Node, new: fx.Node, like: fx.Node) -> fx.Node:
        rest = view.args[1:]
        if view.target is aten.slice.Tensor:
            return self._call(aten.slice_scatter.default, (base, new, *rest), {}, like)
        if view.target is aten.select.int:
            return self._call(aten.select_scatter.default, (base, new, *rest), {}, like)
        if view.target in (aten.detach.default, aten.alias.default, aten.contiguous.default, aten.to.dtype,
                           aten.to.device, aten.to.dtype_layout):  # fmt: skip
            return new
        if view.target in (aten.transpose.int,):
            return self._call(aten.transpose.int, (new, *rest), {}, like)
        if view.target in (aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim):
            sizes = list(view.args[0].meta["val"].shape)  # type: ignore[union-attr]
            if all(isinstance(size, int) for size in sizes):
                return self._call(aten.reshape.default, (new, sizes), {}, like)
            return self._call(aten.view_as.default, (new, base), {}, like)
        raise _refusal(like, f"it writes through a {view.target}")

    def _update_views(self, variable: fx.Node, written: fx.Node) -> None:
        """Views taken earlier of what was written show the new values from here on."""
        for view in self.views.get(variable, ()):
            if view is not written:
                args = fx.map_arg(view.args, self.now)
                self._set(view, self._call(view.target, args, dict(view.kwargs), view))
            self._update_views(view, written)


def _pure(node: fx.Node) -> Any:
    if node.target in RENAMED:
        return RENAMED[node.target]
    assert isinstance(node.target, torch._ops.OpOverload)
    name = node.target._schema.name.split("::")[1]
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    overload = getattr(packet, node.target._overloadname, None) if packet is not None else None
    if overload is None or overload._schema.is_mutable:
        raise _refusal(node, "it has no pure form")
    return overload


def _refusal(node: fx.Node, why: str) -> CaptureError:
    where = node.meta.get("scope", "") or "the model's root"
    return CaptureError(
        f"in-place operator {node.target} in {where} cannot become pure: {why}; "
        "write that line of the model without in-place operators"
    )
