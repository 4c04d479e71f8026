"""Execution providers of ONNX Runtime: which are asked for, whether they were taken, and on which device inputs and outputs lie."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bmgraph.errors import BackendError, InputError

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
"""ONNX Runtime's names of its own kernels on the CPU and on NVIDIA GPUs, and of TensorRT's, beneath ONNX Runtime."""

SHORT = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}
"""Short names."""

CPU_ALONE = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"})
"""Operators of ours that have a kernel on the CPU and none for CUDA: what rounds activations to 8 bits, and products of these."""

BEHIND = {TENSORRT: CUDA, CUDA: CPU}
"""What runs the operators that a provider has no kernel for."""


def chosen_providers(ort: Any, wanted: Sequence[str] | None) -> list[str]:
    """The providers that a session is to be made with: those wanted and what stands behind them, by default CUDA if a GPU works, else the
    CPU.

    Raises InputError for one that the installed package does not have, BackendError for one on a GPU where none works.
    """
    available = ort.get_available_providers()
    if wanted is None:
        return [CUDA, CPU] if CUDA in available and gpu_works() else [CPU]
    if isinstance(wanted, str):
        raise InputError(f"providers={wanted!r}: give a tuple of names, such as ({wanted!r},)")
    names = [SHORT.get(name, name) for name in wanted]
    for name in names:
        if name not in available:
            hint = ": install onnxruntime-gpu in the place of onnxruntime" if name in BEHIND else ""
            raise InputError(
                f"provider {name!r} is not available: ONNX Runtime offers {', '.join(available)}{hint}"
            )
    needed = [name for name in names if name in BEHIND]
    if needed and not gpu_works():
        raise BackendError(
            f"provider {needed[0]!r} runs on an NVIDIA GPU, and none works here: take providers=('cpu',), or leave providers out"
        )
    for name in names:
        behind = BEHIND.get(name)
        if behind is not None and behind not in names:
            names.append(behind)
    return names


def check_taken(wanted: Sequence[str] | None, chosen: Sequence[str], taken: Sequence[str]) -> None:
    """Raise BackendError where a session runs without a provider that was wanted: ONNX Runtime then only logs a warning."""
    lost = [name for name in chosen if name not in taken] if wanted is not None else []
    if lost:
        raise BackendError(
            f"ONNX Runtime could not load provider {lost[0]!r}, and would run on {', '.join(taken)}: install the CUDA, cuDNN and, for "
            "TensorRT, TensorRT libraries that its version needs"
        )


def load_libraries(ort: Any, chosen: Sequence[str]) -> None:
    """Load the libraries of CUDA that pip has installed, of torch too, where ONNX Runtime finds no others."""
    if CUDA in chosen and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()


def without_gpu_kernel(operators: Iterable[str]) -> list[str]:
    """Those of the operators by which programs are lowered that run on the CPU beside a GPU."""
    return sorted(set(operators) & CPU_ALONE)


def device_of(taken: Sequence[str]) -> str:
    """ONNX Runtime's name of the device on which a session with these providers computes: "cpu" or "cuda"."""
    return "cuda" if CUDA in taken or TENSORRT in taken else "cpu"


def gpu_works() -> bool:
    """Whether there is a driver and a device: the GPU package of ONNX Runtime lists CUDA on machines without one too."""
    if not Path("/dev/nvidia0").exists() and os.name == "posix":
        return False
    import torch

    return torch.cuda.is_available()
