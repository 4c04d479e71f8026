"""A program whose weights stay in the files that they come from."""

from __future__ import annotations

from bmgraph.ir.program import Program
from bmgraph.utils.stored_tensor import left_in_file


def left_in_files(program: Program) -> Program:
    """A copy whose parameters that are those of files are read at each use, and stay in memory nowhere."""
    copy = program.clone()
    copy.parameters = {name: left_in_file(tensor) for name, tensor in program.parameters.items()}
    return copy
