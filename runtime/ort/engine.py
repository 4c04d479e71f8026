"""OrtEngine: a compiled model that runs on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bmgraph.errors import BackendError
from bmgraph.ir.cache_spec import CacheLayout
from bmgraph.ir.generation_defaults import GenerationDefaults
from bmgraph.ir.tensor_spec import Range, TensorSpec, graph_output_names
from bmgraph.pass_manager.report import Report
from bmgraph.runtime.arrays import feeds_of, shapes_text
from bmgraph.runtime.generation.generate import GeneratingEngine
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.generation.tokenizer import Tokenizer
from bmgraph.runtime.live_deltas import LiveDeltas
from bmgraph.runtime.ort.bundle import save_engine
from bmgraph.runtime.ort.decoder import OrtDecoder
from bmgraph.runtime.ort.model_files import ModelFiles
from bmgraph.runtime.ort.output_buffers import Buffers
from bmgraph.runtime.ort.placed_run import run_placed
from bmgraph.runtime.ort.providers import CPU, SHORT, device_of
from bmgraph.runtime.ort.rows_together import cached_positions, rows_together, run_in_parts
from bmgraph.runtime.ort.session import ModelInMemory
from bmgraph.runtime.ort.table_inputs import TableInputs
from bmgraph.runtime.ort.wide_form import wide_form
from bmgraph.runtime.owned_tables import OwnedTables
from bmgraph.utils.locked_folder import LockedFolder

SMALL = 2**17
"""Below this many output elements binding reused memory (up to 20 us) costs more than letting ONNX Runtime allocate."""


class OrtEngine(GeneratingEngine):
    """A compiled model: call it with the inputs by name, get the outputs by name.

    Inputs are torch tensors (or numpy arrays) with the dtypes and shapes of `inputs`; outputs are torch tensors.
    Obtain one from `bmgraph.compile(...)` or `bmgraph.load(...)`.

    Example:
        >>> import torch, bmgraph as bg
        >>> engine = bg.compile(torch.nn.Linear(4, 2), example=(torch.randn(3, 4),), backend="onnx")
        >>> engine(input=torch.randn(5, 4))["output"].shape
        torch.Size([5, 2])
    """

    graphs: dict[str, OrtEngine]  # type: ignore[assignment]  # a narrower type of what only __init__ sets

    def __init__(
        self,
        files: ModelFiles,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        ranges: Mapping[str, Range],
        report: Report,
        *,
        example: Mapping[str, torch.Tensor] | None = None,
        ignored: tuple[str, ...] = (),
        cache: CacheLayout | None = None,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        temporary: LockedFolder | None = None,
        tokenizer: Tokenizer | None = None,
        graphs: Mapping[str, OrtEngine] | None = None,
        generation: GenerationDefaults | None = None,
        model: ModelInMemory | None = None,
        tables: Mapping[str, str] | None = None,
        owned: OwnedTables | None = None,
    ) -> None:
        super().__init__(
            inputs, outputs, ranges, report, example=example, ignored=ignored, cache=cache,
            graphs=graphs, temporary=temporary,
        )  # fmt: skip
        self.files = files
        self.threads = threads
        self._names = [spec.name for spec in outputs]
        self._graph_names = graph_output_names(inputs, outputs)
        self._dtypes = [_numpy_dtype(spec.dtype) for spec in outputs]
        self._buffers = Buffers()
        if cache is not None and any(slot.in_place for slot in cache.slots):
            providers = _of_cache_in_place(providers)
        self.session = files.session(providers, threads, read=model)
        self._on_cpu = self.providers == [CPU]
        self.device = device_of(self.providers)
        self.tokenizer = tokenizer
        self.generation = generation or GenerationDefaults()
        choice = owned.choice if owned is not None else ""
        ends = cache.ends if cache is not None else None
        self.tables = TableInputs(
            tables or {}, owned.tensors if owned is not None else {}, self.device, choice, ends
        )
        spec = cache.spec(self) if cache is not None else None
        self._decoder = (
            OrtDecoder(
                self.session,
                spec,
                self.device,
                self.feeders(),
                self.tables,
                partial(wide_form, files, threads),
            )
            if spec is not None
            else None
        )

    def serve_deltas(self, owned: OwnedTables) -> None:
        """Let the deltas in tables be exchanged, for this engine and those of its other graphs."""
        engines = (self, *self.graphs.values())

        def written() -> None:
            for engine in engines:
                engine.tables.written()

        self.live = LiveDeltas(owned.form, owned.tensors, engines, written)

    @property
    def folder(self) -> Path:
        """The folder that the model was in when the engine was made."""
        return self.files.folder

    @property
    def providers(self) -> list[str]:
        """The execution providers of ONNX Runtime that the engine runs on."""
        return list(self.session.get_providers())

    def __call__(self, **batch: object) -> dict[str, torch.Tensor]:
        """Run the engine; raises InputError for a wrong name, dtype or shape before anything runs.

        Where the engine runs on a GPU and an input lies there, outputs do too, and nothing goes through the host's memory.
        """
        with self.holding_deltas(batch) as given:
            if self.device != "cpu" and any(_lies_on(self.device, value) for value in given.values()):
                found = self.run_placed(given, torch.device(self.device))
                if found is not None:
                    return found
            return dict(zip(self._names, map(torch.from_numpy, self.run(feeds_of(self, given)))))

    def run_placed(self, batch: Mapping[str, object], device: torch.device) -> dict[str, torch.Tensor] | None:
        """The outputs on a device that the engine runs on, for inputs there; None where sizes of outputs are not known before, and for
        engines with a cache or with deltas. Raises InputError, and BackendError if the engine fails."""
        if self._decoder is not None or self.tables.values:
            return None
        feeds = self.checked(batch)
        shapes = self._shapes_of({name: tuple(value.shape) for name, value in feeds.items()})
        if shapes is None:
            return None
        outputs = {
            name: (spec.dtype, shape) for name, spec, shape in zip(self._graph_names, self.outputs, shapes)
        }
        try:
            return dict(zip(self._names, run_placed(self.session, feeds, outputs, device)))
        except RuntimeError as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BackendError(f"the engine failed on {device}: {first[:400]}") from error

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs in order, without checking the feeds: for loops whose inputs are known to be valid."""
        if self._decoder is not None:
            cache = self._decoder.cache
            parts = rows_together(cache, feeds, cached_positions(cache, feeds))
            if len(parts) > 1:
                return run_in_parts(self.run, parts, cache, self.inputs, self.outputs, feeds)
        shapes = self._output_shapes(feeds)
        feeds = self.tables.narrowed(feeds)
        try:
            if shapes is None or sum(map(prod, shapes)) < SMALL:
                results: list[Array] = self.session.run(self._graph_names, {**feeds, **self.tables.values})
            else:
                results = self._run_into_buffers(feeds, shapes)
        except Exception as error:  # onnxruntime's exceptions have no public base
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BackendError(f"the engine failed on {shapes_text(feeds)}: {first[:400]}") from error
        return results

    def _output_shapes(self, feeds: Mapping[str, Array]) -> list[tuple[int, ...]] | None:
        """The outputs' shapes for a batch; None if the feeds do not determine them or the engine is not on the CPU."""
        return self._shapes_of({name: value.shape for name, value in feeds.items()}) if self._on_cpu else None

    def _shapes_of(self, given: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]] | None:
        """The outputs' shapes for inputs of these shapes; None if they do not determine them."""
        sizes = {
            dim: size
            for spec in self.inputs
            for dim, size in zip(spec.shape, given[spec.name])
            if isinstance(dim, str)
        }
        try:
            return [
                tuple(dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape)
                for spec in self.outputs
            ]
        except KeyError:
            return None

    def _run_into_buffers(self, feeds: Mapping[str, Array], shapes: list[tuple[int, ...]]) -> list[Array]:
        """Run with the outputs written to reused memory."""
        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        self.tables.bind(binding)
        results = []
        for name, dtype, shape in zip(self._graph_names, self._dtypes, shapes):
            array = self._buffers.take(shape, dtype)
            binding.bind_output(name, "cpu", 0, dtype.type, shape, array.ctypes.data)
            results.append(array)
        self.session.run_with_iobinding(binding)
        return results

    def decoder(self) -> OrtDecoder | None:
        """What the decode loop runs on; None if the program has no KV cache."""
        return self._decoder

    def save(self, path: str | Path) -> None:
        """Write the engine and its tokenizer as a bundle for `bmgraph.load`; raises BundleError if it cannot be written."""
        save_engine(self, Path(path))

    def __repr__(self) -> str:
        return f"<OrtEngine on {self.providers[0]}: {self.signature()}>"


def _of_cache_in_place(providers: Sequence[str] | None) -> Sequence[str]:
    """The providers of an engine whose cache is appended in place, which a program is compiled to for the CPU alone."""
    if providers is not None and [SHORT.get(name, name) for name in providers] != [CPU]:
        raise BackendError(
            f"this engine was compiled for the CPU, where its KV cache is appended in place, and does not run on {', '.join(providers)}: "
            "compile the model with Onnx(providers=...)"
        )
    return [CPU]


def _lies_on(device: str, value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == device


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype
