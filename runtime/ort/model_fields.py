"""Counts what an ONNX file holds before it is parsed: an empty node takes two bytes in the file and a thousand in memory."""

from __future__ import annotations

from pathlib import Path

from bmgraph.errors import BundleError

MOST_MESSAGES = 600_000
"""Nodes, weights, attributes, entries of metadata and shapes, all together; each takes some 100 bytes once it is parsed."""

MOST_UNPACKED = 2**24
"""Bytes of numbers that are not raw: each may take one byte in the file and eight in memory. Our writer stores them raw."""

_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _VALUE, _TYPE, _TENSOR_TYPE, _SHAPE, _PARTS, _LEAF = range(11)

_CHILDREN: dict[int, dict[int, int]] = {
    _MODEL: {7: _GRAPH, 8: _LEAF, 14: _LEAF},
    _GRAPH: {1: _NODE, 5: _TENSOR, 11: _VALUE, 12: _VALUE, 13: _VALUE, 14: _PARTS, 16: _LEAF},
    _NODE: {5: _ATTRIBUTE, 9: _LEAF},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 14: _TYPE, 15: _TYPE},
    _TENSOR: {3: _LEAF, 13: _LEAF, 16: _LEAF},
    _VALUE: {2: _TYPE, 4: _LEAF},
    _TYPE: {1: _TENSOR_TYPE},
    _TENSOR_TYPE: {2: _SHAPE},
    _SHAPE: {1: _LEAF},
    _PARTS: {2: _LEAF},
    _LEAF: {},
}
"""Kind of message -> field number -> the kind of the message in that field (onnx.proto; the rest is strings and numbers)."""

_REFUSED = {
    (_MODEL, 20): "defines functions or training",
    (_MODEL, 25): "defines functions or training",
    (_MODEL, 26): "names devices",
    (_GRAPH, 15): "has sparse weights",
    (_NODE, 10): "names devices",
    (_ATTRIBUTE, 22): "has a graph or a sparse tensor as an attribute",
    (_ATTRIBUTE, 23): "has a graph or a sparse tensor as an attribute",
    **{(_TYPE, number): "has values that are not tensors" for number in (4, 5, 7, 8, 9)},
}
"""(kind of message, field number) -> what a file does that has it; engines of bmgraph never do."""

_NUMBERS = {_TENSOR: frozenset({1, 4, 5, 7, 10, 11}), _ATTRIBUTE: frozenset({7, 8})}
"""Fields of repeated numbers, packed or one by one."""


def check_fields(file: Path, data: bytes) -> None:
    """Raise BundleError if the file holds more messages or numbers than a model of ours, or is no protobuf message."""
    messages = unpacked = fields = 0
    pending = [(_MODEL, 0, len(data))]
    try:
        while pending:
            kind, place, end = pending.pop()
            messages += 1
            while place < end:
                tag, place = _varint(data, place)
                number, wire = tag >> 3, tag & 7
                fields += 1
                start = place
                if (kind, number) in _REFUSED:
                    raise BundleError(f"{file} {_REFUSED[kind, number]}, which engines of bmgraph never do")
                if wire == 0:
                    _, place = _varint(data, place)
                elif wire == 2:
                    length, place = _varint(data, place)
                    inner = _CHILDREN[kind].get(number)
                    if inner is not None:
                        pending.append((inner, place, place + length))
                    place += length
                elif wire in (1, 5):
                    place += 8 if wire == 1 else 4
                else:
                    raise BundleError(f"{file} is not a valid ONNX model: it has fields of an unknown kind")
                if number in _NUMBERS.get(kind, ()):
                    unpacked += place - start
                if place > end:
                    raise BundleError(f"{file} is not a valid ONNX model: a field ends beyond its message")
                if messages + len(pending) > MOST_MESSAGES or fields > 8 * MOST_MESSAGES:
                    raise BundleError(
                        f"{file} holds more than {MOST_MESSAGES} nodes, weights and entries: models of bmgraph hold fewer"
                    )
                if unpacked > MOST_UNPACKED:
                    raise BundleError(
                        f"{file} holds more than {MOST_UNPACKED // 2**20} MiB of numbers that are not stored raw"
                    )
    except IndexError as error:
        raise BundleError(f"{file} is not a valid ONNX model: it is cut") from error


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of at most 64 bits, and the place after it."""
    byte = data[place]
    place += 1
    if byte < 128:
        return byte, place
    value, shift = byte & 127, 7
    while shift < 70:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
    raise IndexError(place)
