"""Check an untrusted ONNX file before ONNX Runtime reads it: only listed operators, and bounded constant folding.

Without the check a file of 544 bytes can make session creation allocate a gigabyte, by constants that it folds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bmgraph.errors import BundleError
from bmgraph.runtime.ort.moe_allowlist import MIXTURES, check_mixture
from bmgraph.utils.element_count import element_count

_MICROSOFT = frozenset(
    {"FusedMatMul", "Gelu", "MatMulIntegerToFloat", "MatMulNBits", "MoE", "MultiHeadAttention", "QMoE"}
)
"""The operators of ONNX Runtime's own domain that our backend emits."""

_STANDARD = frozenset(
    [
        "Abs",
        "Acos",
        "Acosh",
        "Add",
        "And",
        "ArgMax",
        "ArgMin",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "Attention",
        "AveragePool",
        "BatchNormalization",
        "BitShift",
        "BitwiseAnd",
        "BitwiseNot",
        "BitwiseOr",
        "BitwiseXor",
        "Cast",
        "CastLike",
        "Ceil",
        "Celu",
        "Clip",
        "Compress",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Conv",
        "ConvInteger",
        "ConvTranspose",
        "Cos",
        "Cosh",
        "CumSum",
        "DepthToSpace",
        "DequantizeLinear",
        "Div",
        "Dropout",
        "DynamicQuantizeLinear",
        "Einsum",
        "Elu",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "EyeLike",
        "Flatten",
        "Floor",
        "GRU",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gelu",
        "Gemm",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Greater",
        "GreaterOrEqual",
        "GridSample",
        "GroupNormalization",
        "HardSigmoid",
        "HardSwish",
        "Hardmax",
        "Identity",
        "InstanceNormalization",
        "IsInf",
        "IsNaN",
        "LSTM",
        "LayerNormalization",
        "LeakyRelu",
        "Less",
        "LessOrEqual",
        "Log",
        "LogSoftmax",
        "LpNormalization",
        "MatMul",
        "MatMulInteger",
        "Max",
        "MaxPool",
        "Mean",
        "Min",
        "Mish",
        "Mod",
        "Mul",
        "Neg",
        "NonZero",
        "Not",
        "OneHot",
        "Or",
        "PRelu",
        "Pad",
        "Pow",
        "QLinearConv",
        "QLinearMatMul",
        "QuantizeLinear",
        "RMSNormalization",
        "RNN",
        "Range",
        "Reciprocal",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Relu",
        "Reshape",
        "Resize",
        "RotaryEmbedding",
        "Round",
        "ScatterElements",
        "ScatterND",
        "Selu",
        "Shape",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Size",
        "Slice",
        "Softmax",
        "Softplus",
        "Softsign",
        "SpaceToDepth",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Sum",
        "Swish",
        "Tan",
        "Tanh",
        "TensorScatter",
        "ThresholdedRelu",
        "Tile",
        "TopK",
        "Transpose",
        "Trilu",
        "Unique",
        "Unsqueeze",
        "Where",
        "Xor",
    ]
)
"""The standard operators that are allowed: no control flow, randomness, strings, or windows generated from a size."""

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

_MAX_EXTRA_ELEMENTS = 2**22
"""How many more elements than the largest weight a value computed from constants alone may have."""

_MAX_OPSET = 26
_MAX_NODES = 1_000_000


