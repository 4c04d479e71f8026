"""A program as plain values for a folder of finished work: what passes made of it, and what of the first program it still is."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from bmgraph.errors import BundleError
from bmgraph.ir.joined_graphs import HANDED
from bmgraph.ir.program import Program
from bmgraph.serialize.bundle import parse_json
from bmgraph.serialize.outside_operators import PACKAGES, trusted_operators
from bmgraph.serialize.program_json import decode, encode, encode_examples
from bmgraph.serialize.stored_file import FileTensor
from bmgraph.utils.digest import digest, weights_digest
from bmgraph.utils.stored_tensor import is_too_large, left_in_file, source_of, tensor_on


def program_identity(program: Program) -> dict[str, str]:
    """What a program is: its graph, weights and example. Raises BundleError where it cannot be kept in a file."""
    return {
        "graph of the program": digest(_text(program)),
        "weights": weights_digest(program.tensors()),
        "example": digest(encode_examples(program)),
    }


def packed_program(first: Program, program: Program) -> dict[str, Any]:
    """What `unpacked_program` makes the program of again, given the first one, whose tensors are not in it.

    Raises BundleError where it cannot be kept in a file.
    """
    origins = {_origin(tensor): name for name, tensor in first.tensors().items()}
    shared, own = {}, {}
    for name, tensor in program.tensors().items():
        origin = origins.get(_origin(tensor))
        if origin is not None:
            shared[name] = origin, is_too_large(tensor)
        elif is_too_large(tensor):
            raise BundleError(f"{name!r} is too large to be written again")
        else:
            own[name] = tensor
    handed = {
        node.name: str(node.meta[HANDED])
        for graph in program.graphs.values()
        for node in graph.nodes
        if HANDED in node.meta
    }
    text = torch.frombuffer(bytearray(_text(program).encode()), dtype=torch.uint8)
    return {
        "program": text,
        "shared": shared,
        "own": own,
        "example": encode_examples(program),
        "handed": handed,
    }


def unpacked_program(first: Program, packed: Mapping[str, Any]) -> Program:
    """The program that was packed. Raises BundleError for what is none."""
    given, tree = first.tensors(), _tree(packed["program"])
    tensors: dict[str, torch.Tensor] = {
        name: tensor_on(item, first.device) for name, item in packed["own"].items()
    }
    for name, (origin, left) in packed["shared"].items():
        if origin not in given:
            raise BundleError(f"{name!r} is kept as the tensor {origin!r}, which the program does not have")
        tensor = given[origin]
        tensors[name] = left_in_file(tensor) if left and not is_too_large(tensor) else tensor
    example = {name: item.to(first.device) for name, item in packed["example"].items()}
    # the passes that this run was given may call operators of these packages: they are code that it runs anyway
    packages = tuple(map(str, tree.get(PACKAGES, ())))
    program = decode(tree, tensors, example, trusted_operators([tree], packages))
    for graph in program.graphs.values():
        for node in graph.nodes:
            if node.name in packed["handed"]:
                node.meta[HANDED] = packed["handed"][node.name]
    program.shared = {name: item for name, item in first.shared.items() if name in program.parameters}
    return program


def _text(program: Program) -> str:
    return json.dumps(encode(program), allow_nan=False)


def _tree(text: torch.Tensor) -> dict[str, Any]:
    try:
        tree = parse_json(text.numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"a program that was kept is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(tree, dict):
        raise BundleError("a program that was kept is not a JSON object")
    return tree


def _origin(tensor: torch.Tensor) -> Hashable:
    """Where the values of a tensor are."""
    source = source_of(tensor)
    if isinstance(source, FileTensor):
        return str(source.path), source.offset, source.dtype, source.shape
    return id(tensor)
