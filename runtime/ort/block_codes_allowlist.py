"""Check calls of ONNX Runtime's kernels for codes of blocks, which read weights by their attributes and rows by any id."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bmgraph.errors import BundleError
from bmgraph.utils.element_count import element_count

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

PRODUCT, LOOKUP = "MatMulNBits", "GatherBlockQuantized"


def check_block_codes(node: NodeProto, weights: dict[str, TensorProto], clips: dict[str, NodeProto]) -> None:
    """Raise BundleError unless codes and scales are weights of the file with as many elements as attributes say, and the ids of
    a lookup are clipped to the rows of its table: the kernel does not check them.

    `clips`: the Clip that makes a value, by the value's name.
    """
    if node.op_type == PRODUCT:
        _check_product(node, weights)
    elif node.op_type == LOOKUP:
        _check_lookup(node, weights, clips)


def _check_product(node: NodeProto, weights: dict[str, TensorProto]) -> None:
    given = {item.name: item.i for item in node.attribute}
    inputs, outputs = given.get("K", 0), given.get("N", 0)
    block, bits = given.get("block_size", 32), given.get("bits", 4)
    count = -(-inputs // block)
    expected = {
        1: outputs * count * block * bits // 8,
        2: outputs * count,
        3: outputs * -(-count * bits // 8),
        5: outputs,
    }
    for index, size in expected.items():
        name = node.input[index] if index < len(node.input) else ""
        if name:
            _check_size(node, weights.get(name), index, size)
        if name and index in (1, 3):
            _check_packed(node, weights[name], index)
    if len(node.input) > 4 and node.input[4]:
        raise BundleError(f"node {node.name!r} ({PRODUCT}) orders its groups (input 4), which is not allowed")


def _check_size(node: NodeProto, weight: TensorProto | None, index: int, size: int) -> None:
    held = element_count(weight.dims) if weight is not None else -1
    if held != size:
        found = f"has {held} elements" if weight is not None else "is no weight of the file"
        raise BundleError(
            f"node {node.name!r} ({node.op_type}): its input {index} {found}, and its attributes say {size}"
        )


def _check_packed(node: NodeProto, weight: TensorProto, index: int) -> None:
    """Raise BundleError for codes or zero points that are not packed in bytes: the kernel counts elements of other types otherwise."""
    import onnx

    if weight.data_type != onnx.TensorProto.UINT8:
        kind = onnx.TensorProto.DataType.Name(weight.data_type)
        raise BundleError(
            f"node {node.name!r} ({node.op_type}): its input {index} is {kind}, and codes and zero points are packed in UINT8"
        )


def _check_lookup(node: NodeProto, weights: dict[str, TensorProto], clips: dict[str, NodeProto]) -> None:
    given = {item.name: item.i for item in node.attribute}
    block, bits = given.get("block_size", 128), given.get("bits", 4)
    codes = weights.get(node.input[0])
    shape = list(codes.dims) if codes is not None else []
    if len(shape) != 2:
        raise BundleError(
            f"node {node.name!r} ({LOOKUP}) has codes of shape {shape}: expected those of a table"
        )
    _check_packed(node, weights[node.input[0]], 0)
    count = -(-(shape[1] * 8 // bits) // block)
    _check_size(node, weights.get(node.input[2]), 2, shape[0] * count)
    if len(node.input) > 3 and node.input[3]:
        _check_size(node, weights.get(node.input[3]), 3, shape[0] * -(-count * bits // 8))
        _check_packed(node, weights[node.input[3]], 3)
    clip = clips.get(node.input[1])
    bounds = [_number(weights.get(name)) for name in clip.input[1:3]] if clip is not None else []
    if (
        len(bounds) != 2
        or bounds[0] is None
        or bounds[1] is None
        or not 0 <= bounds[0] <= bounds[1] < shape[0]
    ):
        raise BundleError(
            f"node {node.name!r} ({LOOKUP}) reads rows by ids that are not clipped to the {shape[0]} rows of its table"
        )


def _number(weight: TensorProto | None) -> int | None:
    """The value of an integer constant that is stored in the file; None for anything else."""
    import onnx

    if weight is None or element_count(weight.dims) != 1 or weight.data_location == onnx.TensorProto.EXTERNAL:
        return None
    if weight.data_type not in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
        return None
    return int(np.asarray(onnx.numpy_helper.to_array(weight)).reshape(-1)[0])
