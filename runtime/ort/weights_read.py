"""How many bytes of weights one call of a model reads: all of them, but tables of which it picks rows."""

from __future__ import annotations

from bmgraph.runtime.node_times import all_nodes
from bmgraph.runtime.ort.model_files import ModelFiles

PICKS = frozenset({"Gather", "GatherBlockQuantized"})
"""Operators that read a few rows of their first input."""


def weights_read(files: ModelFiles) -> int:
    """Bytes of the weights of a model, but of those that only lookups read."""
    import onnx

    model = onnx.ModelProto.FromString(bytes(files.opened[files.model].read()))
    read = {
        name
        for node in all_nodes(model.graph)
        for index, name in enumerate(node.input)
        if not (node.op_type in PICKS and index != 1)
    }
    return sum(_bytes(item) for item in model.graph.initializer if item.name in read)


def _bytes(item: object) -> int:
    import onnx

    dims, kind = item.dims, item.data_type  # type: ignore[attr-defined]
    bits = _HALF_BYTES.get(kind) or 8 * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    count = 1
    for dim in dims:
        count *= dim
    return (count * bits + 7) // 8


_HALF_BYTES = {21: 4, 22: 4, 25: 2, 26: 2}
"""Numbers of ONNX's types of less than a byte (UINT4, INT4, UINT2, INT2) -> their bits."""