def admit(file: Path, data: bytes, weights: tuple[str, int] | None) -> tuple[list[str], list[str]]:
    """Check a model, the contents of `file`; returns the names of its inputs and outputs.

    `weights` are the name and the size of the only other file that may hold weights, None for no such file. Raises
    BundleError, naming the node or weight, for anything that is not allowed.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.ModelProto.FromString(data)
    except (DecodeError, ValueError) as error:
        raise BundleError(f"{file} is not a valid ONNX model: {str(error)[:200]}") from error
    if model.functions or model.training_info:
        raise BundleError(f"{file} defines functions or training, which engines of bmgraph never do")
    for opset in model.opset_import:
        if opset.domain not in ("", "ai.onnx", "com.microsoft") or not 1 <= opset.version <= _MAX_OPSET:
            raise BundleError(
                f"{file} uses operator set {opset.domain!r} {opset.version}, which is not allowed"
            )
    graph = model.graph
    if graph.sparse_initializer or len(graph.node) > _MAX_NODES:
        raise BundleError(f"{file} has sparse weights or more than {_MAX_NODES} nodes, which is not allowed")
    sizes = {item.name: _check_weight(item, weights) for item in graph.initializer}
    if len(sizes) != len(graph.initializer):
        raise BundleError(f"{file} names a weight twice")
    values = {item.name: item for item in graph.initializer}
    limit = _MAX_EXTRA_ELEMENTS + max(sizes.values(), default=0)
    inputs = {item.name: _fixed_sizes(item) for item in graph.input}
    dynamic = {name for name, fixed in inputs.items() if not all(fixed)}
    for node in graph.node:
        _check_node(node)
        if node.op_type in MIXTURES:
            check_mixture(node, values)
        if dynamic.intersection(node.input):
            dynamic.update(node.output)
        if node.op_type in ("Shape", "Size") and _is_folded(node, dynamic, inputs):
            sizes.update(dict.fromkeys(node.output, 64))
            continue
        elements = _constant_size(node, sizes, values, limit)
        if elements is not None:
            if elements > limit:
                raise BundleError(
                    f"node {node.name!r} ({node.op_type}) expands constants to {elements} elements, more than {limit}"
                )
            for name in node.output:
                sizes[name] = elements
    return [item.name for item in graph.input], [item.name for item in graph.output]


def _fixed_sizes(item: Any) -> list[bool]:
    """Which axes of an input have a fixed size; one False if the file gives no shape."""
    if not item.type.HasField("tensor_type") or not item.type.tensor_type.HasField("shape"):
        return [False]
    return [dim.HasField("dim_value") for dim in item.type.tensor_type.shape.dim]


def _is_folded(node: Any, dynamic: set[str], inputs: dict[str, list[bool]]) -> bool:
    """Whether ONNX Runtime knows the sizes that a Shape or Size node returns, and so folds them as constants."""
    name = node.input[0] if node.input else ""
    if name not in dynamic:
        return True
    if name not in inputs:
        return False
    bounds = {item.name: item.i for item in node.attribute}
    return node.op_type == "Shape" and all(inputs[name][bounds.get("start", 0) : bounds.get("end")])


def _check_weight(item: Any, weights: tuple[str, int] | None) -> int:
    """The number of elements of a weight; raises BundleError unless exactly that many are stored."""
    import onnx

    if any(dim < 0 for dim in item.dims):
        raise BundleError(f"weight {item.name!r} has a negative size")
    count = element_count(item.dims)
    try:
        itemsize = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(item.data_type)).itemsize
    except KeyError as error:
        raise BundleError(f"weight {item.name!r} has an unknown type") from error
    if item.data_type == onnx.TensorProto.STRING:
        raise BundleError(f"weight {item.name!r} holds strings")
    if item.data_location == onnx.TensorProto.EXTERNAL:
        entries = {entry.key: entry.value for entry in item.external_data}
        if weights is None or entries.get("location") != weights[0]:
            raise BundleError(
                f"weight {item.name!r} lies in {entries.get('location')!r}, which is not a file of the bundle"
            )
        try:
            offset, length = (
                int(entries.get("offset", "0")),
                int(entries.get("length", str(count * itemsize))),
            )
        except ValueError as error:
            raise BundleError(
                f"weight {item.name!r} has an offset or length that is not an integer"
            ) from error
        if offset < 0 or length != count * itemsize or offset + length > weights[1]:
            raise BundleError(f"weight {item.name!r} does not lie within {weights[0]!r}")
    elif item.raw_data and len(item.raw_data) != count * itemsize:
        raise BundleError(f"weight {item.name!r} has {len(item.raw_data)} bytes for {count} elements")
    elif not item.raw_data:
        held = max(
            len(item.float_data),
            len(item.int32_data),
            len(item.int64_data),
            len(item.double_data),
            len(item.uint64_data),
        )
        if held != count:
            raise BundleError(f"weight {item.name!r} has {held} values for {count} elements")
    return count


def _check_node(node: Any) -> None:
    """Raise BundleError unless the operator is listed and its attributes hold neither graphs nor foreign constants."""
    import onnx

    if node.domain == "com.microsoft":
        known = node.op_type in _MICROSOFT
    else:
        known = node.domain in ("", "ai.onnx") and node.op_type in _STANDARD
    if not known:
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        raise BundleError(f"node {node.name!r} calls {name}, which is not allowed")
    for attribute in node.attribute:
        if attribute.HasField("g") or attribute.graphs or attribute.HasField("sparse_tensor"):
            raise BundleError(
                f"node {node.name!r} has a graph or a sparse tensor as an attribute, which is not allowed"
            )
        if attribute.HasField("t") and (
            attribute.t.data_location == onnx.TensorProto.EXTERNAL
            or attribute.t.data_type == onnx.TensorProto.STRING
        ):
            raise BundleError(f"node {node.name!r} has a constant that holds strings or lies in another file")


def _constant_size(node: Any, sizes: dict[str, int], values: dict[str, Any], limit: int) -> int | None:
    """An upper bound on the elements of an output computed from constants alone; None if it depends on a model input."""
    if node.op_type == "Constant":
        for attribute in node.attribute:
            if attribute.HasField("t"):
                return _check_inline(node, attribute.t)
            return max(1, len(attribute.ints), len(attribute.floats))
        return 1
    index = _GROWING.get(node.op_type)
    if index is not None and len(node.input) > index and node.input[index] in values:
        _check_growth(node, values, limit, sizes)
    if any(name and name not in sizes for name in node.input):
        return None
    if node.op_type in _GROWING_BY_ATTRIBUTE:
        raise BundleError(
            f"node {node.name!r} ({node.op_type}) computes from constants alone, which is not allowed"
        )
    if node.op_type in _NOT_GROWING:
        return sizes.get(node.input[0], 1) if node.input else 1
    if node.op_type in _GROWING:
        return _check_growth(node, values, limit, sizes)
    return (
        element_count(max(1, sizes[name]) for name in node.input if name)
        if node.op_type != "Concat"
        else sum(sizes[name] for name in node.input if name)
    )


def _broadcast(one: list[int], other: list[int]) -> int:
    """The number of elements of two shapes broadcast together."""
    rank = max(len(one), len(other))
    padded = [[1] * (rank - len(item)) + item for item in (one, other)]
    return element_count(max(pair) for pair in zip(*padded))


def _check_inline(node: Any, tensor: Any) -> int:
    """The number of elements of a Constant node's tensor; raises BundleError if there are too many."""
    if any(dim < 0 for dim in tensor.dims):
        raise BundleError(f"node {node.name!r} holds a constant with a negative size")
    count = element_count(tensor.dims)
    if count > _MAX_EXTRA_ELEMENTS:
        raise BundleError(f"node {node.name!r} holds a constant of {count} elements")
    return count


