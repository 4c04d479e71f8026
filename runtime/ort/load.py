"""Load an ONNX Runtime engine from a bundle, after checking its models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bmgraph.prompting.task_files import read_task
from bmgraph.runtime.ort.bundle import DELTAS, EXAMPLE_FILE, MODEL_FILE, TABLES
from bmgraph.runtime.ort.bundled_models import admitted, other_graphs
from bmgraph.runtime.ort.bundled_parts import (
    check_choice,
    generation_of,
    owned_tables_of,
    tables_of,
    tokenizer_of,
)
from bmgraph.runtime.ort.engine import OrtEngine
from bmgraph.runtime.ort.model_files import ModelFiles
from bmgraph.runtime.temporary import folder_for_engine
from bmgraph.serialize.bundle import Bundle
from bmgraph.serialize.safetensors_io import read_tensors
from bmgraph.utils.huge_pages import use_huge_pages
from bmgraph.utils.locked_folder import LockedFolder

MAPPED = 2**24
"""From this size on the weights of a bundle are mapped."""


def load_engine(
    bundle: Bundle,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    huge_pages: bool = False,
) -> OrtEngine:
    """The engine in a checked bundle; `providers` and `threads` are those of `make_session`, `huge_pages` that of `Onnx`.

    Every model passes the allowlist before ONNX Runtime reads it. Large weights are copied to a private folder, and mapped. Raises
    BundleError if a model, the manifest or the tokenizer is refused.
    """
    for name in (MODEL_FILE, EXAMPLE_FILE):
        bundle.open(name)
    with _folder_for_weights(bundle) as folder:
        engine = _engine(bundle, folder, providers, threads)
    if huge_pages:
        use_huge_pages()
    return engine


@contextmanager
def _folder_for_weights(bundle: Bundle) -> Iterator[LockedFolder | None]:
    """A private folder where a bundle has large weights, else None."""
    if any(name.endswith(".data") and file.status.st_size >= MAPPED for name, file in bundle.opened.items()):
        with folder_for_engine() as folder:
            yield folder
    else:
        yield None


def _engine(
    bundle: Bundle, folder: LockedFolder | None, providers: Sequence[str] | None, threads: int | None
) -> OrtEngine:
    """The engine, whose weights are mapped in a folder if one is given."""
    place = folder.path if folder is not None else None
    graphs: dict[str, OrtEngine] = {}
    owned = owned_tables_of(bundle)
    for name, (file, entries) in other_graphs(bundle).items():
        files = ModelFiles(bundle.path, file, bundle.opened, checked=True).mapped_in(place)
        described = {**bundle.manifest, TABLES: {}, **entries}
        found, model = admitted(bundle, described, files)
        graphs[name] = OrtEngine(
            files, found.inputs, found.outputs, found.ranges, found.report, providers=providers, threads=threads,
            model=model, ignored=found.ignored, cache=found.cache, graphs=graphs, tables=tables_of(bundle, described, owned),
            owned=owned,
        )  # fmt: skip
    example, tokenizer = read_tensors(bundle.open(EXAMPLE_FILE)), tokenizer_of(bundle)
    task = read_task(bundle)
    files = ModelFiles(bundle.path, MODEL_FILE, bundle.opened, checked=True).mapped_in(place)
    found, model = admitted(bundle, bundle.manifest, files)
    engine = OrtEngine(
        files, found.inputs, found.outputs, found.ranges, found.report, example=example, providers=providers,
        threads=threads, tokenizer=tokenizer, graphs=graphs, model=model, ignored=found.ignored, cache=found.cache,
        generation=generation_of(bundle), tables=tables_of(bundle, bundle.manifest, owned), owned=owned, temporary=folder,
    )  # fmt: skip
    if owned is not None:
        check_choice(bundle, engine, owned)
        engine.serve_deltas(owned)
        engine.deltas.changed = bool(bundle.manifest[DELTAS].get("changed"))
    engine.task = task
    return engine
