"""TensorRTEngine: a compiled model that runs on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch

from bmgraph.errors import BackendError
from bmgraph.ir.cache_spec import CacheLayout
from bmgraph.ir.generation_defaults import GenerationDefaults
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import Range, TensorSpec, graph_output_names
from bmgraph.pass_manager.report import Report
from bmgraph.runtime.engine_check import check_engine
from bmgraph.runtime.generation.generate import GeneratingEngine
from bmgraph.runtime.generation.tokenizer import Tokenizer
from bmgraph.runtime.temporary import delete_with, folder_for_engine
from bmgraph.runtime.tensorrt.bundle import PLAN_FILE, save_engine
from bmgraph.runtime.tensorrt.cache_file import KERNELS, CacheFile, cache_folder
from bmgraph.runtime.tensorrt.decoder import TensorRTDecoder, run_with_room
from bmgraph.runtime.tensorrt.hardware import Hardware, misfit, this_capability
from bmgraph.runtime.tensorrt.kernel_cache import KernelCache
from bmgraph.runtime.tensorrt.library import compiles_at_calls, import_tensorrt
from bmgraph.runtime.tensorrt.refit import RefitForm, changed_weights, check_refit_form
from bmgraph.runtime.tensorrt.session import PlanSession
from bmgraph.serialize.opened import OpenedFile, open_regular_file
from bmgraph.utils.digest import digest
from bmgraph.utils.locked_folder import LockedFolder


class TensorRTEngine(GeneratingEngine):
    """A compiled model for NVIDIA GPUs: call it with the inputs by name, get the outputs by name.

    Inputs are torch tensors (or numpy arrays) with the dtypes and shapes of `inputs`, within `ranges`, the sizes that
    the engine was built for; outputs are torch tensors on the device of the first input. `hardware` is what it was built
    for, `unable` why it cannot run on this machine, `layers` the number of layers of each kind. The plan is loaded onto
    the GPU at the first call. With `room` the KV cache has room for so many positions, to which the engine appends in place; `generate`
    then runs on it. `refits` says which weights `refit` exchanges, None where they are fixed; `kernels` is the folder in which TensorRT for RTX
    keeps what it compiles at calls. Obtain one from `bmgraph.compile(..., backend="tensorrt")` or `bmgraph.load(...)`.

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
        refits: RefitForm | None = None,
        kernels: str | Path | None = None,
    ) -> None:
        super().__init__(
            inputs, outputs, ranges, report, example=example, ignored=ignored, cache=cache,
            temporary=temporary,
        )  # fmt: skip
        self.plan = plan
        self.hardware = hardware
        self.layers = dict(layers)
        self.room = room
        self.refits = refits
        self.kernels = None if kernels is None else cache_folder(kernels)
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
        kernels = self._kernel_cache()
        session = PlanSession(self.plan.path, self.plan.read(), self.hardware.library, kernels)
        if kernels is not None and kernels.file.note:
            self.report.notes.append(kernels.file.note)
        return session

    def _kernel_cache(self) -> KernelCache | None:
        if self.kernels is None or not compiles_at_calls(import_tensorrt((self.hardware.library,))):
            return None
        sizes = sorted((name, size.low, size.high) for name, size in self.ranges.items())
        owner = f"{self.hardware} on {this_capability()}, weights {self.report.weights}, {sizes}"
        return KernelCache(CacheFile(self.kernels, KERNELS, owner))

    def refit(self, program: Program) -> None:
        """Exchange the weights for those of a program that computes the same, such as the model after a delta was trained and merged: nothing
        is built again. What TensorRT calls refit; `save` writes the new weights.

        program: of the same model, captured on the same example, after the same passes; behind `KVCache()` where the engine generates.

        Raises BackendError for an engine that was not built with `TensorRT(refit=True)`, on other hardware, and where TensorRT refuses;
        InputError for a program that computes something else, or whose changed weights the plan holds in another form; VerificationError if
        the engine then does not compute what the program does. The engine then is what it was.

        Example:
            engine = bg.compile(program, backend=TensorRT(refit=True))
            engine.refit(bg.Pipeline([Merge()]).run(trained))
        """
        form = check_refit_form(self.refits)
        values, after = form.exchanged(program)
        if self.unable:
            raise BackendError(self.unable)
        changed = changed_weights(form, after)
        if not changed:
            return
        try:
            plan = self._session.refit(values, changed)
            if program.example:
                check_engine(self, program, program.example, "tensorrt")
        except BaseException:
            self.__dict__.pop("_session", None)  # the plan that was is loaded again
            raise
        with folder_for_engine() as folder:
            (folder.path / PLAN_FILE).write_bytes(plan)
            self.plan = open_regular_file(folder.path / PLAN_FILE)
        delete_with(self, folder)
        self.refits, self.report.weights, self.report.bytes = after, digest(program), len(plan)
        self.report.notes.append(f"{len(changed)} weights were exchanged")

    def save(self, path: str | Path) -> None:
        """Write the engine as a bundle for `bmgraph.load`; raises BundleError if it cannot be written."""
        save_engine(self, Path(path))

    def __repr__(self) -> str:
        return f"<TensorRTEngine of {sum(self.layers.values())} layers: {self.signature()}>"
