"""Stream: run within a limit of memory, with the weights that do not fit read from their files as they are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import FOR_ENGINES, Effect, ModelPass
from bmgraph.utils.byte_size import bytes_of
from bmgraph.utils.stored_tensor import left_in_file


@dataclass(frozen=True, repr=False)
class Stream(ModelPass):
    """Let an engine on torch take at most `memory` for weights, activations and a KV cache: weights that do not fit are read from
    their safetensors file at each call, ahead of their use.

    memory: a text such as "300MB" or "2GiB", or a number of bytes. The weights stay in the files that they come from: a folder
    that `weights=` names for a model on the meta device, or a saved program. What passes made, such as codes of int8, is
    written to temporary files (TMPDIR) when the engine is built. What the limit leaves beside activations keeps a part of the
    weights in memory for all calls, and the rest is room to read ahead. Large linears are computed in blocks of outputs,
    and of tables only the rows that are looked up are read. `engine.schedule(**batch)` says what stays, what is read in which order, and the
    predicted peak. The limit is that of calls: compiling compares parts of the model in memory. With `Torch(devices="cuda:0")` it is a limit of that
    device's memory, and weights are copied there ahead of their use.

    Raises InputError for a text that is no size; building the engine raises BackendError where the limit is too small for its example,
    and says the smallest one. Source: Li et al. 2022 (BMInf; scheduling between memories).

    Example:
        >>> Stream("300MB").memory_limit
        300000000
    """

    effect: ClassVar[Effect] = "exact"
    provides: ClassVar[frozenset[str]] = frozenset({"streamed", FOR_ENGINES})
    may_match_nothing: ClassVar[bool] = True

    memory: str | int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory_limit is None or self.memory_limit <= 0:
            raise InputError(
                f"Stream(memory={self.memory!r}): give a size above 0, such as '300MB' or '2GiB', or a number of bytes"
            )

    @property
    def memory_limit(self) -> int | None:
        """The limit in bytes."""
        return bytes_of(self.memory) if isinstance(self.memory, str) else self.memory

    def run(self, program: Program, context: Context) -> Program:
        """Set the program's limit, and leave all weights of files in them."""
        program.memory = self.memory_limit
        for name, tensor in program.parameters.items():
            left = left_in_file(tensor)
            if left is not tensor:
                program.parameters[name] = left
                context.edited(name, "read from its file at each use")
        return program
