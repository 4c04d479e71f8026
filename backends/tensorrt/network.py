"""A parsed network: read from ONNX, with errors told by site, and built into a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from bmgraph.backends.onnx.export import PASS, SCOPES, SITE, scope_parts
from bmgraph.backends.tensorrt.optimization_profile import Sizes, value_of
from bmgraph.errors import BackendError, InputError
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.runtime.tensorrt.hardware import Hardware, this_capability, this_system
from bmgraph.runtime.tensorrt.library import import_tensorrt, new_log


class Network:
    """A strongly typed network of TensorRT's; obtain one from `Network.parse`.

    `trt` is the vendor's module, `network` its network, `places` where each ONNX node comes from, by its name.
    """

    def __init__(self, trt: Any, builder: Any, network: Any, log: Any, places: Mapping[str, str]) -> None:
        self.trt = trt
        self.network = network
        self.places = dict(places)
        self._builder = builder  # the network lives as long as its builder
        self._log = log

    @staticmethod
    def parse(model: ir.Model, file: Path) -> Network:
        """Read the ONNX file of a model.

        Raises BackendError naming the operator, the site and the pass of the first node that TensorRT refuses.
        """
        trt = import_tensorrt()
        log = new_log(trt)
        builder = _builder(trt, log)
        flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        network = builder.create_network(1 << int(flag))
        parser = trt.OnnxParser(network, log)
        places = {str(node.name): _place(node) for node in model.graph.all_nodes()}
        if not parser.parse_from_file(str(file)):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            raise BackendError(_refusal(errors, places, log.errors))
        return Network(trt, builder, network, log, places)

    def layers(self) -> dict[str, int]:
        """The number of layers of each kind."""
        kinds = (self.network.get_layer(index).type.name.lower() for index in range(self.network.num_layers))
        return dict(Counter(kinds))

    def build(
        self, inputs: Sequence[TensorSpec], sizes: Mapping[str, Sizes], capabilities: Sequence[str]
    ) -> tuple[bytes, Hardware]:
        """The plan, and the hardware that it is for; raises BackendError, naming a site where the builder does."""
        config = self._builder.create_builder_config()
        config.profiling_verbosity = self.trt.ProfilingVerbosity.DETAILED
        hardware = Hardware(
            self.trt.__name__, str(self.trt.__version__), self._aim(config, capabilities), this_system()
        )
        self._add_profile(config, inputs, sizes)
        plan = self._builder.build_serialized_network(self.network, config)
        if plan is None:
            raise BackendError(f"TensorRT cannot build the engine: {self._explain()}")
        return bytes(plan), hardware

    def _aim(self, config: Any, capabilities: Sequence[str]) -> tuple[str, ...]:
        """Choose the GPUs to build for; the full library knows the one of this machine alone."""
        if not hasattr(self.trt, "ComputeCapability"):
            return _only_here(capabilities)
        known = _capabilities(self.trt)
        unknown = [name for name in capabilities if name not in known]
        if unknown:
            raise InputError(
                f"capabilities name {unknown[0]!r}: {self.trt.__name__} builds for {', '.join(known)}"
            )
        chosen = tuple(capabilities) or tuple(known)
        config.num_compute_capabilities = len(chosen)
        for index, name in enumerate(chosen):
            config.set_compute_capability(known[name], index)
        return chosen

    def _add_profile(self, config: Any, inputs: Sequence[TensorSpec], sizes: Mapping[str, Sizes]) -> None:
        profile = self._builder.create_optimization_profile()
        for spec in inputs:
            shapes = [
                tuple(
                    value_of(dim, {name: getattr(size, end) for name, size in sizes.items()})
                    for dim in spec.shape
                )
                for end in ("least", "usual", "largest")
            ]
            profile.set_shape(spec.name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise BackendError(f"TensorRT does not take these sizes: {self._explain()}")

    def _explain(self) -> str:
        """The first error of the builder, and where the node that it names comes from."""
        text = str(self._log.errors[0]) if self._log.errors else "it gave no reason"
        named = [
            name
            for error in self._log.errors
            for name in self.places
            if f"{name}]" in error or f"'{name}'" in error
        ]
        return f"{text[:400]}" + (f" ({named[0]} is {self.places[named[0]]})" if named else "")


def _builder(trt: Any, log: Any) -> Any:
    try:
        return trt.Builder(log)
    except Exception as error:  # the binding's exceptions have no public base
        raise BackendError(
            f"{trt.__name__} cannot build here: {error}; without a GPU build with tensorrt-rtx"
        ) from error


def _only_here(capabilities: Sequence[str]) -> tuple[str, ...]:
    here = this_capability()
    if capabilities and tuple(capabilities) != (here,):
        raise InputError(
            f"capabilities={tuple(capabilities)}: the full TensorRT builds for this machine's GPU ({here}) alone"
        )
    return (here,)


def _capabilities(trt: Any) -> dict[str, Any]:
    """The compute capabilities that the library builds for; Turing's (7.5) has no kernels for f32 products."""
    members = trt.ComputeCapability.__members__
    codes = {name[2:]: value for name, value in members.items() if name.startswith("SM") and name != "SM75"}
    return {f"{code[:-1]}.{code[-1]}": value for code, value in codes.items()}


def _place(node: ir.Node) -> str:
    """Where an ONNX node comes from: operator, site, pass and module path."""
    origin = node.metadata_props
    site = origin.get(SITE) or "no site"
    scopes = [part for part in scope_parts(origin.get(SCOPES, "")) if part]
    scope = f" in {scopes[-2]}" if len(scopes) > 1 and not site.startswith(scopes[-2]) else ""
    return f"{node.op_type} of {site}{scope}, made by {origin.get(PASS) or 'the exporter'}"


def _refusal(errors: Sequence[Any], places: Mapping[str, str], logged: Sequence[str]) -> str:
    for error in errors:
        place = places.get(error.node_name())
        if place:
            kind = error.code().name.lower().replace("_", " ")
            reason = " ".join(str(error.desc()).split())[:300]
            return (
                f"TensorRT does not take {place} ({kind}: {reason}); leave that out, or use another backend"
            )
    reasons = [" ".join(str(error.desc()).split()) for error in errors] + list(logged)
    return f"TensorRT does not take the program: {reasons[0][:400] if reasons else 'it gave no reason'}"
