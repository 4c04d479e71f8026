"""Bound what ONNX Runtime computes from constants alone while it makes a session: it folds them, whatever their size.

Without it a file of 544 bytes can make session creation allocate a gigabyte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bmgraph.errors import BundleError
from bmgraph.utils.element_count import element_count

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

_GROWING = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1, "Resize": 3, "OneHot": 1, "Pad": 1, "Range": 1}
"""Operators whose output size depends on the value of an input -> the index of that input."""

_NOT_GROWING = frozenset({"Reshape", "Transpose", "Cast", "CastLike", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Neg",
                     "DequantizeLinear", "QuantizeLinear", "Slice", "Not", "Abs", "Sqrt", "Reciprocal", "Exp", "Log", "Sin",
                     "Cos", "Split", "Softmax", "Trilu", "Tanh", "Sigmoid", "Clip", "Floor", "Ceil", "Round"})  # fmt: skip
"""Operators whose output has at most as many elements as their first input."""

_GROWING_BY_ATTRIBUTE = frozenset(
    {"Conv", "ConvInteger", "QLinearConv", "ConvTranspose", "AveragePool", "MaxPool", "RNN", "GRU", "LSTM"}
)
"""Operators whose attributes can make the output large; refused if all inputs are constants."""

_ONE_FORM = frozenset({"DequantizeLinear", "Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze"})
"""What a stored weight may pass through once at no charge, and a dequantized one by a Transpose once more: an honest model holds its
weights in this form."""

_MAX_EXTRA_ELEMENTS = 2**22
"""How many more elements than the largest weight a value computed from constants alone may have."""

_MAX_BYTES = 96 * 2**20
"""How many bytes more than the weights all values computed from constants alone may have together."""

_WIDEST = 8


class ConstantBudget:
    """The elements of each value that is computed from constants alone, and the bytes that are left for all of them."""

    def __init__(self, values: dict[str, TensorProto], sizes: dict[str, tuple[int, int]]) -> None:
        self._values = values
        self._sizes = {name: elements for name, (elements, _) in sizes.items()}
        self._stored = set(values)
        self._dequantized: set[str] = set()
        self._limit = _MAX_EXTRA_ELEMENTS + max(self._sizes.values(), default=0)
        self._left = _MAX_BYTES + sum(elements * width for elements, width in sizes.values())

    def follow(self, node: NodeProto, known_shape: bool) -> None:
        """Take in one node, in the graph's order; raises BundleError beyond the budget.

        `known_shape`: the node is a Shape or Size whose answer ONNX Runtime knows.
        """
        if known_shape:
            self._sizes.update(dict.fromkeys(node.output, 64))
            return
        elements = self._constant_size(node)
        if elements is None:
            return
        where = f"node {node.name!r} ({node.op_type})"
        if elements > self._limit:
            raise BundleError(f"{where} expands constants to {elements} elements, more than {self._limit}")
        outputs = 1 if node.op_type == "Split" else len(node.output)
        source = node.input[0] if node.input else ""
        if node.op_type in _ONE_FORM and source in self._stored:
            self._stored.discard(source)
            self._dequantized.update(node.output if node.op_type == "DequantizeLinear" else ())
        elif node.op_type == "Transpose" and source in self._dequantized:
            self._dequantized.discard(source)
        else:
            self._left -= elements * outputs * _WIDEST
        if self._left < 0:
            raise BundleError(
                f"{where} computes from constants alone, and all such nodes together make too many bytes: a model of bmgraph "
                "stores its constants computed"
            )
        self._sizes.update(dict.fromkeys(node.output, elements))

    def _constant_size(self, node: Any) -> int | None:
        """An upper bound on the elements of an output computed from constants alone; None if it depends on an input."""
        if node.op_type == "Constant":
            return self._inline_size(node)
        index = _GROWING.get(node.op_type)
        if index is not None and len(node.input) > index and node.input[index] in self._values:
            self._growth(node)
        if any(name and name not in self._sizes for name in node.input):
            return None
        if node.op_type in _GROWING_BY_ATTRIBUTE:
            raise BundleError(
                f"node {node.name!r} ({node.op_type}) computes from constants alone, which is not allowed"
            )
        if node.op_type in _NOT_GROWING:
            return self._sizes.get(node.input[0], 1) if node.input else 1
        if node.op_type in _GROWING:
            return self._growth(node)
        elements = [max(1, self._sizes[name]) for name in node.input if name]
        return sum(elements) if node.op_type == "Concat" else element_count(elements)

    def _inline_size(self, node: Any) -> int:
        """The number of elements of a Constant node's value; raises BundleError if there are too many."""
        for attribute in node.attribute:
            if attribute.HasField("t"):
                count = element_count(max(1, dim) for dim in attribute.t.dims)
                if count > _MAX_EXTRA_ELEMENTS or any(dim < 0 for dim in attribute.t.dims):
                    raise BundleError(f"node {node.name!r} holds a constant of {count} elements")
                return count
        return max([1, *(len(item.ints) + len(item.floats) for item in node.attribute)])

    def _growth(self, node: Any) -> int:
        """An upper bound on the elements of a `_GROWING` operator's output, 0 if only the run decides; raises beyond the
        limit."""
        import onnx

        where = f"node {node.name!r} ({node.op_type})"
        index = _GROWING[node.op_type]
        name = node.input[index] if len(node.input) > index else ""
        if name not in self._values or node.op_type in ("Pad", "Resize", "OneHot", "Range"):
            if all(item in self._sizes for item in node.input if item):
                raise BundleError(f"{where} expands constants to a size that cannot be bounded")
            return 0
        weight = self._values[name]
        if element_count(weight.dims) > 16:
            raise BundleError(f"{where} takes {element_count(weight.dims)} sizes, more than 16")
        if weight.data_location == onnx.TensorProto.EXTERNAL:
            raise BundleError(f"{where} reads its sizes from another file")
        if weight.data_type not in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
            raise BundleError(f"{where} takes sizes that are not integers")
        try:
            sizes = onnx.numpy_helper.to_array(weight).reshape(-1)
        except ValueError as error:  # the values are stored under another type
            raise BundleError(f"weight {name!r} cannot be read") from error
        shape = [abs(int(size)) for size in sizes]
        elements = element_count(max(1, size) for size in shape)
        if node.op_type == "Tile":
            elements *= max(1, self._sizes.get(node.input[0], 1))
        elif node.op_type == "Expand" and node.input[0] in self._sizes:
            expanded = self._values.get(node.input[0])
            if expanded is not None:
                elements = _broadcast(list(expanded.dims), shape)
            else:
                elements *= max(1, self._sizes[node.input[0]])
        if elements > self._limit:
            raise BundleError(f"{where} expands to {elements} elements, more than {self._limit}")
        return elements


def _broadcast(one: list[int], other: list[int]) -> int:
    """The number of elements of two shapes broadcast together, counting sizes of 0 as 1."""
    rank = max(len(one), len(other))
    padded = [[1] * (rank - len(item)) + item for item in (one, other)]
    return element_count(max(1, *pair) for pair in zip(*padded))
