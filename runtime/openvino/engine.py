"""OpenVinoEngine: a compiled model that runs on OpenVINO."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from bmgraph.errors import BackendError, InputError
from bmgraph.ir.cache_spec import INT8, CacheLayout, CacheSpec
from bmgraph.ir.generation_defaults import GenerationDefaults
from bmgraph.ir.tensor_spec import Range, TensorSpec, graph_output_names
from bmgraph.pass_manager.report import Report
from bmgraph.runtime.arrays import feeds_of, shapes_text
from bmgraph.runtime.generation.generate import GeneratingEngine
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.generation.tokenizer import Tokenizer
from bmgraph.runtime.live_deltas import LiveDeltas
from bmgraph.runtime.openvino.bundle import save_engine
from bmgraph.runtime.openvino.compiled import CompiledModels, Settings
from bmgraph.runtime.openvino.decoder import OpenVinoDecoder
from bmgraph.runtime.openvino.library import failures, first_line, library_version
from bmgraph.runtime.openvino.table_inputs import TableInputs
from bmgraph.runtime.ort.model_files import ModelFiles
from bmgraph.runtime.owned_tables import OwnedTables
from bmgraph.utils.locked_folder import LockedFolder

LARGEST = 2**24
"""The largest integer of an input: OpenVINO's kernels keep 32 bits of int64, and compute some operators on integers in
float32, which is exact up to here."""

FEW_LENGTHS = 32
"""Prompts of a batch are encoded in multiples of so many positions, where a model is compiled for each length."""

CODES_EXTRA = 8
"""Bytes of the scale and the zero point of a group of codes of the cache."""

WIDE = (torch.int64, torch.int32, torch.uint64, torch.uint32)

PRECISIONS: dict[str, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16}
"""What float32 can be computed in."""


class OpenVinoEngine(GeneratingEngine):
    """A compiled model: call it with the inputs by name, get the outputs by name.

    Inputs are torch tensors (or numpy arrays) with the dtypes and shapes of `inputs`; outputs are torch tensors. `settings`
    say how it computes; `models` are what was compiled, by shape: the first call with a new shape compiles a model for it. An
    engine with a KV cache has one model, which keeps it as OpenVINO's state.
    Integers beyond 2^24 are refused, since not all of its kernels are exact there. Obtain one from `bmgraph.compile(..., backend="openvino")`
    or `bmgraph.load(...)`.
    """

    graphs: dict[str, OpenVinoEngine]  # type: ignore[assignment]  # a narrower type of what only __init__ sets

    def __init__(
        self,
        files: ModelFiles,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        ranges: Mapping[str, Range],
        report: Report,
        settings: Settings,
        *,
        example: Mapping[str, torch.Tensor] | None = None,
        ignored: tuple[str, ...] = (),
        cache: CacheLayout | None = None,
        graphs: Mapping[str, OpenVinoEngine] | None = None,
        temporary: LockedFolder | None = None,
        tokenizer: Tokenizer | None = None,
        generation: GenerationDefaults | None = None,
        tables: Mapping[str, str] | None = None,
        owned: OwnedTables | None = None,
    ) -> None:
        super().__init__(
            inputs, outputs, ranges, report, example=example, ignored=ignored, cache=cache, graphs=graphs, temporary=temporary,
        )  # fmt: skip
        self.files = files
        self.settings = settings
        self.version = library_version()
        self.tokenizer = tokenizer
        self.generation = generation or GenerationDefaults()
        self._names = [spec.name for spec in outputs]
        self._graph_names = graph_output_names(inputs, outputs)
        self.tables = (
            TableInputs(tables or {}, owned.tensors, owned.choice)
            if owned is not None
            else TableInputs({}, {})
        )
        self.models = self.compiled(settings)
        self._decoder = (
            OpenVinoDecoder(
                self.models.stateful(), cache.spec(self), self.feeders(), self.tables, self._encoded_in()
            )
            if cache is not None
            else None
        )
        report.notes += self._told()

    def compiled(self, settings: Settings) -> CompiledModels:
        """The engine's models, compiled with other settings."""
        return CompiledModels(
            self.files.folder / self.files.model, [spec.name for spec in self.inputs], settings, self.files.bytes,
            outputs=self._graph_names, cache=self.cache, tables=self.tables.arrays,
        )  # fmt: skip

    def serve_deltas(self, owned: OwnedTables) -> None:
        """Let the deltas in tables be exchanged, for this engine and those of its other graphs."""
        self.live = LiveDeltas(owned.form, owned.tensors, (self, *self.graphs.values()))

    @property
    def precision(self) -> torch.dtype:
        """What float32 is computed in."""
        return PRECISIONS[self.settings.precision]

    @property
    def rounds_cache(self) -> bool:
        """Whether it keeps its KV cache in codes of 8 bits."""
        return self.cache is not None and self.settings.kv_cache == INT8

    @property
    def threads(self) -> int:
        """The threads of one call."""
        return self.settings.threads

    @property
    def folder(self) -> Path:
        """The folder that the model was in when the engine was made."""
        return self.files.folder

    def __call__(self, **batch: object) -> dict[str, torch.Tensor]:
        """Run the engine; raises InputError for a wrong name, dtype, shape or value before anything runs."""
        with self.holding_deltas(batch) as given:
            feeds = feeds_of(self, given)
            for spec in self.inputs:
                _check_integers(spec, feeds[spec.name])
            return dict(zip(self._names, map(torch.from_numpy, self.run(feeds))))

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs in order, without checking the feeds: for loops whose inputs are known to be valid."""
        feeds = self.tables.narrowed(feeds)
        model = self.models.at(tuple(value.shape for value in feeds.values()))
        try:
            return model.run(feeds)
        except failures() as error:
            raise BackendError(f"the engine failed on {shapes_text(feeds)}: {first_line(error)}") from error

    def prepare(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Compile for the shapes of a batch; raises BackendError where OpenVINO cannot."""
        model = self.models.at(tuple(tuple(batch[spec.name].shape) for spec in self.inputs))
        names = model.output_names
        if len(names) != len(self._graph_names) or any(
            name not in found for name, found in zip(self._graph_names, names)
        ):
            raise BackendError(
                f"OpenVINO gives the outputs {names} of {self.files.model}: expected {self._graph_names}"
            )

    def decoder(self) -> OpenVinoDecoder | None:
        """What the decode loop runs on; None if the program has no KV cache."""
        return self._decoder

    def _encoded_in(self) -> int:
        """Of what multiple the lengths are that prompts of a batch are encoded in: each length may be a model of its own."""
        return 1 if all(engine.models.serves_all for engine in self.graphs.values()) else FEW_LENGTHS

    def save(self, path: str | Path) -> None:
        """Write the engine as a bundle for `bmgraph.load`; raises BundleError if it cannot be written."""
        save_engine(self, Path(path))

    def _told(self) -> list[str]:
        """What the report says of how the engine computes."""
        threads = f"{self.settings.threads} thread{'s' if self.settings.threads > 1 else ''}"
        lines = [f"OpenVINO {self.version} computes float32 in {self.settings.precision}, on {threads}"]
        if self.settings.rounded_blocks:
            lines.append(
                f"products of codes round blocks of {self.settings.rounded_blocks} of their input to 8 bits"
            )
        if self.cache is not None:
            lines.append("one model for all shapes, which keeps the KV cache as its state")
            if self.rounds_cache:
                lines.append(_cache_told(self.cache.spec(self), self.precision))
        elif self.models.serves_all:
            lines.append(
                "one model for all shapes: the last bits differ from those of models for one shape, which are faster"
            )
        else:
            lines.append(
                f"a model for each shape is compiled at its first call; the last {self.models.most} are kept"
            )
        return lines

    def __repr__(self) -> str:
        return f"<OpenVinoEngine in {self.settings.precision}: {self.signature()}>"


