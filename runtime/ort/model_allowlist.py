"""What an ONNX file may hold before ONNX Runtime sees it: operators on a list, and constants of bounded size.

A file of 544 bytes can make session creation take a gigabyte, by constants that are unfolded there.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bmgraph.errors import BundleError
from bmgraph.runtime.ort.moe_allowlist import MIXTURES, check_mixture

MICROSOFT = frozenset(
    {"FusedMatMul", "Gelu", "MatMulIntegerToFloat", "MatMulNBits", "MoE", "MultiHeadAttention", "QMoE"}
)
"""Operators of ONNX Runtime's own domain that we emit."""

STANDARD = frozenset(
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
"""Standard operators that a model of ours may call: no control flow, randomness, strings or windows made of a number."""

GROWING = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1, "Resize": 3, "OneHot": 1, "Pad": 1, "Range": 1}
"""Operators whose result's size the value of an input says -> the place of that input."""

KEEPING = frozenset({"Reshape", "Transpose", "Cast", "CastLike", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Neg",
                     "DequantizeLinear", "QuantizeLinear", "Slice", "Not", "Abs", "Sqrt", "Reciprocal", "Exp", "Log", "Sin",
                     "Cos", "Split", "Softmax", "Trilu", "Tanh", "Sigmoid", "Clip", "Floor", "Ceil", "Round"})  # fmt: skip
"""Operators that give no more elements than their first input has."""

BY_ATTRIBUTE = frozenset(
    {"Conv", "ConvInteger", "QLinearConv", "ConvTranspose", "AveragePool", "MaxPool", "RNN", "GRU", "LSTM"}
)
"""Operators whose attributes may make their result large: never on constants alone."""

MOST_ELEMENTS = 2**22
"""The most elements that a value made of constants alone may have beyond those of the largest weight."""

HIGHEST_OPSET = 26
MOST_NODES = 1_000_000


