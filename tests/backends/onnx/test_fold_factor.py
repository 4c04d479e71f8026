"""A factor goes into the weights of a product and of its bias, and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bmgraph.backends.onnx.rewrites.fold_factor import fold_factor

DRAW = np.random.default_rng(0)


def graph_of(kind: str) -> tuple[ir.Model, ir.Value]:
    """A model of one product of x f[1, 2, 8] with 4 columns, which a Neg reads, and the value that a factor goes into."""
    x = ir.Value(name="x", shape=ir.Shape([1, 2, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    weights = DRAW.standard_normal((4, 8) if kind == "transposed" else (8, 4)).astype(np.float32)
    held = ir.Value(
        name="w",
        shape=ir.Shape(weights.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(weights),
    )
    nodes, right = [], held
    if kind == "transposed":
        nodes.append(ir.node("Transpose", [held], {"perm": [1, 0]}))
        right = nodes[-1].outputs[0]
    nodes.append(ir.node("MatMul", [x, right]))
    value = nodes[-1].outputs[0]
    initializers = [held]
    if kind in ("bias", "added"):
        other = x
        if kind == "bias":
            bias = DRAW.standard_normal(4).astype(np.float32)
            other = ir.Value(
                name="b",
                shape=ir.Shape([4]),
                type=ir.TensorType(ir.DataType.FLOAT),
                const_value=ir.tensor(bias),
            )
            initializers.append(other)
        else:
            nodes.append(ir.node("ReduceMax", [x]))
            other = nodes[-1].outputs[0]
        nodes.append(ir.node("Add", [other, value]))
        value = nodes[-1].outputs[0]
    nodes.append(ir.node("Neg", [value]))
    if kind == "read twice":
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], value]))
    result = nodes[-1].outputs[0]
    result.name, result.type, result.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([1, 2, 4])
    graph = ir.Graph(
        [x], [result], nodes=nodes, initializers=initializers, opset_imports={"": 21}, name="product"
    )
    return ir.Model(graph, ir_version=10), value


def run(model: ir.Model, x: np.ndarray) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("kind", ["plain", "transposed", "bias"])
def test_the_result_is_multiplied(kind: str) -> None:
    model, value = graph_of(kind)
    x = DRAW.standard_normal((1, 2, 8)).astype(np.float32)
    expected, before = 0.125 * run(model, x), len(list(model.graph))
    assert fold_factor(value, 0.125)
    assert len(list(model.graph)) == before
    np.testing.assert_array_equal(run(model, x), expected)  # a power of 2: nothing is rounded


@pytest.mark.parametrize("kind", ["added", "read twice"])
def test_others_are_left(kind: str) -> None:
    model, value = graph_of(kind)
    before = ir.to_proto(model).SerializeToString()
    assert not fold_factor(value, 0.125)
    assert ir.to_proto(model).SerializeToString() == before
