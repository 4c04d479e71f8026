"""Make ONNX Runtime sessions: choose providers, threads and optimizations."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from bmgraph.errors import BackendError
from bmgraph.runtime.ort.providers import CPU, check_taken, chosen_providers, load_libraries

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


@dataclass(frozen=True)
class ModelInMemory:
    """A model and, by the file names that it gives, its weights; `path` is its name in errors."""

    path: Path
    data: bytes = field(repr=False)
    weights: Mapping[str, bytearray] = field(repr=False)


def make_session(
    model: Path | ModelInMemory,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    profile: str = "",
) -> InferenceSession:
    """A session on a model file, whose weights stay mapped, or on a model in memory, of which nothing is read from files.

    providers: ONNX Runtime's names, or "cuda", "tensorrt", "cpu"; by default CUDA if it works, else the CPU. threads: within an operator; by default
    one per physical core. profile: the prefix of a file to write timings to; empty for none.

    Raises InputError for an unknown provider, BackendError if ONNX Runtime is missing, installed twice or rejects the model, and where a
    provider that was asked for does not work here.
    """
    ort = import_onnxruntime()
    chosen = chosen_providers(ort, providers)
    load_libraries(ort, chosen)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads or physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # otherwise ONNX Runtime may round the activations of 8-bit weights to 8 bits on its own; if a program rounds
    # activations, its model says so explicitly
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # threads that go on spinning behind a run take the cores of whatever runs next: another session, a server's loop
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    # the fused kernel of Add + LayerNormalization is five times slower on the CPU than the two operators
    disabled = ["SkipLayerNormFusion"] if chosen == [CPU] else []
    source: str | bytes = str(model) if isinstance(model, Path) else model.data
    if isinstance(model, ModelInMemory) and model.weights:
        names, weights = list(model.weights), list(model.weights.values())
        options.add_external_initializers_from_files_in_memory(names, weights, list(map(len, weights)))
    try:
        made = ort.InferenceSession(
            source, options, providers=chosen, disabled_optimizers=disabled, enable_fallback=providers is None
        )
    except Exception as error:  # onnxruntime's exceptions have no public base
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        where = model if isinstance(model, Path) else model.path
        raise BackendError(f"ONNX Runtime rejects {where}: {first[:400]}") from error
    check_taken(providers, chosen, made.get_providers())
    return made


def import_onnxruntime() -> ModuleType:
    """The onnxruntime module; raises BackendError if it is missing, or if two packages of it overwrite each other."""
    if all(_installed(name) for name in ("onnxruntime", "onnxruntime-gpu")):
        raise BackendError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            'pip uninstall both, then pip install -e ".[engines]"'
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError('ONNX Runtime is not installed: pip install -e ".[engines]"') from error
    module: ModuleType = onnxruntime
    return module


def onnxruntime_version() -> tuple[int, int]:
    """The first two numbers of the version of the installed onnxruntime."""
    major, minor, *_ = str(import_onnxruntime().__version__).split(".")
    return int(major), int(minor)


def runs_on_cpu(wanted: Sequence[str] | None) -> bool:
    """Whether a session with these providers, as `make_session` takes them, runs on the CPU alone."""
    return chosen_providers(import_onnxruntime(), wanted) == [CPU]


@cache
def _installed(name: str) -> bool:
    """Whether there is a package of this name; asked once, since it reads files and every KV cache asks."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def physical_cores() -> int:
    """The number of physical cores that this process may run on."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        try:
            text = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(
                encoding="ascii"
            )
            cores.add(text.strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))
