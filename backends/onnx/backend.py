"""The ONNX backend: a program becomes an engine on ONNX Runtime."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from bmgraph.backends.onnx.export import translate
from bmgraph.backends.onnx.export_experts_split import apart_translations
from bmgraph.backends.onnx.pack_attention import pack_attention, widen_masks
from bmgraph.backends.onnx.pack_experts import pack_experts
from bmgraph.backends.onnx.rewrite_pipeline import optimise
from bmgraph.errors import BackendError
from bmgraph.ir.program import Program
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.pass_manager.report import Report
from bmgraph.pass_manager.target import Target
from bmgraph.passes.kvcache.kvcache import KVCache
from bmgraph.runtime.ort.bundle import ENCODER_FILE, MODEL_FILE
from bmgraph.runtime.ort.engine import Engine, temporary_folder
from bmgraph.utils.digest import digest


@dataclass(frozen=True)
class Onnx:
    """How to lower to ONNX Runtime.

    providers: ONNX Runtime's execution providers, by default CUDA where it works, else the CPU. threads: within an
    operator, by default one for each physical core. optimise: rewrite to the fastest known operators (off: the plain
    export). generate: give a decoder a cache, so that the engine has `generate`.
    """

    name: ClassVar[str] = "onnx"
    stages: ClassVar[tuple[str, ...]] = ("model", "engine")
    target: ClassVar[Target] = Target("onnx")

    providers: tuple[str, ...] | None = None
    threads: int | None = None
    optimise: bool = True
    generate: bool = False

    @property
    def appended(self) -> tuple[Pass, ...]:
        """The passes of the model stage that this backend needs last."""
        return (KVCache(),) if self.generate else ()

    def build(self, program: Program, report: Report) -> Engine:
        """An engine of the program; raises BackendError where an operator has no ONNX form."""
        if program.device.type == "meta":
            raise BackendError(
                "a program on the meta device has no weights to make an engine of: load them first"
            )
        folder = temporary_folder()
        encoder = None
        if program.encoder is not None:
            first = Report(records=report.records, backend="onnx")
            part = self._lower(program.encoder, folder, ENCODER_FILE, first)
            encoder = Engine(
                folder, part.inputs, part.outputs, part.ranges, first, example=part.example,
                providers=self.providers, threads=self.threads, file=ENCODER_FILE,
            )  # fmt: skip
        served = self._lower(program, folder, MODEL_FILE, report)
        report.backend, report.weights = "onnx", digest(program)
        report.bytes = sum(file.stat().st_size for file in folder.iterdir())
        return Engine(
            folder, served.inputs, served.outputs, served.ranges, report, example=program.example,
            providers=self.providers, threads=self.threads, temporary=True, encoder=encoder,
        )  # fmt: skip

    def _lower(self, program: Program, folder: Path, file: str, report: Report) -> Program:
        """Write a program as a model to a file; returns it as it is served."""
        served = deployed(program)
        mixed = pack_experts(served) if self.optimise else 0
        packed = pack_attention(served) if self.optimise else 0
        widen_masks(served)
        begin = time.perf_counter()
        model = translate(served, apart_translations() if self.optimise else None)
        report.seconds["translate"] = time.perf_counter() - begin
        begin = time.perf_counter()
        if self.optimise:
            report.rewrites = [("pack_attention", packed), ("pack_experts", mixed)] + [
                (edit.name, edit.count) for edit in optimise(model)
            ]
        report.seconds["optimise"] = time.perf_counter() - begin
        write_model(model, folder, file)
        return served


def write_model(model: ir.Model, folder: Path, file: str = MODEL_FILE) -> None:
    """The model, with its weights in a file beside it."""
    ir.save(model, str(folder / file), external_data=f"{file}.data")
