"""The configuration `TensorRT`, and the build of a program's engine from it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Self

import onnx_ir as ir

from bmgraph.backends.backend_base import Backend
from bmgraph.backends.onnx.backend import write_model
from bmgraph.backends.onnx.origins import name_nodes
from bmgraph.backends.tensorrt.cache_in_place import append_in_place
from bmgraph.backends.tensorrt.legalize import check_quantization, lower
from bmgraph.backends.tensorrt.network import Network
from bmgraph.backends.tensorrt.optimization_profile import SizeProfile, choose_profile, decoding_profile
from bmgraph.errors import BackendError, InputError
from bmgraph.ir.graph_order import graphs_beside
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import Range, TensorSpec
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.pass_manager.pass_manager import PassManager
from bmgraph.pass_manager.report import Report
from bmgraph.pass_manager.target import Target
from bmgraph.passes.kvcache.kvcache import KVCache
from bmgraph.runtime.ort.bundle import MODEL_FILE
from bmgraph.runtime.temporary import folder_for_engine
from bmgraph.runtime.tensorrt.bundle import PLAN_FILE
from bmgraph.runtime.tensorrt.cache_file import cache_folder
from bmgraph.runtime.tensorrt.engine import TensorRTEngine
from bmgraph.runtime.tensorrt.hardware import this_capability
from bmgraph.runtime.tensorrt.refit import RefitForm
from bmgraph.serialize.opened import open_regular_file
from bmgraph.utils.digest import digest


@dataclass(frozen=True)
class TensorRT(Backend[TensorRTEngine]):
    """Build a TensorRT engine for NVIDIA GPUs.

    sizes: (name, min, opt, max) of dynamic input sizes, such as ("batch", 1, 8, 32). Other sizes get the program's
    minimum, the example's size and 8 times that. The engine rejects sizes outside min to max and is fastest at opt.
    capabilities: compute capabilities of the target GPUs, such as ("8.9",); by default all that the library supports. The
    full TensorRT supports only the GPU of this machine; `tensorrt-rtx` builds without a GPU. generate: give a decoder a KV cache that it
    appends to in place, so that the engine has `generate`: it is tuned for one new position, reads up to the maximum of the sizes at once,
    and has room for all positions that these allow. refit: `engine.refit(program)` exchanges the weights; such an engine is built on a machine
    with the GPU, for that GPU alone. cache: a folder of your own, in which TensorRT keeps the times of the kernels that it tried, and
    TensorRT for RTX, which tries none, the kernels that it compiles at calls: native code, which the next process reads. A file there that is
    not whole or was made by another version or GPU is not used, which the report says.

    The network is strongly typed: it computes in the dtypes of the program. Quantised activations are s8 with zero point 0
    and a static scale, quantised weights are s8 with one scale per output channel, or 4-bit codes in whole groups of inputs; or both are
    fp8 (e4m3), for capabilities of 8.9 and later.

    Example:
        >>> from bmgraph.backends import TensorRT
        >>> TensorRT(sizes=(("batch", 1, 8, 32),)).target.symmetric
        True
    """

    name: ClassVar[str] = "tensorrt"
    why_float: ClassVar[str] = "its engines keep a cache in what they compute in"
    target: ClassVar[Target] = Target(
        "tensorrt", ("static", "none"), symmetric=True, weight_scales=("channel", "block"), block_bits=(4,), positive_scales=True,
        zero_points=False, expert_blocks=(), float_codes=True,
    )  # fmt: skip

    sizes: tuple[tuple[str, int, int, int], ...] = ()
    capabilities: tuple[str, ...] = ()
    generate: bool = False
    refit: bool = False
    cache: str | None = None

    @property
    def appended(self) -> tuple[ModelPass, ...]:
        """Passes of the model stage that run after the user's."""
        return (KVCache(),) if self.generate else ()

    def generating(self) -> Self:
        """The same configuration, for engines that generate."""
        return replace(self, generate=True)

    def build(self, program: Program, report: Report, manager: PassManager | None = None) -> TensorRTEngine:
        """Build an engine.

        Raises BackendError for a program on the meta device, for quantisation or an operator that TensorRT does not support
        (naming the site), and where the builder fails; InputError for sizes or capabilities that are not valid.
        """
        if program.device.type == "meta":
            raise BackendError(
                "a program on the meta device has no weights to build an engine from: load them first"
            )
        if self.generate:
            _check_one_graph(program)
        capabilities = refit_capabilities(self.capabilities) if self.refit else self.capabilities
        cache = None if self.cache is None else cache_folder(self.cache)
        served = deployed(program)
        before = served.clone() if self.refit else None
        sizes, room = choose_profile(served, self.sizes), 0
        if self.generate and served.cache is not None:
            sizes, room = decoding_profile(served, served.cache, sizes, self.sizes)
        check_quantization(served)
        start = time.perf_counter()
        model = lower(served)
        if served.cache is not None and room:
            served.cache = append_in_place(model, served.cache, room)
            name_nodes(model)
        refits = None if before is None else RefitForm.of(before, constants(model))
        report.seconds["translate"] = time.perf_counter() - start
        start = time.perf_counter()
        with folder_for_engine() as folder:
            with TemporaryDirectory(dir=folder.path) as onnx_folder:
                write_model(model, Path(onnx_folder))
                network = Network.parse(model, Path(onnx_folder) / MODEL_FILE)
                plan, hardware = network.build(
                    _with_room(served, room), sizes, capabilities, self.refit, cache
                )
            (folder.path / PLAN_FILE).write_bytes(plan)
            report.seconds["build"] = time.perf_counter() - start
            report.backend, report.weights, report.bytes = self.name, digest(program), len(plan)
            report.notes += [
                _sizes_text(sizes),
                f"built by {hardware}",
                _layers_text(network.layers()),
                *network.notes,
            ]
            if room:
                report.notes.append(
                    f"the KV cache has room for {room} positions, and is appended to in place"
                )
            report.notes += [
                f"this engine is that of the graph {program.entry!r} alone: compile program.at({name!r}) as well"
                for name in program.graphs
                if name != program.entry
            ]
            ranges = {
                **served.ranges,
                **{name: Range(size.min, size.max) for name, size in sizes.items()},
            }
            return TensorRTEngine(
                open_regular_file(folder.path / PLAN_FILE), served.inputs, served.outputs, ranges, report, hardware,
                network.layers(), example=served.example, temporary=folder, ignored=served.ignored,
                cache=served.cache, room=room, generation=program.generation, kernels=cache,
                refits=refits,
            )  # fmt: skip


