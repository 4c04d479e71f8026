"""The encoder on other compilers, with the best settings known for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

Batch = Mapping[str, torch.Tensor]
Call = Callable[[Batch], np.ndarray]


class _Hidden(nn.Module):
    """An encoder of ids that returns only its last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class _HiddenOfPixels(nn.Module):
    """An encoder of images that returns only its last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).last_hidden_state


def hidden(model: nn.Module, batch: Batch) -> nn.Module:
    """A model that takes a batch by place and returns the last hidden state alone."""
    return _HiddenOfPixels(model) if "pixel_values" in batch else _Hidden(model)


def plain_onnx(model: nn.Module, batch: Batch, folder: Path) -> Path:
    """torch's own ONNX export, with dynamic batch and sequence."""
    file = folder / "plain.onnx"
    if not file.exists():
        dynamic = torch.export.Dim.DYNAMIC
        axes = {
            name: {0: dynamic} if value.dim() > 2 else {0: dynamic, 1: dynamic}
            for name, value in batch.items()
        }
        torch.onnx.export(
            hidden(model, batch), tuple(batch.values()), str(file), dynamo=True, dynamic_shapes=axes,
            input_names=list(batch), output_names=["hidden"], opset_version=20, external_data=False,
        )  # fmt: skip
    return file


def _onnxruntime(file: Path, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {name: value.numpy() for name, value in batch.items()})[0]


def onnxruntime_dynamic(model: nn.Module, batch: Batch, folder: Path, threads: int) -> Call:
    """ONNX Runtime's `quantize_dynamic`, after shape inference."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    file = folder / "dynamic.onnx"
    if not file.exists():
        inferred = folder / "inferred.onnx"
        onnx.save(
            onnx.shape_inference.infer_shapes(onnx.load(str(plain_onnx(model, batch, folder)))), str(inferred)
        )
        quantize_dynamic(str(inferred), str(file), weight_type=QuantType.QInt8)
    return _onnxruntime(file, threads)


def openvino_model(model: nn.Module, batches: list[Batch], folder: Path, source: str, int8: bool) -> Any:
    """An OpenVINO model, read from torch's ONNX export (`source` "onnx") or from the torch model ("torch"): fp32, or quantized
    by NNCF with its transformer preset on the same calibration batches. Read from torch it keeps attention whole."""
    import openvino as ov

    if source == "onnx":
        read = ov.Core().read_model(str(plain_onnx(model, batches[0], folder)))
    else:
        read = ov.convert_model(hidden(model, batches[0]), example_input=tuple(batches[0].values()))
    return nncf_int8(read, batches) if int8 else read


def nncf_int8(read: Any, batches: list[Batch]) -> Any:
    """An OpenVINO model quantized by NNCF with its transformer preset."""
    import nncf

    dataset = nncf.Dataset(batches, lambda batch: [value.numpy() for value in batch.values()])
    return nncf.quantize(read, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches))


def openvino(read: Any, threads: int, static: bool, precision: str | None = None) -> Call:
    """Run an OpenVINO model with the latency hint: as it was read, or (`static`) made static for each shape of a batch.

    precision: what it computes floats in; None leaves it to OpenVINO, which takes bf16 where the CPU has it.
    """
    import openvino as ov

    core = ov.Core()
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    ready: dict[tuple[Any, ...], Any] = {}

    def request(shapes: tuple[tuple[int, ...], ...]) -> Any:
        key = shapes if static else ()
        if key not in ready:
            fixed = read.clone()
            if static:
                fixed.reshape({place: list(shape) for place, shape in enumerate(shapes)})
            ready[key] = core.compile_model(fixed, "CPU", settings).create_infer_request()
        return ready[key]

    def call(batch: Batch) -> np.ndarray:
        given = [value.numpy() for value in batch.values()]
        return request(tuple(item.shape for item in given)).infer(given, share_inputs=True)[0]

    return call


def ctranslate2(folder_of_model: Path, folder: Path, threads: int) -> Call:
    """CTranslate2 in int8; it takes ragged lists of ids, without padding."""
    import ctranslate2 as ct

    target = folder / "ctranslate2"
    if not target.exists():
        ct.converters.TransformersConverter(str(folder_of_model)).convert(str(target), quantization="int8")
    encoder = ct.Encoder(str(target), device="cpu", intra_threads=threads, compute_type="int8")

    def call(batch: Batch) -> np.ndarray:
        ids = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"])]
        return np.asarray(encoder.forward_batch(ids).last_hidden_state)

    return call
