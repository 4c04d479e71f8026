"""TensorRTEngine: a compiled model that runs on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch

from bmgraph.errors import BackendError
from bmgraph.ir.cache_spec import CacheLayout
from bmgraph.ir.generation_defaults import GenerationDefaults
from bmgraph.ir.tensor_spec import Range, TensorSpec, graph_output_names
from bmgraph.pass_manager.report import Report
from bmgraph.runtime.generation.generate import GeneratingEngine
from bmgraph.runtime.generation.tokenizer import Tokenizer
from bmgraph.runtime.tensorrt.bundle import save_engine
from bmgraph.runtime.tensorrt.decoder import TensorRTDecoder, run_with_room
from bmgraph.runtime.tensorrt.hardware import Hardware, misfit
from bmgraph.runtime.tensorrt.session import PlanSession
from bmgraph.serialize.opened import OpenedFile
from bmgraph.utils.locked_folder import LockedFolder


class TensorRTEngine(GeneratingEngine):
    """A compiled model for NVIDIA GPUs: call it with the inputs by name, get the outputs by name.

    Inputs are torch tensors (or numpy arrays) with the dtypes and shapes of `inputs`, within `ranges`, the sizes that
    the engine was built for; outputs are torch tensors on the device of the first input. `hardware` is what it was built
    for, `unable` why it cannot run on this machine, `layers` the number of layers of each kind. The plan is loaded onto
    the GPU at the first call. With `room` the KV cache has room for so many positions, to which the engine appends in place; `generate`
    then runs on it. Obtain one from `bmgraph.compile(..., backend="tensorrt")` or `bmgraph.load(...)`.

    A call raises BackendError on hardware that the engine was not built for, InputError for inputs that do not fit.
    """

    def __init__(
        self,
        plan: OpenedFile,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        ranges: Mapping[str, Range],
        report: Report,
        hardware: Hardware,
        layers: Mapping[str, int],
        *,
        example: Mapping[str, torch.Tensor] | None = None,
        ignored: tuple[str, ...] = (),
        cache: CacheLayout | None = None,
        temporary: LockedFolder | None = None,
        room: int = 0,
        tokenizer: Tokenizer | None = None,
        generation: GenerationDefaults | None = None,
    ) -> None:
        super().__init__(
            inputs, outputs, ranges, report, example=example, ignored=ignored, cache=cache,
            temporary=temporary,
        )  # fmt: skip
        self.plan = plan
        self.hardware = hardware
        self.layers = dict(layers)
        self.room = room
        self.tokenizer = tokenizer
        self.generation = generation or GenerationDefaults()
        self._decoder = self._made_decoder() if room else None

    @property
    def folder(self) -> Path:
        """The folder that the plan was in when the engine was made."""
        return self.plan.path.parent

    @property
    def unable(self) -> str:
        """Why the engine cannot run on this machine; empty if it can."""
        return misfit(self.hardware)

    def __call__(self, **batch: object) -> dict[str, torch.Tensor]:
        """Run the engine on the GPU."""
        inputs = self.checked(batch)
        names = graph_output_names(self.inputs, self.outputs)
        dtypes = {name: spec.dtype for name, spec in zip(names, self.outputs)}
        session = self._session
        if self._decoder is None:
            found = session.run(inputs, dtypes)
        else:
            found = run_with_room(session, self._decoder.cache, inputs, dtypes, self.room, "cuda")
        outputs = {spec.name: found[name] for name, spec in zip(names, self.outputs)}
        device = next((value.device for value in inputs.values()), torch.device("cuda"))
        return {name: value.to(device) for name, value in outputs.items()}

    def decoder(self) -> TensorRTDecoder | None:
        """What the decode loop runs on; None if the engine was not built to generate."""
        return self._decoder

    def _made_decoder(self) -> TensorRTDecoder:
        assert self.cache is not None
        spec = self.cache.spec(self)
        longest = self.ranges.get(str(spec.tokens.shape[1]), Range()).high or self.room
        return TensorRTDecoder(spec, lambda: self._session, "cuda", self.room, longest)

    def inspect(self) -> dict[str, object]:
        """What TensorRT's inspector reports on the layers; raises BackendError on other hardware, as a call does."""
        return self._session.layers()

    @cached_property
    def _session(self) -> PlanSession:
        if self.unable:
            raise BackendError(self.unable)
        return PlanSession(self.plan.path, self.plan.read(), self.hardware.library)

    def save(self, path: str | Path) -> None:
        """Write the engine as a bundle for `bmgraph.load`; raises BundleError if it cannot be written."""
        save_engine(self, Path(path))

    def __repr__(self) -> str:
        return f"<TensorRTEngine of {sum(self.layers.values())} layers: {self.signature()}>"