def _cache_told(cache: CacheSpec, dtype: torch.dtype) -> str:
    """What a cache in codes of 8 bits weighs: a code for each number, and a scale and a zero point in float32 for each head."""
    heads = [math.prod(map(int, slot.empty_shape(1, 1)[1 : slot.axis])) for slot in cache.slots]
    sizes = [int(slot.past.shape[-1]) for slot in cache.slots]
    rounded = sum(count * (size + CODES_EXTRA) for count, size in zip(heads, sizes))
    whole = sum(count * size for count, size in zip(heads, sizes)) * dtype.itemsize
    return (
        f"the KV cache in codes of 8 bits: {rounded:,} bytes for each position of a row instead of {whole:,}"
    )


def _check_integers(spec: TensorSpec, value: Array) -> None:
    """Raise InputError for integers that OpenVINO might compute wrongly; values of a table are known to fit."""
    known = spec.values is not None and spec.values[1] is not None and spec.values[1] <= LARGEST
    if spec.dtype not in WIDE or known or not value.size:
        return
    low, high = int(value.min()), int(value.max())
    if low < -LARGEST or high > LARGEST:
        raise InputError(
            f"input {spec.name!r} holds {low if low < -LARGEST else high}: OpenVINO computes integers exactly up to {LARGEST} alone; "
            "give smaller ones, or take the backend onnx"
        )
