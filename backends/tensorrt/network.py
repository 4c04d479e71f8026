"""TensorRT's parser and builder: ONNX file to plan, with each error traced to a site and pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from bmgraph.backends.onnx.origins import origin_of
from bmgraph.backends.tensorrt.optimization_profile import SizeProfile, evaluate_dim
from bmgraph.errors import BackendError, InputError
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.runtime.tensorrt.cache_file import TIMING, CacheFile
from bmgraph.runtime.tensorrt.hardware import Hardware, this_capability, this_system
from bmgraph.runtime.tensorrt.library import compiles_at_calls, import_tensorrt, new_log

FIRST_WITH_FP8 = (8, 9)
"""The first compute capability whose GPUs multiply fp8."""

NO_FP8 = "GPUs of capability {} do not multiply fp8, in which this program has weights: take one of 8.9 or later, or int8"


class Network:
    """A strongly typed TensorRT network; made by `Network.parse`.

    `trt` is the TensorRT module, `network` its network object, `origins` maps ONNX node names to a text that names the
    node's operator, site and pass.
    """

    def __init__(self, trt: Any, builder: Any, network: Any, log: Any, origins: Mapping[str, str]) -> None:
        self.trt = trt
        self.network = network
        self.origins = dict(origins)
        self.notes: list[str] = []
        """What the report is to say of the build."""
        self._builder = builder  # keeps the network alive
        self._log = log

    @staticmethod
    def parse(model: ir.Model, file: Path) -> Network:
        """Parse the ONNX `file` that holds `model`.

        Raises BackendError naming the operator, site and pass of the first node that TensorRT rejects.
        """
        trt = import_tensorrt()
        log = new_log(trt)
        builder = _builder(trt, log)
        flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        network = builder.create_network(1 << int(flag))
        parser = trt.OnnxParser(network, log)
        origins = {str(node.name): origin_of(node) for node in model.graph.all_nodes()}
        if not parser.parse_from_file(str(file)):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            raise BackendError(_parse_error(errors, origins, log.errors))
        return Network(trt, builder, network, log, origins)

    def layers(self) -> dict[str, int]:
        """The number of layers of each type."""
        kinds = (self.network.get_layer(index).type.name.lower() for index in range(self.network.num_layers))
        return dict(Counter(kinds))

    def has_float_codes(self) -> bool:
        """Whether a layer gives codes of fp8."""
        return any(
            layer.get_output(place).dtype == self.trt.DataType.FP8
            for layer in map(self.network.get_layer, range(self.network.num_layers))
            for place in range(layer.num_outputs)
        )

    def build(
        self,
        inputs: Sequence[TensorSpec],
        sizes: Mapping[str, SizeProfile],
        capabilities: Sequence[str],
        refit: bool = False,
        cache: Path | None = None,
    ) -> tuple[bytes, Hardware]:
        """Build the plan; returns it with the hardware that it runs on. `refit`: its weights can be exchanged; `cache`: a folder that keeps
        the times of kernels, where the library measures some.

        Raises BackendError if the build fails (naming the site if the builder names a node), InputError for capabilities
        that the library cannot build for.
        """
        config = self._builder.create_builder_config()
        config.profiling_verbosity = self.trt.ProfilingVerbosity.DETAILED
        hardware = Hardware(
            self.trt.__name__,
            str(self.trt.__version__),
            self._set_capabilities(config, capabilities),
            this_system(),
        )
        self._add_profile(config, inputs, sizes)
        if refit:
            config.set_flag(self.trt.BuilderFlag.REFIT)
        times = (
            None if cache is None or compiles_at_calls(self.trt) else CacheFile(cache, TIMING, str(hardware))
        )
        if times is not None:
            use_times(config, times)
        plan = self._builder.build_serialized_network(self.network, config)
        if plan is None:
            raise BackendError(f"TensorRT cannot build the engine: {self._first_error()}")
        if times is not None:
            times.write(bytes(config.get_timing_cache().serialize()))
            self.notes += [times.note] if times.note else []
        return bytes(plan), hardware

    def _set_capabilities(self, config: Any, capabilities: Sequence[str]) -> tuple[str, ...]:
        """Set the compute capabilities to build for; the full TensorRT builds only for this machine's GPU."""
        floats = self.has_float_codes()
        if not hasattr(self.trt, "ComputeCapability"):
            found = _local_capability(capabilities)
            if floats and not _has_fp8(found[0]):
                raise InputError(NO_FP8.format(found[0]))
            return found
        known = _capabilities(self.trt)
        old = [name for name in capabilities if name in known and floats and not _has_fp8(name)]
        if old:
            raise InputError(NO_FP8.format(old[0]))
        if floats and not capabilities:
            known = {name: value for name, value in known.items() if _has_fp8(name)}
        unknown = [name for name in capabilities if name not in known]
        if unknown:
            raise InputError(
                f"capability {unknown[0]!r} is not supported: {self.trt.__name__} builds for {', '.join(known)}"
            )
        chosen = tuple(capabilities) or tuple(known)
        config.num_compute_capabilities = len(chosen)
        for index, name in enumerate(chosen):
            config.set_compute_capability(known[name], index)
        return chosen

    def _add_profile(
        self, config: Any, inputs: Sequence[TensorSpec], sizes: Mapping[str, SizeProfile]
    ) -> None:
        profile = self._builder.create_optimization_profile()
        for spec in inputs:
            shapes = [
                tuple(
                    getattr(sizes[dim], bound)
                    if isinstance(dim, str) and dim in sizes
                    else evaluate_dim(dim, {name: getattr(size, bound) for name, size in sizes.items()})
                    for dim in spec.shape
                )
                for bound in ("min", "opt", "max")
            ]
            profile.set_shape(spec.name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise BackendError(f"TensorRT rejects these sizes: {self._first_error()}")

    def _first_error(self) -> str:
        """The builder's first error, with the origin of a node that the log names."""
        text = str(self._log.errors[0]) if self._log.errors else "no reason given"
        nodes = [
            name
            for error in self._log.errors
            for name in self.origins
            if f"{name}]" in error or f"'{name}'" in error
        ]
        return f"{text[:400]}" + (f" ({nodes[0]} is {self.origins[nodes[0]]})" if nodes else "")


def use_times(config: Any, times: CacheFile) -> None:
    """Let a builder's configuration begin with the times of kernels in a file, if TensorRT takes them."""
    held = times.read()
    cache = config.create_timing_cache(held)
    if cache is not None and config.set_timing_cache(cache, False):
        return
    times.ignore("TensorRT refuses it; another GPU or version may have made it")
    config.set_timing_cache(config.create_timing_cache(b""), False)


def _builder(trt: Any, log: Any) -> Any:
    try:
        return trt.Builder(log)
    except Exception as error:  # the bindings raise exceptions without a public base class
        raise BackendError(
            f"{trt.__name__} cannot build here: {error}; without a GPU use tensorrt-rtx"
        ) from error


def _local_capability(capabilities: Sequence[str]) -> tuple[str, ...]:
    """This machine's capability; raises InputError if others are requested."""
    here = this_capability()
    if capabilities and tuple(capabilities) != (here,):
        raise InputError(
            f"capabilities={tuple(capabilities)}: the full TensorRT builds for this machine's GPU ({here}) only"
        )
    return (here,)


def _capabilities(trt: Any) -> dict[str, Any]:
    """Supported compute capabilities, such as `8.9` -> the library's constant (no 7.5: it has no kernels for f32 products)."""
    members = trt.ComputeCapability.__members__
    codes = {name[2:]: value for name, value in members.items() if name.startswith("SM") and name != "SM75"}
    return {f"{code[:-1]}.{code[-1]}": value for code, value in codes.items()}


def _has_fp8(capability: str) -> bool:
    """Whether GPUs of a compute capability, such as "8.9", multiply fp8."""
    return tuple(map(int, capability.split("."))) >= FIRST_WITH_FP8


def _parse_error(errors: Sequence[Any], origins: Mapping[str, str], logged: Sequence[str]) -> str:
    """One line on the first error whose node has a known origin, else on the first error."""
    for error in errors:
        origin = origins.get(error.node_name())
        if origin:
            kind = error.code().name.lower().replace("_", " ")
            reason = " ".join(str(error.desc()).split())[:300]
            return f"TensorRT does not support {origin} ({kind}: {reason}): replace it in the model, or use another backend"
    reasons = [" ".join(str(error.desc()).split()) for error in errors] + list(logged)
    return f"TensorRT cannot parse the program: {reasons[0][:400] if reasons else 'no reason given'}"
