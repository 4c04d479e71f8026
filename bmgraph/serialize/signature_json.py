"""Encodes signatures of graphs as JSON and decodes them: names, dtypes, sizes and ranges are checked."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from typing import Any

import torch

from bmgraph.errors import BundleError
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.signature import Signature
from bmgraph.ir.tensor_spec import DTYPE_NAMES, Range, TensorSpec
from bmgraph.serialize.cache_json import decode_cache, encode_cache

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
MOST_AXES = 64

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_SIZE = re.compile(r"[A-Za-z_0-9(][A-Za-z0-9_ +*/().,\-]{0,199}\Z")


def encode_signature(signature: Signature) -> dict[str, Any]:
    """A signature without its example, as JSON values."""
    return {
        "inputs": [encode_spec(spec) for spec in signature.inputs],
        "outputs": [encode_spec(spec) for spec in signature.outputs],
        "ranges": encode_ranges(signature.ranges),
        "writes": list(signature.writes),
        "losses": list(signature.losses),
        "fixed": list(signature.fixed),
        **({"narrower": list(signature.narrower)} if signature.narrower else {}),
        "ignored": list(signature.ignored),
        "unproven": list(signature.unproven),
        "cache": encode_cache(signature.cache),
    }


def decode_signature(data: Any, buffers: set[str], example: dict[str, torch.Tensor]) -> Signature:
    """The inverse of `encode_signature`, with the example added; raises BundleError for one that is not valid."""
    inputs = tuple(decode_spec(item) for item in data["inputs"])
    for spec in inputs:
        if not is_name(spec.name):  # fx writes it into the code that it generates
            raise BundleError(f"{spec.name!r} is not a valid input name")
    if len({spec.name for spec in inputs}) != len(inputs):
        raise BundleError("two inputs have the same name")
    outputs = tuple(decode_spec(item) for item in data["outputs"])
    if not set(data["writes"]) <= buffers or not set(data["losses"]) <= {spec.name for spec in outputs}:
        raise BundleError("the program names buffer writes or losses that it does not have")
    _check_example(inputs, example)
    return Signature(
        inputs=inputs,
        outputs=outputs,
        ranges=decode_ranges(data["ranges"]),
        writes=tuple(map(text_in, data["writes"])),
        losses=tuple(map(text_in, data["losses"])),
        example=example,
        fixed=tuple(map(text_in, data["fixed"])),
        narrower=tuple(map(text_in, data.get("narrower", []))),
        ignored=tuple(map(text_in, data.get("ignored", []))),
        unproven=tuple(map(text_in, data.get("unproven", []))),
        cache=decode_cache(data, inputs, outputs),
    )


def _check_example(inputs: tuple[TensorSpec, ...], example: Mapping[str, torch.Tensor]) -> None:
    specs = {spec.name: spec for spec in inputs}
    if not set(example) <= set(specs):
        raise BundleError("the example has inputs that the program does not have")
    for name, item in example.items():
        if item.dtype != specs[name].dtype or item.dim() != len(specs[name].shape):
            raise BundleError(
                f"the example of input {name!r} has another dtype or number of dimensions than the input"
            )


def encode_spec(spec: TensorSpec) -> dict[str, Any]:
    """An input or output spec as JSON values."""
    encoded: dict[str, Any] = {"name": spec.name, "dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape)}
    if spec.names:
        encoded["names"] = list(spec.names)
    if spec.values is not None:
        encoded["values"] = list(spec.values)
    if spec.kind is not None:
        encoded["kind"] = str(spec.kind)
    return encoded


def encode_ranges(ranges: Mapping[str, Range]) -> dict[str, Any]:
    """Ranges of dynamic sizes as JSON values."""
    return {name: [item.low, item.high] for name, item in ranges.items()}


def is_name(text: str) -> bool:
    """Whether a text is an identifier that is safe in generated code: not a keyword, not a dunder name."""
    return _IDENTIFIER.match(text) is not None and not keyword.iskeyword(text) and not text.startswith("__")


def text_in(value: Any) -> str:
    """A value of a file that has to be a string; raises BundleError if it is none."""
    if not isinstance(value, str):
        raise BundleError(f"expected a string, found {value!r}")
    return value


def decode_spec(item: Any) -> TensorSpec:
    """The inverse of `encode_spec`; raises BundleError for an invalid name, dtype or size."""
    shape = item["shape"]
    if not isinstance(shape, list) or len(shape) > MOST_AXES:
        raise BundleError(f"{item['name']!r} must have a list of at most {MOST_AXES} sizes as its shape")
    for dim in shape:
        valid = (isinstance(dim, int) and not isinstance(dim, bool) and 0 <= dim < 2**40) or (
            isinstance(dim, str) and _SIZE.match(dim) is not None
        )
        if not valid:
            raise BundleError(f"{dim!r} is not a valid size")
    if item["dtype"] not in DTYPES:
        raise BundleError(f"{item['dtype']!r} is not a valid dtype")
    names = tuple(text_in(name) for name in item.get("names", ()))
    if names and (DTYPES[item["dtype"]] is not torch.int64 or len(shape) != 1):
        raise BundleError(f"{item['name']!r} has names for its values, but is not an i64 vector")
    values = item.get("values")  # absent in files of early versions
    if values is not None and not _is_value_range(values, DTYPES[item["dtype"]]):
        raise BundleError(f"{item['name']!r} has the invalid values {values!r}")
    kind = item.get("kind")  # absent for outputs, and in files of early versions
    if kind is not None and kind not in list(InputKind):
        raise BundleError(
            f"{item['name']!r} has the kind {str(kind)[:80]!r}: expected one of {', '.join(InputKind)}"
        )
    return TensorSpec(
        text_in(item["name"]),
        DTYPES[item["dtype"]],
        tuple(shape),
        names,
        tuple(values) if values else None,
        None if kind is None else InputKind(kind),
    )


def _is_value_range(values: Any, dtype: torch.dtype) -> bool:
    """Whether a decoded value is [low, high] or [low, None] of an integer input."""
    if not isinstance(values, list) or len(values) != 2 or dtype not in (torch.int64, torch.int32):
        return False
    low, high = values
    numbers = [low] if high is None else [low, high]
    return all(type(number) is int for number in numbers) and numbers == sorted(numbers)


def decode_ranges(data: Any) -> dict[str, Range]:
    """The inverse of `encode_ranges`; raises BundleError for an invalid range."""
    ranges = {}
    for name, (low, high) in data.items():
        if (
            not isinstance(low, int)
            or not (high is None or isinstance(high, int))
            or low < 0
            or (high is not None and high < low)
        ):
            raise BundleError(f"{name!r} has the invalid range {low!r} to {high!r}")
        ranges[text_in(name)] = Range(low, high)
    return ranges
