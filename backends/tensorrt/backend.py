"""The TensorRT backend: a program becomes a plan for NVIDIA GPUs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

from bmgraph.backends.onnx.backend import write_model
from bmgraph.backends.tensorrt.legalize import check_forms, lower
from bmgraph.backends.tensorrt.network import Network
from bmgraph.backends.tensorrt.optimization_profile import Sizes, choose_sizes
from bmgraph.errors import BackendError
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import Range
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.pass_manager.report import Report
from bmgraph.pass_manager.target import Target
from bmgraph.runtime.ort.bundle import MODEL_FILE
from bmgraph.runtime.ort.engine import temporary_folder
from bmgraph.runtime.tensorrt.bundle import PLAN_FILE
from bmgraph.runtime.tensorrt.engine import TensorRTEngine
from bmgraph.utils.digest import digest


@dataclass(frozen=True)
class TensorRT:
    """How to build for TensorRT.

    sizes: (name, least, usual, largest) for dynamic sizes of the inputs, such as ("batch", 1, 8, 32); by default from
    the least that the program takes to 8 times the example's. The engine takes no others, and is fastest at the usual
    ones. capabilities: the compute capabilities of the GPUs to build for ("8.9"), by default all that the library
    builds for; the full TensorRT builds for the GPU of the machine alone.

    The network is strongly typed: it computes in the types of the program. Activations are rounded to s8 around zero
    with static scales, weights to s8 with one scale for each output. Building needs no GPU with `tensorrt-rtx`.

    Example:
        >>> from bmgraph.backends import TensorRT
        >>> TensorRT(sizes=(("batch", 1, 8, 32),)).target.symmetric
        True
    """

    name: ClassVar[str] = "tensorrt"
    stages: ClassVar[tuple[str, ...]] = ("model",)
    target: ClassVar[Target] = Target("tensorrt", ("static", "none"), symmetric=True, expert_blocks=())

    sizes: tuple[tuple[str, int, int, int], ...] = ()
    capabilities: tuple[str, ...] = ()

    def build(self, program: Program, report: Report) -> TensorRTEngine:
        """An engine of the program; raises BackendError, naming the site, for a form that TensorRT does not take."""
        if program.device.type == "meta":
            raise BackendError(
                "a program on the meta device has no weights to make an engine of: load them first"
            )
        served = deployed(program)
        sizes = choose_sizes(served, self.sizes)
        check_forms(served)
        begin = time.perf_counter()
        model = lower(served)
        report.seconds["translate"] = time.perf_counter() - begin
        begin = time.perf_counter()
        with TemporaryDirectory(prefix="bmgraph-") as onnx:
            write_model(model, Path(onnx))
            network = Network.parse(model, Path(onnx) / MODEL_FILE)
            plan, hardware = network.build(served.inputs, sizes, self.capabilities)
        folder = temporary_folder()
        (folder / PLAN_FILE).write_bytes(plan)
        report.seconds["build"] = time.perf_counter() - begin
        report.backend, report.weights, report.bytes = self.name, digest(program), len(plan)
        report.notes += [_sizes_text(sizes), f"built by {hardware}", _layers_text(network.layers())]
        if program.encoder is not None:
            report.notes.append("its encoder is a program of its own: compile that too (program.encoder)")
        ranges = {**served.ranges, **{name: Range(size.least, size.largest) for name, size in sizes.items()}}
        return TensorRTEngine(
            folder, served.inputs, served.outputs, ranges, report, hardware, network.layers(),
            example=served.example, temporary=True,
        )  # fmt: skip


def _sizes_text(sizes: dict[str, Sizes]) -> str:
    each = [f"{name} {size.least} to {size.largest} (usually {size.usual})" for name, size in sizes.items()]
    return f"takes {', '.join(each)}; TensorRT(sizes=...) sets others" if each else "all sizes are fixed"


def _layers_text(layers: dict[str, int]) -> str:
    return f"network of {sum(layers.values())} layers: " + ", ".join(
        f"{count} {kind}" for kind, count in sorted(layers.items(), key=lambda item: -item[1])
    )
