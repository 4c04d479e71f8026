"""The configuration `Onnx`, and the steps from a program to an ONNX Runtime engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import onnx_ir as ir

from bmgraph.backends.backend_base import Backend
from bmgraph.backends.onnx.cache_reads import prepare_cache_reads
from bmgraph.backends.onnx.export import translate
from bmgraph.backends.onnx.export_experts_split import split_translations
from bmgraph.backends.onnx.float_types import check_float64
from bmgraph.backends.onnx.lowerable import casts, check_lowerable, write_in_standard_calls
from bmgraph.backends.onnx.mask_experts import mask_experts
from bmgraph.backends.onnx.pack_attention import fit_attention, pack_attention
from bmgraph.backends.onnx.pack_experts import pack_experts
from bmgraph.backends.onnx.read_block_codes import read_block_codes
from bmgraph.backends.onnx.rewrite_pipeline import optimise
from bmgraph.backends.onnx.rewrites.shared_cache import ends_input, in_place_slots
from bmgraph.deltas.row_tables import find_row_tables
from bmgraph.ir.graph_order import graphs_beside
from bmgraph.ir.program import Program
from bmgraph.lowering.tables_as_inputs import tables_as_inputs
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.pass_manager.pass_manager import PassManager
from bmgraph.pass_manager.report import Report
from bmgraph.pass_manager.target import ROW, Target
from bmgraph.passes.kvcache.kvcache import KVCache
from bmgraph.runtime.ort.bundle import MODEL_FILE, graph_file
from bmgraph.runtime.ort.engine import OrtEngine
from bmgraph.runtime.ort.model_files import ModelFiles
from bmgraph.runtime.ort.providers import without_gpu_kernel
from bmgraph.runtime.ort.session import runs_on_cpu
from bmgraph.runtime.owned_tables import OwnedTables
from bmgraph.runtime.temporary import folder_for_engine
from bmgraph.utils.digest import digest
from bmgraph.utils.huge_pages import use_huge_pages
from bmgraph.utils.locked_folder import LockedFolder

FIRST = Target(
    "onnx",
    ("static", "dynamic", "none", "blocks"),
    weight_scales=("channel", "block"),
    block_bits=(2, 4, 8),
)
"""The first version of the target."""

SECOND = replace(FIRST, smooth=True, former=(FIRST,))
"""The second version, where experts had no codes of blocks."""

THIRD = replace(SECOND, expert_bits=SECOND.block_bits, former=(FIRST, SECOND))
"""The third version, where inputs of 8-bit experts were rounded by blocks of a row."""


@dataclass(frozen=True)
class Onnx(Backend[OrtEngine]):
    """Build an ONNX Runtime engine.

    providers: execution providers of ONNX Runtime, "cuda", "tensorrt", "cpu" or its own names; by default CUDA where it works, else the CPU. On a
    GPU a KV cache stays there, and so do outputs if an input lies there; 8-bit activations have kernels on the CPU alone. threads: per operator; by
    default one per physical core. optimise: rewrite the model to the operators that ONNX Runtime runs fastest (False: the
    plain export). generate: give a decoder a KV cache, so that the engine has `generate`. huge_pages: once the engine is made, ask
    Linux for huge pages for this process's large blocks of memory: tokens come faster, and what is in such a block takes whole pages.

    Example:
        >>> from bmgraph.backends import Onnx
        >>> Onnx(threads=4).optimise
        True
    """

    name: ClassVar[str] = "onnx"
    why_float: ClassVar[str] = (
        "ONNX Runtime's attention reads codes by scales that are fixed before any text is known, and bmgraph does not fit such scales"
    )
    target: ClassVar[Target] = replace(THIRD, expert_blocks=(ROW,), former=(FIRST, SECOND, THIRD))

    providers: tuple[str, ...] | None = None
    threads: int | None = None
    optimise: bool = True
    generate: bool = False
    huge_pages: bool = False

    @property
    def appended(self) -> tuple[ModelPass, ...]:
        """Passes of the model stage that run after the user's."""
        return (KVCache(),) if self.generate else ()

    def prepended(self, program: Program) -> tuple[ModelPass, ...]:
        """Passes of the model stage that run before the user's: a cast of a bfloat16 program to fp32.

        ONNX Runtime has no bfloat16 kernels on the CPU, and numpy no such type.
        """
        return casts(program)

    def generating(self) -> Self:
        """The same configuration, for engines that generate."""
        return replace(self, generate=True)

    def build(self, program: Program, report: Report, manager: PassManager | None = None) -> OrtEngine:
        """Build an engine.

        Raises BackendError for a program on the meta device or in bfloat16, and for an operator that cannot be
        translated to ONNX or has no kernel in its floating-point type.
        """
        check_lowerable(program, "ONNX Runtime")
        with folder_for_engine() as folder:
            return self._build_in(folder, program, report)

    def _build_in(self, folder: LockedFolder, program: Program, report: Report) -> OrtEngine:
        """Write the models to a folder, which is deleted with the engine."""
        graphs: dict[str, OrtEngine] = {}
        owned = owned_tables(program)
        for entry in graphs_beside(program):
            name, own = graph_file(entry.entry), Report(records=report.records, backend="onnx")
            served, tables = self._lower(entry, folder.path, name, own, owned)
            graphs[entry.entry] = OrtEngine(
                ModelFiles.in_private_folder(folder.path, name), served.inputs, served.outputs, served.ranges, own,
                example=served.example, providers=self.providers, threads=self.threads, ignored=served.ignored,
                cache=served.cache, graphs=graphs, tables=tables, owned=owned,
            )  # fmt: skip
        served, tables = self._lower(program, folder.path, MODEL_FILE, report, owned)
        report.backend, report.weights = "onnx", digest(program)
        report.bytes = sum(file.stat().st_size for file in folder.path.iterdir())
        engine = OrtEngine(
            ModelFiles.in_private_folder(folder.path, MODEL_FILE), served.inputs, served.outputs, served.ranges, report,
            example=program.example, providers=self.providers, threads=self.threads, temporary=folder, graphs=graphs,
            ignored=served.ignored, cache=served.cache, generation=program.generation, tables=tables, owned=owned,
        )  # fmt: skip
        if owned is not None:
            engine.serve_deltas(owned)
            report.bytes += engine.deltas.bytes
            report.notes.append(f"deltas: {engine.deltas!r}"[:1000])
        if self.huge_pages:
            asked = use_huge_pages() / 2**20
            report.notes.append(f"huge pages were asked for in {asked:.0f} MiB of the process's memory")
        return engine

    def _lower(
        self, program: Program, folder: Path, file: str, report: Report, owned: OwnedTables | None
    ) -> tuple[Program, dict[str, str]]:
        """Translate a program and write the model to `folder / file`.

        Returns the deployed form of the program, and the inputs of the model that are tables which the engine owns.
        """
        served = deployed(program)
        tables = tables_as_inputs(served, tuple(owned.tensors) if owned is not None else ())
        write_in_standard_calls(served)
        check_float64(served)
        block_products = read_block_codes(served)
        experts_packed, notes = pack_experts(served) if self.optimise else (0, [])
        report.notes += [*notes, *(mask_experts(served) if self.optimise else ())]
        attention_packed = pack_attention(served) if self.optimise else 0
        fit_attention(served)
        if self.optimise and runs_on_cpu(self.providers):
            prepare_cache_reads(served)
        start = time.perf_counter()
        model = translate(served, split_translations() if self.optimise else None)
        report.seconds["translate"] = time.perf_counter() - start
        start = time.perf_counter()
        if self.optimise:
            own = [("read_block_codes", block_products)] if block_products else []
            report.rewrites = [
                ("pack_attention", attention_packed),
                ("pack_experts", experts_packed),
                *own,
            ] + [(edit.name, edit.count) for edit in optimise(model)]
        report.seconds["optimise"] = time.perf_counter() - start
        if not runs_on_cpu(self.providers):
            apart = without_gpu_kernel(node.op_type for node in model.graph.all_nodes())
            report.notes += [
                f"{', '.join(apart)}: no kernel on a GPU, so they run on the CPU, and what they read and give is copied: quantise with "
                "activations='none' for a GPU"
            ] * bool(apart)
        if served.cache is not None:
            slots, rotates = in_place_slots(model.graph)
            served.cache = served.cache.with_in_place(slots, rotates, ends_input(model.graph))
        write_model(model, folder, file)
        served.inputs = tuple(spec for spec in served.inputs if spec.name not in tables)
        return served, tables


def owned_tables(program: Program) -> OwnedTables | None:
    """Copies of the tables of deltas of a program, for an engine to write into; None without any."""
    form = find_row_tables(program)
    if form is None:
        return None
    return OwnedTables(form, {item.name: program.tensor(item.name).detach().clone() for item in form.tables})


def write_model(model: ir.Model, folder: Path, file: str = MODEL_FILE) -> None:
    """Write a model to `folder / file` and its weights to `file` + ".data" beside it."""
    ir.save(model, str(folder / file), external_data=f"{file}.data")
