"""The operators that a saved ONNX model may call, and the attributes that they may have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bmgraph.errors import BundleError

if TYPE_CHECKING:
    from onnx import NodeProto

MICROSOFT = frozenset(
    {"FusedMatMul", "GatherBlockQuantized", "Gelu", "GroupQueryAttention", "MatMulIntegerToFloat", "MatMulNBits", "MoE",
     "MultiHeadAttention", "QMoE"}
)  # fmt: skip
"""The operators of ONNX Runtime's own domain that our backend emits."""

STANDARD = frozenset({
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "Attention",
    "AveragePool", "BatchNormalization", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor",
    "Cast", "CastLike", "Ceil", "Celu", "Clip", "Compress", "Concat", "Constant", "ConstantOfShape", "Conv",
    "ConvInteger", "ConvTranspose", "Cos", "Cosh", "CumSum", "DepthToSpace", "DequantizeLinear", "Div",
    "Dropout", "DynamicQuantizeLinear", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand", "EyeLike",
    "Flatten", "Floor", "GRU", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool",
    "GlobalMaxPool", "Greater", "GreaterOrEqual", "GridSample", "GroupNormalization", "HardSigmoid",
    "HardSwish", "Hardmax", "Identity", "If", "InstanceNormalization", "IsInf", "IsNaN", "LSTM",
    "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "LpNormalization",
    "MatMul", "MatMulInteger", "Max", "MaxPool", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "NonZero",
    "Not", "OneHot", "Or", "PRelu", "Pad", "Pow", "QLinearConv", "QLinearMatMul", "QuantizeLinear",
    "RMSNormalization", "RNN", "Range", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
    "Relu", "Reshape", "Resize", "RotaryEmbedding", "Round", "ScatterElements", "ScatterND", "Selu",
    "Shape", "Sigmoid", "Sign", "Sin", "Sinh", "Size", "Slice", "Softmax", "Softplus", "Softsign",
    "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Swish", "Tan", "Tanh", "TensorScatter",
    "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unique", "Unsqueeze", "Where", "Xor",
})  # fmt: skip
"""The standard operators that are allowed: no loops, randomness, strings, or windows generated from a size."""

_AT_LEAST_1 = frozenset(
    {"num_heads", "kv_num_heads", "q_num_heads", "num_groups", "group", "blocksize", "hidden_size", "K", "N", "bits", "k",
     "expert_weight_bits"}
)  # fmt: skip
"""Attributes that count heads, groups and elements: kernels divide by them."""

_LISTS_AT_LEAST_1 = frozenset({"strides", "dilations", "kernel_shape"})
_LARGEST_COUNT = 2**20
_LARGEST_LIST_ITEM = 2**16
_LARGEST_NUMBER = 2**31
_LONGEST_LIST = 1024
_NEEDED = {
    "FusedMatMul": range(2), "GatherBlockQuantized": range(3), "GroupQueryAttention": (0, 3, 4, 5, 6),
    "MatMulIntegerToFloat": range(4), "MatMulNBits": range(3),
    "MoE": range(3), "QMoE": range(3),
}  # fmt: skip
"""The inputs that operators of ONNX Runtime's own domain need, if not the first alone."""

BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes that the kernels of MatMulNBits and GatherBlockQuantized have."""


def check_operator(node: NodeProto, opset: int) -> None:
    """Raise BundleError unless the operator is listed, has the inputs that it needs, and attributes without graphs, foreign
    constants, and numbers that kernels divide by or multiply without a check. `opset` is the version of the standard ones."""
    import onnx

    if node.domain == "com.microsoft":
        known = node.op_type in MICROSOFT
    else:
        known = node.domain in ("", "ai.onnx") and node.op_type in STANDARD
    if not known:
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        raise BundleError(f"node {node.name!r} calls {name}, which is not allowed")
    for attribute in node.attribute:
        if (
            (attribute.HasField("g") and node.op_type != "If")  # whose branches are checked as graphs
            or attribute.graphs
            or attribute.HasField("sparse_tensor")
            or attribute.tensors
        ):
            raise BundleError(
                f"node {node.name!r} has a graph or a sparse tensor as an attribute, which is not allowed"
            )
        if attribute.HasField("t") and (
            attribute.t.data_location == onnx.TensorProto.EXTERNAL
            or attribute.t.data_type == onnx.TensorProto.STRING
        ):
            raise BundleError(f"node {node.name!r} has a constant that holds strings or lies in another file")
        _check_numbers(node, attribute)
    _check_inputs(node, opset)
    if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
        _check_blocks(node)


def _check_numbers(node: Any, attribute: Any) -> None:
    where = f"node {node.name!r} ({node.op_type}) has {attribute.name!r}"
    if node.op_type == "Constant":
        return  # a value, which the kernels that read it check
    if attribute.HasField("i"):
        counts = attribute.name in _AT_LEAST_1
        low, high = (1, _LARGEST_COUNT) if counts else (-_LARGEST_NUMBER, _LARGEST_NUMBER)
        if not low <= attribute.i <= high and (counts or attribute.i != 2**63 - 1):
            raise BundleError(f"{where} = {attribute.i}: expected {low} to {high}")
    if len(attribute.ints) > _LONGEST_LIST:
        raise BundleError(f"{where} with {len(attribute.ints)} numbers: at most {_LONGEST_LIST} are allowed")
    low = 1 if attribute.name in _LISTS_AT_LEAST_1 else -_LARGEST_LIST_ITEM
    for item in attribute.ints:
        if not low <= item <= _LARGEST_LIST_ITEM:
            raise BundleError(f"{where} with {item}: expected {low} to {_LARGEST_LIST_ITEM}")


def _check_inputs(node: Any, opset: int) -> None:
    """Raise BundleError if an input that the operator needs is left out: kernels read it without a check."""
    from onnx import defs

    if node.domain == "com.microsoft":
        needed = set(_NEEDED.get(node.op_type, (0,)))
    else:
        try:
            formal = defs.get_schema(node.op_type, opset, "").inputs
        except defs.SchemaError as error:
            raise BundleError(
                f"node {node.name!r} calls {node.op_type}, which operator set {opset} does not have"
            ) from error
        optional = defs.OpSchema.FormalParameterOption.Optional
        needed = {
            index
            for index in range(max(len(node.input), len(formal)))
            if formal and formal[min(index, len(formal) - 1)].option != optional
        }
    for index in sorted(needed):
        if index >= len(node.input) or not node.input[index]:
            raise BundleError(f"node {node.name!r} ({node.op_type}) lacks its input {index}")


def _check_blocks(node: Any) -> None:
    given = {item.name: item.i for item in node.attribute}
    if node.op_type == "GatherBlockQuantized" and (
        given.get("gather_axis", 0),
        given.get("quantize_axis", 1),
    ) != (0, 1):
        raise BundleError(
            f"node {node.name!r} (GatherBlockQuantized) has other axes than those of a table's rows"
        )
    if given.get("block_size", 32) not in BLOCKS or given.get("bits", 4) not in (2, 4, 8):
        raise BundleError(
            f"node {node.name!r} ({node.op_type}) has blocks of {given.get('block_size')} and {given.get('bits')} bits: expected "
            f"blocks of {', '.join(map(str, BLOCKS))} and 2, 4 or 8 bits"
        )
