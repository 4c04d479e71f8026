"""Capture several methods of a model as one program with a graph for each, over the model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from bmgraph.analysis.computation_lines import computation_of
from bmgraph.errors import CaptureError, InputError, VerificationError
from bmgraph.frontend.capture import Example, Prove, capture
from bmgraph.frontend.unwrap import unwrapped
from bmgraph.ir.joined_graphs import join
from bmgraph.ir.program import FORWARD, Program
from bmgraph.ir.verifier import check_program
from bmgraph.utils.digest import fingerprint


def capture_methods(
    model: nn.Module, examples: Mapping[str, Example], *, dynamic: bool = True, prove: Prove = True
) -> Program:
    """Capture methods of a model, `forward` among them, as a Program with a graph and a signature for each.

    `examples` holds the inputs of each method, as `bmgraph.capture` takes them. Where an output of one method has the name of
    an input of another (a dict gives outputs names), the program runs the first for the second: `program(**batch)` runs
    `forward` and what feeds it, `program.at("encode")(**batch)` another method. Passes rewrite all of them together.

    Raises CaptureError as `bmgraph.capture` does, and where methods do not fit each other.

    Example:
        >>> import torch, bmgraph as bg
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.one, self.other = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
        ...     def encode(self, x):
        ...         return {"memory": self.one(x)}
        ...     def forward(self, memory):
        ...         return {"scores": self.other(memory)}
        >>> given = {"encode": {"x": torch.randn(5, 4)}, "forward": {"memory": torch.randn(5, 3)}}
        >>> program = bg.capture_methods(Model(), given)
        >>> program(x=torch.randn(6, 4))["scores"].shape
        torch.Size([6, 2])
    """
    missing = [name for name in (FORWARD, *examples) if not callable(getattr(unwrapped(model), name, None))]
    if missing or FORWARD not in examples:
        what = f"the model has no method {missing[0]!r}" if missing else f"no example of {FORWARD!r} is given"
        raise CaptureError(f"{what}: give an example of each method to capture, {FORWARD!r} among them")
    programs = {}
    for name, example in examples.items():
        with _called(model, name):
            programs[name] = capture(model, example, dynamic=dynamic, prove=prove)
    return combined(programs)


def combined(programs: Mapping[str, Program]) -> Program:
    """One program of programs that were captured from modules that share weights, each under a name, `forward` among them.

    Raises CaptureError where they do not fit each other.
    """
    try:
        return _combined(programs)
    except (InputError, VerificationError) as error:
        raise CaptureError(f"the methods do not fit each other: {error}") from error


def _combined(programs: Mapping[str, Program]) -> Program:
    program = programs[FORWARD].clone()
    for name, other in programs.items():
        if name == FORWARD:
            continue
        program.add_graph(name, other.clone())
        program.ties |= {alias: kept for alias, kept in other.ties.items() if kept in program.parameters}
        program.shared |= other.shared
        program.training = program.training or other.training
        program.backward = program.backward or other.backward
    program.fingerprint = fingerprint(program.parameters)
    check_program(program)
    program.computation = computation_of(join(program)[0])
    return program


@contextmanager
def _called(model: nn.Module, method: str) -> Iterator[None]:
    """Let a call of the model be one of a method of it."""
    inner = unwrapped(model)
    known = inner.__dict__.get("forward")
    if method != FORWARD:
        inner.__dict__["forward"] = getattr(inner, method)
    try:
        yield
    finally:
        inner.__dict__.pop("forward", None)
        if known is not None:
            inner.__dict__["forward"] = known
