"""Write complex values as pairs of real ones, their real and imaginary parts: ONNX's operators take no complex numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from bmgraph.errors import BackendError
from bmgraph.ir.editor import Editor
from bmgraph.ir.program import Program, output_node
from bmgraph.ops.trait_row import Dims, Kind
from bmgraph.ops.traits import traits_of
from bmgraph.utils.user_frame import user_line

aten = torch.ops.aten

Pair = tuple[Any, Any]
"""The real and the imaginary part: nodes, or numbers."""


def write_complex_as_pairs(program: Program) -> None:
    """Replace every call on complex values by calls on their parts, in place.

    Raises BackendError for complex inputs and outputs, and for an operator that has no rule here.
    """
    if not any(_is_complex(node) for node in program.graph.nodes):
        return
    with program.edit() as editor:
        rewrite = _Rewrite(editor)
        for node in list(editor.graph.nodes):
            rewrite.visit(node)
    read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    for table in (program.parameters, program.buffers):
        for name in [name for name, tensor in table.items() if tensor.is_complex() and name not in read]:
            del table[name]


def _is_complex(value: Any) -> bool:
    if isinstance(value, fx.Node):
        found = value.meta.get("val")
        return isinstance(found, torch.Tensor) and found.is_complex()
    return isinstance(value, complex)


class _Rewrite:
    """Visits the nodes of a graph in order; `pairs` are the parts of the complex ones."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self.pairs: dict[fx.Node, Pair] = {}
        self.node: fx.Node = next(iter(editor.graph.nodes))

    def visit(self, node: fx.Node) -> None:
        """Add the parts of a node, or replace a real one that is computed from complex values."""
        self.node = node
        if node.op == "output":
            _check_outputs(self.editor.program)
        elif node.op == "placeholder" and _is_complex(node):
            raise BackendError(
                f"input {node.target!r} is complex, which ONNX engines do not take: give torch.view_as_real of it to the "
                "model, and call torch.view_as_complex in forward"
            )
        elif node.op == "get_attr" and _is_complex(node):
            self.pairs[node] = self._stored(node)
        elif node.op == "call_function" and any(map(_is_complex, [node, *node.all_input_nodes])):
            made = self._rule()(*node.args, **node.kwargs)
            if _is_complex(node):
                self.pairs[node] = self._nodes(*made)
            else:
                node.replace_all_uses_with(made)

    def _stored(self, node: fx.Node) -> Pair:
        tensor = self.editor.program.tensor(str(node.target))
        name = str(node.target)
        real, imaginary = (
            self.editor.parameter(self.editor.fresh(f"{name}_{part}"), value.contiguous(), frozen=True)
            for part, value in (("real", tensor.real), ("imag", tensor.imag))
        )
        return real, imaginary

    def _rule(self) -> Callable[..., Any]:
        rule = RULES.get(getattr(self.node.target, "overloadpacket", None))
        if rule is not None:
            return partial(rule, self)
        if self._does_to_each_part():
            return self._part_by_part
        where = self.node.meta.get("scope") or "the model's root"
        line = user_line(self.node.meta.get("stack_trace") or "")
        raise BackendError(
            f"operator {self.node.target} in {where}{f' ({line})' if line else ''} computes with complex values, for which "
            "it has no form in ONNX: write it with torch.view_as_real in the model, or keep that part on torch"
        )

    def _does_to_each_part(self) -> bool:
        """Whether the operator does to each part of its first argument, the only complex one, what it does to the whole."""
        row = traits_of(self.node)
        moves = row.kind in (Kind.RESHAPE, Kind.LAYOUT, Kind.SELECTION) and row.dims is not Dims.PADDED
        one = isinstance(self.node.target, torch._ops.OpOverload) and _is_complex(self.node.args[0])
        return one and (moves or row.linear) and sum(map(_is_complex, self.node.all_input_nodes)) == 1

    def _call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.editor.call(target, *args, like=self.node, **kwargs)

    def _pair(self, value: Any) -> Pair:
        """The parts of an operand; a real one has the imaginary part 0."""
        if isinstance(value, fx.Node) and value in self.pairs:
            return self.pairs[value]
        return (value.real, value.imag) if isinstance(value, complex) else (value, 0)

    def _sum(self, target: Callable[..., Any], a: Any, b: Any) -> Any:
        """a + b or a - b, where either may be the number 0."""
        if not isinstance(b, fx.Node) and b == 0:
            return a
        if isinstance(a, fx.Node):
            return self._call(target, a, b)
        zeros = self._call(aten.zeros_like.default, b)
        return self._call(target, self._call(aten.add.Tensor, zeros, a), b)

    def _product(self, a: Any, b: Any, target: Callable[..., Any] = aten.mul.Tensor) -> Any:
        if not isinstance(a, fx.Node) and not isinstance(b, fx.Node):
            return a * b
        for value in (a, b):
            if not isinstance(value, fx.Node) and value == 0:
                return 0
        return self._call(target, a, b) if isinstance(a, fx.Node) else self._call(target, b, a)

    def _part_by_part(self, x: fx.Node, *args: Any, **kwargs: Any) -> Pair:
        real, imaginary = self._full(x)
        target: Any = self.node.target
        given = {key: item for key, item in kwargs.items() if not isinstance(item, torch.dtype)}
        return self._call(target, real, *args, **given), self._call(target, imaginary, *args, **given)

    def on_cat(self, items: list[fx.Node], *args: Any) -> Pair:
        pairs = [self._full(item) for item in items]
        target: Any = self.node.target
        real, imaginary = (self._call(target, [pair[part] for pair in pairs], *args) for part in (0, 1))
        return real, imaginary

    def _full(self, item: fx.Node) -> Pair:
        return self._nodes(*self._pair(item))

    def _nodes(self, *parts: Any) -> Pair:
        """The parts of a value as nodes; one of them may be a number."""
        like = next(part for part in parts if isinstance(part, fx.Node))
        real, imaginary = (
            part
            if isinstance(part, fx.Node)
            else self._call(aten.add.Tensor, self._call(aten.zeros_like.default, like), part)
            for part in parts
        )
        return real, imaginary

    def on_polar(self, size: fx.Node, angle: fx.Node) -> Pair:
        cosine, sine = (self._call(target, angle) for target in (aten.cos.default, aten.sin.default))
        return self._product(size, cosine), self._product(size, sine)

    def on_complex(self, real: fx.Node, imaginary: fx.Node) -> Pair:
        return real, imaginary

    def on_view_as_complex(self, x: fx.Node) -> Pair:
        return self._call(aten.select.int, x, -1, 0), self._call(aten.select.int, x, -1, 1)

    def on_view_as_real(self, x: fx.Node) -> fx.Node:
        return self._call(aten.stack.default, list(self._full(x)), -1)

    def on_real(self, x: fx.Node) -> Any:
        return self._pair(x)[0]

    def on_imag(self, x: fx.Node) -> Any:
        return self._full(x)[1]

    def on_abs(self, x: fx.Node) -> fx.Node:
        return self._call(aten.sqrt.default, self._squared(x))

    def _squared(self, x: Any) -> Any:
        real, imaginary = self._pair(x)
        return self._sum(aten.add.Tensor, self._product(real, real), self._product(imaginary, imaginary))

    def on_conj(self, x: fx.Node) -> Pair:
        real, imaginary = self._full(x)
        return real, self._call(aten.neg.default, imaginary)

    def on_resolve_conj(self, x: fx.Node) -> Pair:
        return self._full(x)

    def on_to(self, x: fx.Node, *_types: Any, **_options: Any) -> Any:
        """A cast to complex, or of complex values to real ones, which drops the imaginary part."""
        real, imaginary = self._full(x)
        if not _is_complex(self.node):
            return self._call(aten.to.dtype, real, self.node.meta["val"].dtype)
        kind = self.node.meta["val"].real.dtype
        return self._call(aten.to.dtype, real, kind), self._call(aten.to.dtype, imaginary, kind)

    def on_exp(self, x: fx.Node) -> Pair:
        real, imaginary = self._full(x)
        return self.on_polar(self._call(aten.exp.default, real), imaginary)

    def on_where(self, condition: fx.Node, a: fx.Node, b: fx.Node) -> Pair:
        (ar, ai), (br, bi) = self._full(a), self._full(b)
        return self._call(aten.where.self, condition, ar, br), self._call(aten.where.self, condition, ai, bi)

    def on_add(self, a: Any, b: Any, alpha: Any = 1) -> Pair:
        return self._both(aten.add.Tensor, a, b, alpha)

    def on_sub(self, a: Any, b: Any, alpha: Any = 1) -> Pair:
        return self._both(aten.sub.Tensor, a, b, alpha)

    def on_rsub(self, a: Any, b: Any, alpha: Any = 1) -> Pair:
        return self._both(aten.sub.Tensor, b, a, alpha)

    def _both(self, target: Callable[..., Any], a: Any, b: Any, alpha: Any) -> Pair:
        """The sum or difference of two values that broadcast, of which `alpha` multiplies the second."""
        left, right = (self._full(item) if isinstance(item, fx.Node) else self._pair(item) for item in (a, b))
        if alpha != 1:
            right = self._product(right[0], alpha), self._product(right[1], alpha)
        return self._sum(target, left[0], right[0]), self._sum(target, left[1], right[1])

    def on_mul(self, a: Any, b: Any) -> Pair:
        return self._multiplied(aten.mul.Tensor, a, b)

    def _multiplied(self, target: Callable[..., Any], a: Any, b: Any) -> Pair:
        (ar, ai), (br, bi) = self._pair(a), self._pair(b)
        rr, ii, ri, ir = (
            self._product(*factors, target) for factors in ((ar, br), (ai, bi), (ar, bi), (ai, br))
        )
        return self._sum(aten.sub.Tensor, rr, ii), self._sum(aten.add.Tensor, ir, ri)

    def on_matmul(self, a: fx.Node, b: fx.Node) -> Pair:
        target: Any = self.node.target
        (ar, ai), (br, bi) = self._full(a), self._full(b)
        rr, ii, ri, ir = (
            self._call(target, *factors) for factors in ((ar, br), (ai, bi), (ar, bi), (ai, br))
        )
        return self._call(aten.sub.Tensor, rr, ii), self._call(aten.add.Tensor, ir, ri)

    def on_div(self, a: Any, b: Any) -> Pair:
        if _is_complex(b):
            real, imaginary = self._pair(b)
            opposite = (
                -imaginary if not isinstance(imaginary, fx.Node) else self._call(aten.neg.default, imaginary)
            )
            (ar, ai), size = self._pair(a), self._squared(b)
            rr, ii, ri, ir = (
                self._product(*factors)
                for factors in ((ar, real), (ai, opposite), (ar, opposite), (ai, real))
            )
            top = self._sum(aten.sub.Tensor, rr, ii), self._sum(aten.add.Tensor, ir, ri)
        else:
            top, size = self._full(a), b
        return self._call(aten.div.Tensor, top[0], size), self._call(aten.div.Tensor, top[1], size)


RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((aten.cat, aten.stack), _Rewrite.on_cat),
    **dict.fromkeys((aten.conj, aten._conj, aten.conj_physical), _Rewrite.on_conj),
    **dict.fromkeys((aten.matmul, aten.bmm, aten.mm), _Rewrite.on_matmul),
    **dict.fromkeys((aten.to, aten._to_copy), _Rewrite.on_to),
    aten.resolve_conj: _Rewrite.on_resolve_conj,
    aten.polar: _Rewrite.on_polar,
    aten.complex: _Rewrite.on_complex,
    aten.view_as_complex: _Rewrite.on_view_as_complex,
    aten.view_as_real: _Rewrite.on_view_as_real,
    aten.real: _Rewrite.on_real,
    aten.imag: _Rewrite.on_imag,
    aten.abs: _Rewrite.on_abs,
    aten.exp: _Rewrite.on_exp,
    aten.where: _Rewrite.on_where,
    aten.add: _Rewrite.on_add,
    aten.sub: _Rewrite.on_sub,
    aten.rsub: _Rewrite.on_rsub,
    aten.mul: _Rewrite.on_mul,
    aten.div: _Rewrite.on_div,
}
"""Operator -> the rule that makes the parts of its result (or its real result) from its arguments."""


def _check_outputs(program: Program) -> None:
    values: Any = output_node(program.graph).args[0]
    for spec, value in zip(program.outputs, values):
        if _is_complex(value):
            raise BackendError(
                f"output {spec.name!r} is complex, which ONNX engines do not give: return torch.view_as_real of it"
            )
