"""What every backend that lowers by ONNX does with a program before it is translated."""

from __future__ import annotations

import torch

from bmgraph.backends.onnx.complex_pairs import write_complex_as_pairs
from bmgraph.backends.onnx.dynamic_splits import slice_dynamic_splits
from bmgraph.backends.onnx.scatter_sources import cut_scatter_sources
from bmgraph.errors import BackendError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.passes.cast import Cast, computes_in
from bmgraph.utils.eight_bits import is_float8


def casts(program: Program) -> tuple[ModelPass, ...]:
    """The passes that a program needs first: a cast of a bfloat16 program to fp32, since numpy has no such type."""
    return (Cast("fp32"),) if computes_in(program, torch.bfloat16) else ()


def check_lowerable(program: Program, library: str) -> None:
    """Raise BackendError for a program on the meta device, in bfloat16 or with codes of fp8; `library` is what is to run it."""
    if program.device.type == "meta":
        raise BackendError(
            "a program on the meta device has no weights to build an engine from: load them first"
        )
    where = computes_in(program, torch.bfloat16)
    if where:
        raise BackendError(
            f"{where} is in bfloat16, which {library} does not compute in: run the pass Cast('fp32') first"
        )
    floats = next((name for name, value in program.parameters.items() if is_float8(value.dtype)), None)
    if floats is not None:
        raise BackendError(
            f"{floats} is fp8, for which {library} has no kernel: take the backend tensorrt, or Quantize('int8')"
        )


def write_in_standard_calls(program: Program) -> None:
    """Replace the calls of a deployed program for which ONNX has no form, in place."""
    write_complex_as_pairs(program)
    slice_dynamic_splits(program)
    cut_scatter_sources(program)