def admit(file: Path, folder: Path, data: str | None) -> tuple[list[str], list[str]]:
    """Check a model file; returns the names of its inputs and outputs.

    `data` is the one file beside it that may hold weights. Raises BundleError naming the node for anything else.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(file), load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise BundleError(f"{file} is no ONNX model: {str(error)[:200]}") from error
    if model.functions or model.training_info:
        raise BundleError(f"{file} defines functions or training, which no engine of ours does")
    for opset in model.opset_import:
        if opset.domain not in ("", "ai.onnx", "com.microsoft") or not 1 <= opset.version <= HIGHEST_OPSET:
            raise BundleError(
                f"{file} uses operator set {opset.domain!r} {opset.version}, which is not admitted"
            )
    graph = model.graph
    if graph.sparse_initializer or len(graph.node) > MOST_NODES:
        raise BundleError(f"{file} holds a graph that no engine of ours has")
    sizes = {item.name: _check_weight(item, folder, data) for item in graph.initializer}
    if len(sizes) != len(graph.initializer):
        raise BundleError(f"{file} names a weight twice")
    values = {item.name: item for item in graph.initializer}
    limit = MOST_ELEMENTS + max(sizes.values(), default=0)
    inputs = {item.name: _fixed_sizes(item) for item in graph.input}
    moving = {name for name, fixed in inputs.items() if not all(fixed)}
    for node in graph.node:
        _check_node(node)
        if node.op_type in MIXTURES:
            check_mixture(node, values)
        if moving.intersection(node.input):
            moving.update(node.output)
        if node.op_type in ("Shape", "Size") and _is_fixed(node, moving, inputs):
            sizes.update(dict.fromkeys(node.output, 64))
            continue
        made = _constant_size(node, sizes, values, limit)
        if made is not None:
            if made > limit:
                raise BundleError(
                    f"node {node.name!r} ({node.op_type}) unfolds constants to {made} elements, more than {limit}"
                )
            for name in node.output:
                sizes[name] = made
    return [item.name for item in graph.input], [item.name for item in graph.output]


def _fixed_sizes(item: Any) -> list[bool]:
    """For each dimension of an input, whether the file fixes it."""
    if not item.type.HasField("tensor_type") or not item.type.tensor_type.HasField("shape"):
        return [False]
    return [dim.HasField("dim_value") for dim in item.type.tensor_type.shape.dim]


def _is_fixed(node: Any, moving: set[str], inputs: dict[str, list[bool]]) -> bool:
    """Whether ONNX Runtime knows the shape that a node reads without running it, and so unfolds what is made of it."""
    name = node.input[0] if node.input else ""
    if name not in moving:
        return True
    if name not in inputs:
        return False
    bounds = {item.name: item.i for item in node.attribute}
    return node.op_type == "Shape" and all(inputs[name][bounds.get("start", 0) : bounds.get("end")])


def _check_weight(item: Any, folder: Path, data: str | None) -> int:
    import onnx

    if any(dim < 0 for dim in item.dims):
        raise BundleError(f"weight {item.name!r} has a negative size")
    count = int(prod(item.dims))
    try:
        itemsize = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(item.data_type)).itemsize
    except KeyError as error:
        raise BundleError(f"weight {item.name!r} has an unknown type") from error
    if item.data_type == onnx.TensorProto.STRING:
        raise BundleError(f"weight {item.name!r} holds strings")
    if item.data_location == onnx.TensorProto.EXTERNAL:
        entries = {entry.key: entry.value for entry in item.external_data}
        if data is None or entries.get("location") != data:
            raise BundleError(
                f"weight {item.name!r} lies in {entries.get('location')!r}, which is not a file of the bundle"
            )
        try:
            offset, length = (
                int(entries.get("offset", "0")),
                int(entries.get("length", str(count * itemsize))),
            )
        except ValueError as error:
            raise BundleError(f"weight {item.name!r} has an unreadable place") from error
        if offset < 0 or length != count * itemsize or offset + length > (folder / data).stat().st_size:
            raise BundleError(f"weight {item.name!r} does not lie within {data!r}")
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
    import onnx

    if node.domain == "com.microsoft":
        known = node.op_type in MICROSOFT
    else:
        known = node.domain in ("", "ai.onnx") and node.op_type in STANDARD
    if not known:
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        raise BundleError(f"node {node.name!r} calls {name}, which is not admitted")
    for attribute in node.attribute:
        if attribute.HasField("g") or attribute.graphs or attribute.HasField("sparse_tensor"):
            raise BundleError(f"node {node.name!r} holds a graph of its own, which is not admitted")
        if attribute.HasField("t") and (
            attribute.t.data_location == onnx.TensorProto.EXTERNAL
            or attribute.t.data_type == onnx.TensorProto.STRING
        ):
            raise BundleError(f"node {node.name!r} holds a constant that is not its own")


def _constant_size(node: Any, sizes: dict[str, int], values: dict[str, Any], limit: int) -> int | None:
    """An upper bound of the elements of a value made of constants alone; None where an input of the model enters."""
    if node.op_type == "Constant":
        for attribute in node.attribute:
            if attribute.HasField("t"):
                return _check_inline(node, attribute.t)
            return max(1, len(attribute.ints), len(attribute.floats))
        return 1
    place = GROWING.get(node.op_type)
    if place is not None and len(node.input) > place and node.input[place] in values:
        _check_growth(node, values, limit, sizes)
    if any(name and name not in sizes for name in node.input):
        return None
    if node.op_type in BY_ATTRIBUTE:
        raise BundleError(
            f"node {node.name!r} ({node.op_type}) computes on constants alone, which no engine of ours does"
        )
    if node.op_type in KEEPING:
        return sizes.get(node.input[0], 1) if node.input else 1
    if node.op_type in GROWING:
        return _check_growth(node, values, limit, sizes)
    return (
        prod(max(1, sizes[name]) for name in node.input if name)
        if node.op_type != "Concat"
        else sum(sizes[name] for name in node.input)
    )


def _broadcast(one: list[int], other: list[int]) -> int:
    """The elements of two shapes together."""
    longest = max(len(one), len(other))
    padded = [[1] * (longest - len(item)) + item for item in (one, other)]
    return prod(max(pair) for pair in zip(*padded))


def _check_inline(node: Any, tensor: Any) -> int:
    count = int(prod(tensor.dims))
    if count > MOST_ELEMENTS or any(dim < 0 for dim in tensor.dims):
        raise BundleError(f"node {node.name!r} holds a constant of {count} elements")
    return count


def _check_growth(node: Any, values: dict[str, Any], limit: int, sizes: dict[str, int]) -> int:
    """The elements that a growing operator makes of constants, at most; raises where it is beyond the limit."""
    import onnx

    place = GROWING[node.op_type]
    known = node.input[place] if len(node.input) > place else ""
    if known not in values or node.op_type in ("Pad", "Resize", "OneHot", "Range"):
        if all(name in sizes for name in node.input if name):
            raise BundleError(
                f"node {node.name!r} ({node.op_type}) grows constants by sizes that cannot be bounded"
            )
        return 0
    item = values[known]
    if prod(item.dims) > 16:
        raise BundleError(f"node {node.name!r} ({node.op_type}) takes {prod(item.dims)} sizes")
    if item.data_location == onnx.TensorProto.EXTERNAL:
        raise BundleError(f"node {node.name!r} ({node.op_type}) takes its sizes from another file")
    wanted = [abs(int(size)) for size in onnx.numpy_helper.to_array(item).reshape(-1)]
    made = prod(max(1, size) for size in wanted)
    if node.op_type == "Tile":
        made *= sizes.get(node.input[0], 1)
    elif node.op_type == "Expand" and node.input[0] in sizes:
        given = values.get(node.input[0])
        made = _broadcast(list(given.dims), wanted) if given is not None else made * sizes[node.input[0]]
    if made > limit:
        raise BundleError(f"node {node.name!r} ({node.op_type}) makes {made} elements, more than {limit}")
    return made
