"""The configuration `OpenVINO`, and the steps from a program to its engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import onnx_ir as ir
import torch

from bmgraph.backends.backend_base import Backend
from bmgraph.backends.onnx.backend import owned_tables, write_model
from bmgraph.backends.onnx.export import OPSET
from bmgraph.backends.onnx.lowerable import casts, check_lowerable
from bmgraph.backends.onnx.origins import origin_of
from bmgraph.backends.openvino.lower import BLOCK_BITS, lower
from bmgraph.errors import BackendError, InputError
from bmgraph.ir.cache_spec import FLOAT, INT8
from bmgraph.ir.graph_order import graphs_beside
from bmgraph.ir.program import Program
from bmgraph.lowering.tables_as_inputs import tables_as_inputs
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.pass_manager.pass_manager import PassManager
from bmgraph.pass_manager.report import Report
from bmgraph.pass_manager.target import Target
from bmgraph.passes.kvcache.kvcache import KVCache
from bmgraph.runtime.openvino.compiled import DYNAMIC, STATIC, Settings
from bmgraph.runtime.openvino.engine import PRECISIONS, OpenVinoEngine
from bmgraph.runtime.openvino.library import has_bf16, import_openvino
from bmgraph.runtime.ort.bundle import MODEL_FILE, graph_file
from bmgraph.runtime.ort.model_files import ModelFiles
from bmgraph.runtime.owned_tables import OwnedTables
from bmgraph.runtime.temporary import folder_for_engine
from bmgraph.utils.digest import digest
from bmgraph.utils.locked_folder import LockedFolder

AUTO = "auto"

FIRST = Target(
    "openvino",
    ("static", "none", "blocks"),
    weight_scales=("channel", "block"),
    block_bits=BLOCK_BITS,
    expert_blocks=(),
    smooth=True,
    neurons=16,
)
"""The first version of the target."""

BY_BLOCKS = torch.ops.bmgraph.quantize_blocks.default
"""The rounding of blocks of an activation, which changes outputs by no more than bf16 would."""


@dataclass(frozen=True)
class OpenVINO(Backend[OpenVinoEngine]):
    """Build an OpenVINO engine, for Intel's and AMD's CPUs.

    precision: what float32 is computed in: "f32", "bf16" (outputs move by a few thousandths), or "auto", which is bf16 where
    the program rounds whole activations, by more, and the CPU has it. threads: of one call; by default as many as torch has. shapes:
    "static" compiles a model for each shape of the inputs at its first call (5 to 200 ms) and keeps the last ones; "dynamic"
    runs all shapes on one model, about a tenth slower and with other last bits. generate: give a decoder a KV cache, so that the engine
    has `generate`; one model then serves all shapes (int4 generates faster on ONNX Runtime). cache: a folder of your own in
    which OpenVINO keeps what it compiled, and from which it reads native code the next time. kv_cache: "int8" keeps keys and values
    in codes of 8 bits, with a scale and a zero point for each position and head, in 0.28 of the memory for heads of 64; the report says by how
    much that moves the logits.

    Example:
        >>> from bmgraph.backends import OpenVINO
        >>> OpenVINO(threads=2).shapes
        'static'
    """

    name: ClassVar[str] = "openvino"
    target: ClassVar[Target] = replace(FIRST, attention=True, former=(FIRST,))
    kv_caches: ClassVar[tuple[str, ...]] = (FLOAT, INT8)

    precision: str = AUTO
    threads: int | None = None
    shapes: str = STATIC
    generate: bool = False
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in (AUTO, *PRECISIONS):
            raise InputError(f"precision={self.precision!r}: choose one of {', '.join((AUTO, *PRECISIONS))}")
        if self.shapes not in (STATIC, DYNAMIC):
            raise InputError(f"shapes={self.shapes!r}: choose {STATIC} or {DYNAMIC}")

    @property
    def appended(self) -> tuple[ModelPass, ...]:
        """Passes of the model stage that run after the user's."""
        return (KVCache(),) if self.generate else ()

    def prepended(self, program: Program) -> tuple[ModelPass, ...]:
        """Passes of the model stage that run before the user's: a cast of a bfloat16 program to fp32."""
        return casts(program)

    def generating(self) -> Self:
        """The same configuration, for engines that generate."""
        return replace(self, generate=True)

    def build(self, program: Program, report: Report, manager: PassManager | None = None) -> OpenVinoEngine:
        """Build an engine.

        Raises BackendError where OpenVINO is not installed, for a program on the meta device, in bfloat16 or float64, with a
        KV cache of a fixed size, for a cache that cannot be kept as `kv_cache` says, for an operator that ONNX or OpenVINO lacks, and
        for bf16 on a CPU without it.
        """
        check_lowerable(program, "OpenVINO")
        if self.kv_cache != FLOAT and program.cache is None:
            raise BackendError(
                f"kv_cache={self.kv_cache!r}, and the program has no KV cache: add generate=True, or leave it out"
            )
        import_openvino()
        settings = Settings.of(self._executed(program), self.threads, self.shapes, self.cache, self.kv_cache)
        with folder_for_engine() as folder:
            return self._build_in(folder, program, report, settings)

    def _executed(self, program: Program) -> str:
        """What float32 is computed in; raises BackendError for bf16 on a CPU without it."""
        if self.precision == "bf16" and not has_bf16():
            raise BackendError("this CPU does not compute in bf16: take precision='f32' or 'auto'")
        if self.precision != AUTO:
            return self.precision
        rounds = any(
            traits_of(node).kind is Kind.ROUNDING and node.target is not BY_BLOCKS
            for graph in program.graphs.values()
            for node in graph.nodes
        )
        return "bf16" if rounds and has_bf16() else "f32"

    def _build_in(
        self, folder: LockedFolder, program: Program, report: Report, settings: Settings
    ) -> OpenVinoEngine:
        """Write the models to a folder, which is deleted with the engine."""
        graphs: dict[str, OpenVinoEngine] = {}
        owned = owned_tables(program)
        for entry in graphs_beside(program):
            own = Report(records=report.records, backend=self.name)
            graphs[entry.entry] = _engine(
                folder, entry, graph_file(entry.entry), own, settings, graphs, owned
            )
        engine = _engine(folder, program, MODEL_FILE, report, settings, graphs, owned, owner=True)
        report.backend, report.weights = self.name, digest(program)
        report.bytes = sum(part.files.bytes for part in (*graphs.values(), engine))
        if owned is not None:
            engine.serve_deltas(owned)
            report.bytes += engine.deltas.bytes
            report.notes.append(f"deltas: {engine.deltas!r}"[:1000])
        return engine


def _engine(
    folder: LockedFolder,
    program: Program,
    file: str,
    report: Report,
    settings: Settings,
    graphs: dict[str, OpenVinoEngine],
    owned: OwnedTables | None,
    owner: bool = False,
) -> OpenVinoEngine:
    """The engine of one graph, compiled for its example; the folder is deleted with its `owner`."""
    served = deployed(program)
    tables = tables_as_inputs(served, tuple(owned.tensors) if owned is not None else ())
    start = time.perf_counter()
    lowered = lower(served)
    model, report.rewrites = lowered.model, lowered.rewrites
    report.seconds["translate"] = time.perf_counter() - start
    write_model(model, folder.path, file)
    inputs = tuple(spec for spec in served.inputs if spec.name not in tables)
    start = time.perf_counter()
    try:
        engine = OpenVinoEngine(
            ModelFiles.in_private_folder(folder.path, file), inputs, served.outputs, served.ranges, report,
            replace(settings, rounded_blocks=lowered.rounded_blocks),
            example=served.example, ignored=served.ignored, cache=served.cache, graphs=graphs,
            temporary=folder if owner else None, generation=program.generation, tables=tables, owned=owned,
        )  # fmt: skip
        if all(spec.name in served.example for spec in engine.inputs):
            engine.prepare(served.example)
    except BackendError as error:
        raise BackendError(_with_origin(str(error), model)) from error
    report.seconds["build"] = time.perf_counter() - start
    return engine


def _with_origin(text: str, model: ir.Model) -> str:
    """What OpenVINO says, with the origin of the node that it names, or of the first one of the operator that it names."""
    nodes = list(model.graph.all_nodes())
    found = [node for node in nodes if node.name and node.name in text]
    found = [max(found, key=lambda item: len(str(item.name)))] if found else []
    lacking = [node for node in nodes if f" {node.op_type}-{OPSET}" in text]
    if not found and not lacking:
        return text
    node = (found or lacking)[0]
    return f"{text}; it is {origin_of(node)}: replace it in the model, or take another backend"