def _check_growth(node: Any, values: dict[str, Any], limit: int, sizes: dict[str, int]) -> int:
    """An upper bound on the elements of a `_GROWING` operator's output, 0 if only the run decides; raises beyond `limit`."""
    import onnx

    index = _GROWING[node.op_type]
    name = node.input[index] if len(node.input) > index else ""
    if name not in values or node.op_type in ("Pad", "Resize", "OneHot", "Range"):
        if all(item in sizes for item in node.input if item):
            raise BundleError(
                f"node {node.name!r} ({node.op_type}) expands constants to a size that cannot be bounded"
            )
        return 0
    weight = values[name]
    if (count := element_count(weight.dims)) > 16:
        raise BundleError(f"node {node.name!r} ({node.op_type}) takes {count} sizes, more than 16")
    if weight.data_type not in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
        raise BundleError(f"node {node.name!r} ({node.op_type}) takes sizes that are not integers")
    if weight.data_location == onnx.TensorProto.EXTERNAL:
        raise BundleError(f"node {node.name!r} ({node.op_type}) reads its sizes from another file")
    try:
        shape = [abs(int(size)) for size in onnx.numpy_helper.to_array(weight).reshape(-1)]
    except ValueError as error:  # the values are stored under another type
        raise BundleError(f"weight {name!r} cannot be read") from error
    elements = element_count(max(1, size) for size in shape)
    if node.op_type == "Tile":
        elements *= sizes.get(node.input[0], 1)
    elif node.op_type == "Expand" and node.input[0] in sizes:
        expanded = values.get(node.input[0])
        if expanded is not None:
            elements = _broadcast(list(expanded.dims), shape)
        else:
            elements *= sizes[node.input[0]]
    if elements > limit:
        raise BundleError(
            f"node {node.name!r} ({node.op_type}) expands to {elements} elements, more than {limit}"
        )
    return elements