def refit_capabilities(asked: Sequence[str]) -> tuple[str, ...]:
    """The compute capability to build for where weights can be exchanged: that of this machine's GPU.

    Raises BackendError without a GPU, InputError for another capability.
    """
    here = this_capability()
    if not here:
        raise BackendError(
            "TensorRT(refit=True) compiles the kernels of weights that can be exchanged on the GPU while it builds, and this machine has no "
            "CUDA GPU: compile there, or without refit=True, and anew for new weights"
        )
    if asked and tuple(asked) != (here,):
        raise InputError(
            f"capabilities={tuple(asked)}: an engine whose weights can be exchanged is built for this machine's GPU ({here}) only"
        )
    return (here,)


def constants(model: ir.Model) -> dict[str, str]:
    """A sha256 of the bytes of each of a model's constants, by name."""
    return {
        name: hashlib.sha256(value.const_value.tobytes()).hexdigest()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def _check_one_graph(program: Program) -> None:
    """Raise BackendError for a decoder whose memories come from another graph, such as an encoder: a plan holds one graph."""
    others = graphs_beside(program)
    if others:
        raise BackendError(
            f"TensorRT(generate=True) has no engine for a decoder beside the graph {others[0].entry!r}, which gives its memories: take "
            "the backend onnx"
        )


def _with_room(program: Program, room: int) -> tuple[TensorSpec, ...]:
    """The inputs as the model has them: parts of a cache that is appended to in place have room for `room` positions."""
    axes = (
        {slot.past: slot.axis for slot in program.cache.slots} if room and program.cache is not None else {}
    )
    return tuple(
        replace(
            spec,
            shape=tuple(room if axes.get(spec.name) == axis else dim for axis, dim in enumerate(spec.shape)),
        )
        for spec in program.inputs
    )


def _sizes_text(sizes: dict[str, SizeProfile]) -> str:
    ranges = [f"{name} {size.min} to {size.max} (opt {size.opt})" for name, size in sizes.items()]
    return (
        f"accepts {', '.join(ranges)}; change with TensorRT(sizes=...)" if ranges else "all sizes are fixed"
    )


def _layers_text(layers: dict[str, int]) -> str:
    return f"network of {sum(layers.values())} layers: " + ", ".join(
        f"{count} {kind}" for kind, count in sorted(layers.items(), key=lambda item: -item[1])
    )
