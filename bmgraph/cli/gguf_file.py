"""Opens a `.gguf` file: its header is bounded first, no weight is invented, and whatever its readers raise is one clear error.

The reader of the package gguf follows every count in a header, also behind the end of the file.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bmgraph.cli.config_fields import ConfigFields
from bmgraph.cli.hf_folder import Folder, import_transformers
from bmgraph.cli.hf_sizes import BoundedSizes, Sayer, check_counts
from bmgraph.cli.hf_tokenizer import MOST_VALUES, told
from bmgraph.cli.hf_weights import MOST_TENSORS, SAFELY, check_weights_found, from_pretrained
from bmgraph.errors import InputError

MAGIC, VERSIONS = b"GGUF", (2, 3)
MOST_FIELDS, MOST_DIMENSIONS = 10_000, 8
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Number of a type of value in a header -> its format for struct."""


@dataclass(frozen=True)
class Header:
    """What the header of a file says: numbers of its metadata by name, and the shapes of its tensors."""

    numbers: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]


def open_gguf(file: Path) -> Folder:
    """The model and tokenizer in a file; raises InputError, naming it, if it is damaged, hostile, or lacks weights."""
    if not file.is_file():
        raise InputError(f"there is no file {file}")
    transformers = import_transformers()
    header = read_header(file)
    says = Sayer(f"the metadata of {file}", "the file", "take the file anew from where it comes")
    shapes = list(header.shapes.values())
    check_counts(says, header.numbers, max([len(shapes), *(size for shape in shapes for size in shape)]))
    with BoundedSizes(says, sum(map(math.prod, shapes)), len(shapes)):
        model, found = from_pretrained(
            transformers.AutoModelForCausalLM, file.parent, file, gguf_file=file.name, dtype=torch.float32
        )
    check_weights_found(file, model, found)
    with told(file):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(file.parent), gguf_file=file.name, **SAFELY
        )
    config: Any = model.config
    return Folder(model, tokenizer, ConfigFields(config.to_dict()))


def read_header(file: Path) -> Header:
    """The header of a file; raises InputError where it is truncated, claims more than the file holds, or is too large."""
    try:
        with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise InputError(f"{file} cannot be read as a .gguf file: {str(error)[:200]}") from error


class _Reader:
    """Walks a header from its begin; raises ValueError or struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._values = data, 0, 0

    def header(self) -> Header:
        if self._bytes(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := self._number("I")) not in VERSIONS:
            raise ValueError(f"it is of version {version}: expected {' or '.join(map(str, VERSIONS))}")
        tensors = self._count("Q", MOST_TENSORS, "tensors")
        fields = self._count("Q", MOST_FIELDS, "fields")
        values = {self._text(): self._value(self._number("I")) for _ in range(fields)}
        found = [self._tensor() for _ in range(tensors)]
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r}")
        self._check_inside(found, -(-self._at // alignment) * alignment)
        numbers = {name: value for name, value in values.items() if type(value) is int}
        shapes = {name: shape for name, shape, _, _ in found}
        if len(shapes) < len(found):
            raise ValueError("it holds two tensors of one name")
        return Header(numbers, shapes)

    def _check_inside(self, found: list[tuple[str, tuple[int, ...], int, int]], begin: int) -> None:
        """Raise ValueError for a tensor that is not whole in the file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        for name, shape, kind, offset in found:
            per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            size = math.prod(shape) * block_bytes // per_block
            if begin + offset + size > len(self._data):
                raise ValueError(f"tensor {name[:80]!r} of shape {list(shape)} does not fit in the file")

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """The name, shape, type and offset of a tensor."""
        name = self._text()
        count = self._count("I", MOST_DIMENSIONS, f"dimensions of tensor {name[:80]!r}")
        shape = tuple(self._number("Q") for _ in range(count))
        return name, shape, self._number("I"), self._number("Q")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            if kind not in SCALARS:
                raise ValueError(f"it holds a value of the unknown type {kind}")
            return self._number(SCALARS[kind])
        kind = self._number("I")
        count = self._count("Q", MOST_VALUES - self._values, "values in lists")
        self._values += count
        if kind == STRING:
            for _ in range(count):
                self._skip(self._number("Q"))
        elif kind in SCALARS:
            self._skip(count * struct.calcsize(SCALARS[kind]))
        else:
            raise ValueError(f"it holds a list of the type {kind}, which is none of numbers or texts")
        return None

    def _count(self, kind: str, most: int, what: str) -> int:
        found = int(self._number(kind))
        if found > most:
            raise ValueError(f"it claims {found} {what}, more than {most}")
        return found

    def _number(self, kind: str) -> Any:
        size = struct.calcsize(f"<{kind}")
        return struct.unpack(f"<{kind}", self._bytes(size))[0]

    def _text(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8")

    def _bytes(self, size: int) -> bytes:
        begin = self._at
        self._skip(size)
        return self._data[begin : self._at]

    def _skip(self, size: int) -> None:
        if size > len(self._data) - self._at:
            raise ValueError("its header goes on behind the end of the file")
        self._at += size
