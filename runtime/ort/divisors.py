"""Integer divisors of a saved ONNX model must be constants: kernels end the process where they divide by 0, or the least
number by -1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bmgraph.errors import BundleError
from bmgraph.runtime.ort.branches_allowlist import branches
from bmgraph.utils.element_count import element_count

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_FROM_FIRST = frozenset({"Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators that give the elements of their first input."""

_NOT_AS_FIRST = frozenset(
    {"ArgMax", "ArgMin", "Cast", "CastLike", "ConstantOfShape", "DequantizeLinear", "DynamicQuantizeLinear", "EyeLike", "Equal",
     "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "MatMulIntegerToFloat", "NonZero", "OneHot",
     "QLinearConv", "QLinearMatMul", "QuantizeLinear", "Shape", "Size", "Where", "Constant"}
)  # fmt: skip
"""Operators whose first output may have another type than their first input."""

_MOST_DIVISORS = 2**16


class Divisors:
    """Follows which values are of a floating-point type, and which are constants."""

    def __init__(self, model: ModelProto) -> None:
        import onnx

        proto = onnx.TensorProto
        self._floats = {
            proto.FLOAT, proto.DOUBLE, proto.FLOAT16, proto.BFLOAT16, proto.FLOAT8E4M3FN, proto.FLOAT8E5M2,
        }  # fmt: skip
        graph = model.graph
        self._floating = {item.name for item in graph.initializer if item.data_type in self._floats}
        self._floating |= {
            item.name for item in graph.input if item.type.tensor_type.elem_type in self._floats
        }
        self._constants = {item.name: item for item in graph.initializer}

    def follow(self, node: NodeProto) -> None:
        """Take in one node, in the graph's order; raises BundleError for a divisor that is not a harmless constant."""
        if node.op_type in ("Div", "Mod") and not self._floating.intersection(node.input):
            self._check(node)
        if not node.output:
            return
        if self._is_floating(node):
            self._floating.add(node.output[0])
            if node.op_type == "Split":
                self._floating.update(node.output)
        if node.op_type == "Constant":
            for item in node.attribute:
                if item.HasField("t"):
                    self._constants[node.output[0]] = item.t
        elif node.op_type in _FROM_FIRST and node.input and node.input[0] in self._constants:
            self._constants[node.output[0]] = self._constants[node.input[0]]

    def _is_floating(self, node: Any) -> bool:
        given = {item.name: item for item in node.attribute}
        if node.op_type == "If":
            return all(branch.output[0].name in self._floating for branch in branches(node))
        if node.op_type == "Cast":
            return "to" in given and given["to"].i in self._floats
        if node.op_type in ("DequantizeLinear", "MatMulIntegerToFloat"):
            return True
        if node.op_type == "Constant":
            return "value_float" in given or "value_floats" in given or self._is_float_value(given)
        if node.op_type == "ConstantOfShape":
            return "value" not in given or self._is_float_value(given)
        index = {"CastLike": 1, "Where": 1, "OneHot": 2, "GatherBlockQuantized": 2}.get(node.op_type)
        if index is None:
            index = None if node.op_type in _NOT_AS_FIRST else 0
        return index is not None and len(node.input) > index and node.input[index] in self._floating

    def _is_float_value(self, given: dict[str, Any]) -> bool:
        return "value" in given and given["value"].t.data_type in self._floats

    def _check(self, node: Any) -> None:
        import onnx

        where = f"node {node.name!r} ({node.op_type})"
        name = node.input[1] if len(node.input) > 1 else ""
        found = self._constants.get(name)
        if found is None or found.data_location == onnx.TensorProto.EXTERNAL:
            raise BundleError(f"{where} divides integers by {name!r}, which is not a constant of the file")
        if element_count(found.dims) > _MOST_DIVISORS:
            raise BundleError(f"{where} divides by more than {_MOST_DIVISORS} numbers")
        try:
            divisors = onnx.numpy_helper.to_array(found)
        except ValueError as error:  # the values are stored under another type
            raise BundleError(f"{where} divides by {name!r}, which cannot be read") from error
        if bool((divisors == 0).any()) or bool((divisors == -1).any()):
            raise BundleError(f"{where} divides integers by 0 or -1, which can end the process")
