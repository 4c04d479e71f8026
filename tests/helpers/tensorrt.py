"""Helpers for tests of TensorRT engines."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch

from bmgraph.backends.onnx.backend import write_model
from bmgraph.backends.tensorrt.network import Network
from bmgraph.ir.program import Program
from bmgraph.runtime.ort.bundle import MODEL_FILE
from bmgraph.verify.metrics import relative_error


def parsed(model: ir.Model, folder: Path) -> Network:
    """The network that TensorRT's parser reads from a lowered program."""
    write_model(model, folder)
    return Network.parse(model, folder / MODEL_FILE)


def integers(network: Network) -> tuple[int, int]:
    """How many tensors a network quantizes to 8 bits, and how many it dequantizes."""
    trt, layers = network.trt, [network.network.get_layer(i) for i in range(network.network.num_layers)]
    made = [
        item
        for item in layers
        if item.type == trt.LayerType.QUANTIZE and item.get_output(0).dtype == trt.int8
    ]
    read = [
        item
        for item in layers
        if item.type == trt.LayerType.DEQUANTIZE and item.get_input(0).dtype == trt.int8
    ]
    return len(made), len(read)


def distance(
    model: ir.Model, program: Program, batches: list[dict[str, torch.Tensor]], folder: Path
) -> float:
    """Relative error of the model that TensorRT is given against its program, run on ONNX Runtime, so without a GPU."""
    import onnxruntime

    for node in model.graph.all_nodes():
        node.attributes.pop("TRT_decomposable", None)  # the only attribute that is not standard ONNX
    ir.save(model, str(folder / MODEL_FILE))
    options = onnxruntime.SessionOptions()  # optimizations would round inputs of int8 weights
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(folder / MODEL_FILE, options, providers=["CPUExecutionProvider"])
    inputs, outputs = (
        [item.name for item in items] for items in (session.get_inputs(), session.get_outputs())
    )
    worst = 0.0
    for batch in batches:
        found = session.run(outputs, {name: batch[name].numpy() for name in inputs})
        expected = program(**batch)
        for name, value in zip(outputs, found):
            worst = max(worst, relative_error(torch.from_numpy(value), expected[name]))
    return worst
