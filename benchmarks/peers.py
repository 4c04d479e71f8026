"""The encoder on other compilers, with the best settings known for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

Batch = Mapping[str, torch.Tensor]
Call = Callable[[Batch], np.ndarray]


class _Hidden(nn.Module):
    """An encoder that returns only its last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def plain_onnx(model: nn.Module, batch: Batch, folder: Path) -> Path:
    """torch's own ONNX export, with dynamic batch and sequence."""
    file = folder / "plain.onnx"
    if not file.exists():
        dynamic = torch.export.Dim.DYNAMIC
        axes = {name: {0: dynamic, 1: dynamic} for name in ("input_ids", "attention_mask")}
        torch.onnx.export(
            _Hidden(model), (batch["input_ids"], batch["attention_mask"]), str(file), dynamo=True, dynamic_shapes=axes,
            input_names=["input_ids", "attention_mask"], output_names=["hidden"], opset_version=20, external_data=False,
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


def openvino(model: nn.Module, batches: list[Batch], folder: Path, threads: int, int8: bool) -> Call:
    """OpenVINO in fp32, or quantized by NNCF with its transformer preset on the same calibration batches."""
    import openvino as ov

    core = ov.Core()
    read = core.read_model(str(plain_onnx(model, batches[0], folder)))
    if int8:
        import nncf

        dataset = nncf.Dataset(batches, lambda batch: {name: value.numpy() for name, value in batch.items()})
        read = nncf.quantize(read, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(read, "CPU", settings)
    request = compiled.create_infer_request()

    def call(batch: Batch) -> np.ndarray:
        return request.infer({name: value.numpy() for name, value in batch.items()}, share_inputs=True)[0]

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
