"""Merge products that read the same rows into one: queries with keys and values, gate with up.

A product of one row reads its weights once and does little else: what each call costs beside them is paid once. Only decoders with a
cache in place are merged; an encoder gained nothing from it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.graph_utils import (
    DOMAIN,
    PROVENANCE,
    add_computed,
    add_constant,
    constant,
    only_use,
    producer,
)

ATTENTION = "GroupQueryAttention"

INTEGER_BIAS, NBITS_BIAS = 6, 5
"""Index of the bias of MatMulIntegerToFloat and of MatMulNBits."""


@dataclass(frozen=True)
class _Product:
    """A product with a constant matrix of `width` columns, and the node whose output it gives, with a bias that is added."""

    node: ir.Node
    width: int
    last: ir.Node
    bias: ir.Value | None


def merge_products(model: ir.Model) -> int:
    """Merge all products of one form that read the same rows, and pack what one attention reads; returns how many products went."""
    graph = model.graph
    if not any(node.op_type == ATTENTION for node in graph):
        return 0
    groups: dict[Hashable, list[_Product]] = {}
    for node in graph:
        key = _key(node)
        if key is not None:
            groups.setdefault((id(node.inputs[0]), key), []).append(_product(node))
    merged = 0
    for found in groups.values():
        if len(found) > 1:
            _merge(graph, sorted(found, key=_place))
            merged += len(found) - 1
    for node in list(graph):
        if node.op_type == ATTENTION:
            _pack(node)
    return merged


def _key(node: ir.Node) -> Hashable | None:
    """What products must have in common to be merged; None for another node, and for a matrix that others read too."""
    if node.op_type == "MatMul" and not node.domain:
        matrix = _matrix(node)
        own = matrix is not None and len(matrix.uses()) == 1 and len(node.inputs[1].uses()) == 1  # type: ignore[union-attr]
        if not own or len(matrix.shape or ()) != 2:  # type: ignore[union-attr]
            return None
        return ("MatMul", matrix is node.inputs[1], matrix.dtype)  # type: ignore[union-attr]
    if node.domain != DOMAIN or node.op_type not in ("MatMulNBits", "MatMulIntegerToFloat"):
        return None
    constants = node.inputs[1:5] if node.op_type == "MatMulNBits" else (node.inputs[1], node.inputs[3])
    if not all(value is None or (_stored(value) and len(value.uses()) == 1) for value in constants):
        return None
    if node.op_type == "MatMulNBits":
        attributes = [
            (name, node.attributes.get_int(name, -1))
            for name in ("K", "bits", "block_size", "accuracy_level")
        ]
        given = tuple(index for index, value in enumerate(node.inputs[:5]) if value is not None)
        shapes = tuple(
            len(value.shape) for value in constants if value is not None and value.shape is not None
        )
        return None if 4 in given else (node.op_type, *attributes, given, shapes)
    if len(node.inputs) > 5 and node.inputs[5] is not None:
        return None
    matrix, scale = node.inputs[1], node.inputs[3]
    assert matrix is not None
    assert matrix.shape is not None
    if scale is None or scale.shape is None or list(scale.shape) != [matrix.shape[1]]:
        return None
    return (node.op_type, id(node.inputs[2]), id(node.inputs[4]))


def _stored(value: ir.Value) -> bool:
    return value.const_value is not None and not value.is_graph_input()


def _matrix(node: ir.Node) -> ir.Value | None:
    """The stored matrix of a MatMul, [in, out], or [out, in] behind a Transpose; None for another right operand."""
    right = node.inputs[1]
    transpose = producer(right, "Transpose")
    if transpose is not None:
        right = transpose.inputs[0]
    return right if right is not None and _stored(right) else None


def _product(node: ir.Node) -> _Product:
    if node.op_type == "MatMulNBits":
        return _Product(node, node.attributes.get_int("N", 0), node, _input(node, NBITS_BIAS))
    if node.op_type == "MatMulIntegerToFloat":
        return _Product(node, int(node.inputs[1].shape[1]), node, _input(node, INTEGER_BIAS))  # type: ignore[union-attr,index,arg-type]
    matrix = _matrix(node)
    assert matrix is not None
    assert matrix.shape is not None
    width = int(matrix.shape[1 if matrix is node.inputs[1] else 0])  # type: ignore[arg-type]
    add = only_use(node.outputs[0])
    if add is not None and add.op_type == "Add":
        other = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
        found = constant(other)
        if found is not None and found.shape == (width,):
            return _Product(node, width, add, other)
    return _Product(node, width, node, None)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _place(product: _Product) -> int:
    """The input of an attention that a product is; products of no attention stay in their order behind these."""
    uses = list(product.last.outputs[0].uses())
    found = [use.idx for use in uses if use.node.op_type == ATTENTION]
    return found[0] if found else len(uses) + 3


def _merge(graph: ir.Graph, products: Sequence[_Product]) -> None:
    """Put one product and a Split in the place of several products."""
    first = min((item.node for item in products), key=list(graph).index)
    new = _joined(graph, products)
    new.version = 1
    for key in PROVENANCE:
        if key in first.metadata_props:
            new.metadata_props[key] = first.metadata_props[key]
    graph.insert_before(first, new)
    rows = new.outputs[0]
    rows.type = products[0].node.outputs[0].type
    rows.shape = _with_width(products[0].node.outputs[0], sum(item.width for item in products))
    own_bias = products[0].node.op_type == "MatMul" and all(item.bias is not None for item in products)
    if own_bias:
        rows = _added(graph, rows, products, first)
    sizes = [item.width for item in products]
    split = ir.node(
        "Split", [rows, add_constant(graph, f"{products[0].node.outputs[0].name}_sizes", np.array(sizes, np.int64))], {"axis": -1},
        num_outputs=len(products),
    )  # fmt: skip
    split.metadata_props.update(new.metadata_props)
    graph.insert_before(first, split)
    for item, part in zip(products, split.outputs):
        old = (item.last if own_bias or item.node.op_type != "MatMul" else item.node).outputs[0]
        part.shape, part.type = old.shape, old.type
        name = old.name
        old.replace_all_uses_with(part, replace_graph_outputs=True)
        old.name, part.name = f"{name}_before", name
    for item in products:
        for node in (item.last, item.node) if own_bias else (item.node,):
            if node.graph is graph:
                graph.remove(node, safe=True)


def _joined(graph: ir.Graph, products: Sequence[_Product]) -> ir.Node:
    """One product with the columns of all."""
    nodes = [item.node for item in products]
    operator, x = nodes[0].op_type, nodes[0].inputs[0]
    name = f"{nodes[0].outputs[0].name}_merged"
    if operator == "MatMul":
        values = [_matrix(node) for node in nodes]
        plain = values[0] is nodes[0].inputs[1]
        matrix = _concatenated(graph, values, 1 if plain else 0, name)
        if not plain:
            matrix = _transposed(graph, nodes[0], matrix)
        return ir.node("MatMul", [x, matrix])
    width = sum(item.width for item in products)
    if operator == "MatMulNBits":
        parts = [
            _concatenated(graph, [node.inputs[index] for node in nodes], 0, f"{name}_{index}")
            if index < len(nodes[0].inputs) and nodes[0].inputs[index] is not None
            else None
            for index in range(1, 4)
        ]
        attributes = {**dict(nodes[0].attributes), "N": ir.AttrInt64("N", width)}
        bias = _bias(graph, products, name)
        return ir.node(operator, [x, *parts, None, bias], attributes, domain=DOMAIN)
    codes, scales = (
        _concatenated(graph, [node.inputs[index] for node in nodes], axis, f"{name}_{index}")
        for index, axis in ((1, 1), (3, 0))
    )
    row_scale, row_zero = nodes[0].inputs[2], nodes[0].inputs[4]
    inputs = [x, codes, row_scale, scales, row_zero, None, _bias(graph, products, name)]
    return ir.node(operator, inputs, domain=DOMAIN)


def _transposed(graph: ir.Graph, node: ir.Node, matrix: ir.Value) -> ir.Value:
    """A Transpose of the merged matrix, as the products had one of theirs."""
    old = producer(node.inputs[1], "Transpose")
    assert old is not None
    new = ir.node("Transpose", [matrix], dict(old.attributes))
    new.metadata_props.update(old.metadata_props)
    graph.insert_before(node, new)
    new.outputs[0].type = old.outputs[0].type
    return new.outputs[0]


def _bias(graph: ir.Graph, products: Sequence[_Product], name: str) -> ir.Value | None:
    """The biases of all products, with zeros for those without; None where none has one."""
    if all(item.bias is None for item in products):
        return None
    given = next(item.bias for item in products if item.bias is not None)
    dtype = given.dtype.numpy() if given.dtype is not None else np.dtype(np.float32)

    def joined() -> np.ndarray:
        found = (constant(item.bias) for item in products)
        return np.concatenate(
            [np.zeros(item.width, dtype) if one is None else one for item, one in zip(products, found)]
        )

    return add_computed(graph, f"{name}_bias", joined, dtype, (sum(item.width for item in products),))


def _added(graph: ir.Graph, rows: ir.Value, products: Sequence[_Product], before: ir.Node) -> ir.Value:
    """The merged rows with the biases of all products."""
    bias = _bias(graph, products, str(rows.name))
    add = ir.node("Add", [rows, bias])
    add.metadata_props.update(products[0].last.metadata_props)
    add.outputs[0].type, add.outputs[0].shape = rows.type, rows.shape
    graph.insert_before(before, add)
    return add.outputs[0]


def _concatenated(graph: ir.Graph, values: Sequence[ir.Value | None], axis: int, name: str) -> ir.Value:
    """A constant that joins others along an axis; it is computed when the model is written, so that it takes no memory until then."""
    shapes = [tuple(value.shape) for value in values]  # type: ignore[union-attr,arg-type]
    shape = tuple(
        sum(int(item[axis]) for item in shapes) if place == axis else int(size)
        for place, size in enumerate(shapes[0])
    )
    dtype = values[0].dtype.numpy()  # type: ignore[union-attr]
    held: list[Any] = [value.const_value for value in values]  # type: ignore[union-attr]
    return add_computed(
        graph, name, lambda: np.concatenate([item.numpy() for item in held], axis), dtype, shape
    )


def _with_width(value: ir.Value, width: int) -> ir.Shape | None:
    return None if value.shape is None else ir.Shape([*list(value.shape)[:-1], width])


def _pack(node: ir.Node) -> None:
    """Give an attention the rows that hold its queries, keys and values, where one Split makes these and nothing else reads them."""
    parts = node.inputs[:3]
    split = producer(parts[0], "Split")
    if split is None or len(split.outputs) != 3:
        return
    if any(mine is not theirs or mine.is_graph_output() for mine, theirs in zip(split.outputs, parts)):
        return
    uses = [use for part in split.outputs for use in part.uses() if use.node is not node]
    if not all(_reads_first_sizes(use.node) for use in uses):
        return
    for use in uses:
        use.node.replace_input_with(use.idx, split.inputs[0])
    node.replace_input_with(0, split.inputs[0])
    node.replace_input_with(1, None)
    node.replace_input_with(2, None)


def _reads_first_sizes(node: ir.Node) -> bool:
    """Whether a node reads the sizes of its input but for the last one, which a Split changes."""
    return node.op_type == "Shape" and node.attributes.get_int("end", 3) in (1, 2)
