"""Replace in-place operators by functional ones; the graph returns the new values of buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.errors import CaptureError
from bmgraph.ir.shape_inference import carry, infer
from bmgraph.utils.torch_internals import fake_mode_of

aten = torch.ops.aten

FUNCTIONAL: dict[Any, Any] = {
    aten.zero_.default: aten.zeros_like.default,
    aten.copy_.default: aten.copy.default,
    aten.fill_.Scalar: aten.full_like.default,
    aten.bernoulli_.float: aten.bernoulli.p,
}
"""Functional forms that are not named like the in-place operator without its underscore."""


def functionalize(graph: fx.Graph, buffers: set[str]) -> dict[str, fx.Node]:
    """Replace every in-place call by its functional form; returns the new value of each buffer that is written.

    A write into a view also updates its base and all other views of it. Raises CaptureError, with operator and module
    path, if an in-place operator has no functional form, writes through an unsupported view, or writes into a
    parameter: every call would change the weights, which a program does not.
    """
    if not any(_writes(node) for node in graph.nodes):
        return {}
    mode = fake_mode_of(list(graph.nodes))
    assert mode is not None
    state = _State(graph, mode, buffers)
    for node in list(graph.nodes):
        if node.op not in ("call_function", "output"):
            continue
        if node.op == "output" or not _writes(node):
            state.update_arguments(node)
            continue
        state.write(node)
    return {
        str(node.target): value
        for node, value in state.current.items()
        if node.op == "get_attr" and value is not node
    }


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _view_of(node: fx.Node) -> fx.Node | None:
    """The node that this one is a view of; None if it has its own memory."""
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
    """The current values of all tensors during a walk over the graph.

    A tensor is identified by the node that created it (its variable), and every in-place call gives it a new value.
    """

    def __init__(self, graph: fx.Graph, mode: Any, buffers: set[str]) -> None:
        self.graph = graph
        self.mode = mode
        self.buffers = buffers
        self.current: dict[fx.Node, fx.Node] = {}
        """By variable: the node of its current value, if it was written."""
        self.variables: dict[fx.Node, fx.Node] = {}
        """By node of a later value: its variable."""
        self.views: dict[fx.Node, list[fx.Node]] = {}
        """By variable: the views of it."""

    def variable(self, node: fx.Node) -> fx.Node:
        """The variable that a node is a value of."""
        return self.variables.get(node, node)

    def current_value(self, node: fx.Node) -> fx.Node:
        """The current value of the variable that a node is a value of."""
        variable = self.variable(node)
        return self.current.get(variable, variable)

    def update_arguments(self, node: fx.Node) -> None:
        """Let a node read the current values of its arguments; records views."""
        source = _view_of(node)
        if source is not None:
            self.views.setdefault(self.variable(source), []).append(node)
        node.args = fx.map_arg(node.args, self.current_value)
        node.kwargs = dict(fx.map_arg(node.kwargs, self.current_value))

    def write(self, node: fx.Node) -> None:
        """Replace an in-place call, and update what shares memory with its target."""
        target = node.args[0]
        assert isinstance(target, fx.Node)
        variable = self.variable(target)
        functional = _functional_form(node)
        args = fx.map_arg(node.args, self.current_value)
        kwargs = dict(fx.map_arg(node.kwargs, self.current_value))
        if functional is aten.zeros_like.default:
            args = args[:1]
        with self.graph.inserting_before(node):
            new = self._cast_like(self._call(functional, args, kwargs, node), target)
            root = self._write_back(variable, new, node)
            if root.op == "get_attr" and str(root.target) not in self.buffers:
                raise _parameter_written(node, str(root.target))
            self._update_views(root, written=variable)
        self.variables[node] = variable
        node.replace_all_uses_with(self.current[variable])
        self.graph.erase_node(node)

    def _call(self, target: Any, args: Any, kwargs: dict[str, Any], like: fx.Node) -> fx.Node:
        new = self.graph.call_function(target, tuple(args), kwargs)
        carry(like, new)
        infer(new, self.mode)
        return new

    def _cast_like(self, new: fx.Node, target: fx.Node) -> fx.Node:
        """The new value in the dtype of its target, which an in-place call keeps."""
        wanted, found = target.meta["val"], new.meta["val"]
        if found.dtype != wanted.dtype:
            new = self._call(aten.to.dtype, (new, wanted.dtype), {}, target)
        return new

    def _set(self, variable: fx.Node, new: fx.Node) -> None:
        self.current[variable] = new
        self.variables[new] = variable

    def _write_back(self, variable: fx.Node, new: fx.Node, like: fx.Node) -> fx.Node:
        """Write a new value of a view into its base, and so on upwards; returns the variable of the outermost base."""
        self._set(variable, new)
        source = _view_of(variable)
        if source is None:
            return variable
        base = self.variable(source)
        return self._write_back(base, self._scatter(variable, self.current_value(base), new, like), like)

    def _scatter(self, view: fx.Node, base: fx.Node, new: fx.Node, like: fx.Node) -> fx.Node:
        """The value of `base` after `new` was written into a view of it."""
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
        if view.target is aten.permute.default:
            order = [int(axis) % len(rest[0]) for axis in rest[0]]  # type: ignore[arg-type,union-attr]
            inverse = sorted(range(len(order)), key=order.__getitem__)
            return self._call(aten.permute.default, (new, inverse), {}, like)
        if view.target in (aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim):
            sizes = list(view.args[0].meta["val"].shape)  # type: ignore[union-attr]
            if all(isinstance(size, int) for size in sizes):
                return self._call(aten.reshape.default, (new, sizes), {}, like)
            return self._call(aten.view_as.default, (new, base), {}, like)
        raise _unsupported(like, f"it writes through a {view.target}")

    def _update_views(self, variable: fx.Node, written: fx.Node) -> None:
        """Recompute the views of a written variable, except `written` itself, which has its new value."""
        for view in self.views.get(variable, ()):
            if view is not written:
                args = fx.map_arg(view.args, self.current_value)
                self._set(view, self._call(view.target, args, dict(view.kwargs), view))
            self._update_views(view, written)


def _functional_form(node: fx.Node) -> Any:
    if node.target in FUNCTIONAL:
        return FUNCTIONAL[node.target]
    assert isinstance(node.target, torch._ops.OpOverload)
    name = node.target._schema.name.split("::")[1]
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    overload = getattr(packet, node.target._overloadname, None) if packet is not None else None
    if overload is None or overload._schema.is_mutable:
        raise _unsupported(node, "it has no functional form")
    return overload


def _parameter_written(node: fx.Node, name: str) -> CaptureError:
    """The error for an in-place call on a parameter (a clamped weight, `nn.Embedding(max_norm=...)`)."""
    where = node.meta.get("scope", "") or "the model's root"
    return CaptureError(
        f"in-place operator {node.target} in {where} writes into parameter {name!r} in every forward, which a program "
        "cannot do: change the weight once before capturing (an embedding's max_norm: renormalize the table and set "
        "max_norm=None), or compute the changed weight in forward without writing it back"
    )


def _unsupported(node: fx.Node, why: str) -> CaptureError:
    where = node.meta.get("scope", "") or "the model's root"
    return CaptureError(
        f"in-place operator {node.target} in {where} is not supported: {why}; "
        "write that line of the model without in-place operators"
    )
