"""Check the weights of an untrusted ONNX file: that exactly the elements that they claim are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bmgraph.errors import BundleError
from bmgraph.utils.element_count import element_count

if TYPE_CHECKING:
    from onnx import TensorProto

_MOST_EMPTY = 2**22
_MOST_AXES = 64
_PACKED = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2}
"""The bits of an element, of types that are stored several in a byte."""


def stored_size(item: TensorProto, weights: tuple[str, int] | None) -> tuple[int, int]:
    """The number of elements of a weight, counting sizes of 0 as 1, and the bytes of each.

    Raises BundleError unless exactly the elements of its sizes are stored; `weights` are the name and size of the other file
    that may hold them. A size of 0 next to large ones is refused: sums over it would have the large ones.
    """
    import onnx

    if any(dim < 0 for dim in item.dims) or len(item.dims) > _MOST_AXES:
        raise BundleError(f"weight {item.name!r} has a negative size or more than {_MOST_AXES} axes")
    count = element_count(item.dims)
    if item.data_type == onnx.TensorProto.STRING:
        raise BundleError(f"weight {item.name!r} holds strings")
    try:
        itemsize = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(item.data_type)).itemsize
    except KeyError as error:
        raise BundleError(f"weight {item.name!r} has an unknown type") from error
    bits = _PACKED.get(onnx.TensorProto.DataType.Name(item.data_type))
    size = count * itemsize if bits is None else -(-count * bits // 8)
    if item.data_location == onnx.TensorProto.EXTERNAL:
        _check_external(item, size, weights)
    elif item.raw_data and len(item.raw_data) != size:
        raise BundleError(f"weight {item.name!r} has {len(item.raw_data)} bytes for {count} elements")
    elif not item.raw_data:
        fields = (item.float_data, item.int32_data, item.int64_data, item.double_data, item.uint64_data)
        held = max(map(len, fields))
        if held != (count if bits is None else size):
            raise BundleError(f"weight {item.name!r} has {held} values for {count} elements")
    bound = element_count(max(1, dim) for dim in item.dims)
    if not count and bound > _MOST_EMPTY:
        raise BundleError(f"weight {item.name!r} is empty, with other sizes of {bound} elements")
    return bound, itemsize


def _check_external(item: Any, size: int, weights: tuple[str, int] | None) -> None:
    entries = {entry.key: entry.value for entry in item.external_data}
    if weights is None or entries.get("location") != weights[0]:
        raise BundleError(
            f"weight {item.name!r} lies in {entries.get('location')!r}, which is not a file of the bundle"
        )
    numbers = [entries.get("offset", "0"), entries.get("length", str(size))]
    if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in numbers):
        raise BundleError(f"weight {item.name!r} has an offset or length that is not an integer")
    offset, length = map(int, numbers)
    if length != size or offset + length > weights[1]:
        raise BundleError(f"weight {item.name!r} does not lie within {weights[0]!r}")
