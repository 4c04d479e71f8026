"""load: a saved folder becomes a Program or an engine again."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from bmgraph.errors import BundleError, InputError
from bmgraph.ops.outside import normalized
from bmgraph.serialize.bundle import Bundle, read_bundle
from bmgraph.serialize.program_bundle import load_program

if TYPE_CHECKING:
    from bmgraph.ir.program import Program
    from bmgraph.runtime.engine_base import Engine

ENGINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "onnx": ("bmgraph.runtime.ort.load", ("providers", "threads", "huge_pages")),
    "openvino": ("bmgraph.runtime.openvino.load", ("threads", "cache", "other_version")),
    "tensorrt": ("bmgraph.runtime.tensorrt.load", ("cache",)),
}
"""Backend of a saved engine -> the module whose `load_engine` reads it, and the options that this takes."""

TRUSTED = "tensorrt"
"""The backend whose engines are native code."""

NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)
"""A name that a backend can have; of others, no installed package is looked for."""


def load(
    path: str | Path, *, trust: bool | str | tuple[str, ...] = False, **options: object
) -> Program | Engine:
    """The Program or Engine that was saved in a folder.

    `options` are an ONNX engine's `providers`, `threads` and `huge_pages` (as of `Onnx`), or an OpenVINO engine's `threads`, `cache` (as of `OpenVINO`) and
    `other_version=True`, which takes what this machine's OpenVINO computes where another version made it, or a TensorRT engine's `cache` (as of
    `TensorRT`). A TensorRT engine asks for trust in its maker, `trust=True` or
    `("tensorrt",)`, since its plan is native code; a program that calls operators of other packages asks for their names,
    `trust=("package",)`, and imports them, as does an engine of another package's backend. Of all others nothing is
    unpickled, imported or evaluated, and what was loaded stays what it was if the folder is removed or saved anew. Large
    weights of a program stay in its files until they are asked for: where these are overwritten in place, that raises
    BundleError, as does a folder that is truncated, altered, foreign or hostile. Raises BackendError for an engine of other
    hardware, or of another OpenVINO.
    """
    packages = (trust,) if isinstance(trust, str) else () if isinstance(trust, bool) else tuple(trust)
    bundle = read_bundle(Path(path))
    if bundle.kind == "delta":
        raise BundleError(f"{path} holds a delta: put it on its backbone with the passes LoadDelta or Deltas")
    if bundle.kind == "program":
        if options:
            raise InputError(f"a program takes no {', '.join(options)}")
        return load_program(bundle, packages)
    if bundle.kind == "trainer":
        raise InputError(
            f"{path} is a checkpoint of training: compile the same program again and give it to trainer.load"
        )
    backend = bundle.manifest.get("backend")
    if not (isinstance(backend, str) and NAME.fullmatch(backend)):
        raise BundleError(
            f"{path} holds an engine of backend {str(backend)[:100]!r}, which is no name of a backend"
        )
    if backend not in ENGINES:
        return _of_outside(bundle, backend, packages, options)
    module, known = ENGINES[backend]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise InputError(f"an engine of backend {backend} takes no {', '.join(unknown)}")
    if backend == TRUSTED:
        options["trust"] = trust is True or TRUSTED in packages
    engine: Engine = import_module(module).load_engine(bundle, **options)
    return engine


def _of_outside(bundle: Bundle, backend: str, trusted: tuple[str, ...], options: dict[str, object]) -> Engine:
    """The engine of another package's backend, by its `load`; the package is imported only if it is trusted by its name."""
    from bmgraph.backends import outside_packages, resolve_backend  # late: a serving process has no backends

    packages = outside_packages(backend)
    if not packages:
        raise BundleError(
            f"{bundle.path} holds an engine of backend {backend[:100]!r}, which is neither {' nor '.join(ENGINES)} nor one of an "
            "installed package: install the package that adds it"
        )
    chosen = [name for name in packages if name in set(map(normalized, trusted))]
    if not chosen:
        given = " or ".join(f'bg.load(path, trust=("{name}",))' for name in packages)
        raise BundleError(
            f"{bundle.path} holds an engine of backend {backend!r}, which code of another package loads: if you trust "
            f"{' or '.join(packages)}, load with {given}"
        )
    if options:
        raise InputError(f"an engine of backend {backend} takes no {', '.join(options)}")
    return resolve_backend(backend, chosen[0]).load(bundle)
