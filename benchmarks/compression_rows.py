"""Rows of `compression.py`: each makes weights of few bits of one model, by bmgraph or by a peer's own code."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.contestant import megabytes


@dataclass
class Source:
    """What a row starts from: a causal language model whose head is tied, its tokenizer, and text to calibrate with."""

    model: Any
    tokenizer: Any
    text: str

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The linears by name, with the head."""
        return {name: item for name, item in self.model.named_modules() if isinstance(item, nn.Linear)}


@dataclass
class Result:
    """Weights f[out, in] by the name of the linear, the bits that a weight takes with its scales, and what else is told."""

    weights: dict[str, torch.Tensor]
    bits: float
    told: dict[str, Any] = field(default_factory=dict)
    call: Callable[[torch.Tensor], torch.Tensor] | None = None
    """What gives logits f[B, S, V] for ids i64[B, S], where it is not the model with these weights in the place of its own."""


Row = Callable[[Source], Result]


def ours(text: str) -> Row:
    """The weights after passes of bmgraph in their text form; activations in blocks are those of ONNX Runtime's kernel, simulated."""

    def run(source: Source) -> Result:
        import bmgraph as bg
        from bmgraph.analysis.weight_sites import products, weight_of
        from bmgraph.backends import Onnx
        from bmgraph.pass_manager.pass_spec import parse_passes
        from bmgraph.pass_manager.target import TORCH
        from bmgraph.passes import known_passes

        ids = torch.tensor(source.tokenizer(source.text[:4000])["input_ids"][:64])[None]
        program = bg.capture(source.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        passes = parse_passes(text, known_passes())
        before, begin = megabytes("VmRSS"), time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
        done = bg.Pipeline(passes).run(
            program, calibration=[source.text], resources={"tokenizer": source.tokenizer}, verify="off",
            target=Onnx().target if "activations=blocks" in text else TORCH,
        )  # fmt: skip
        told: dict[str, Any] = {
            "seconds of passes": time.perf_counter() - begin,
            "peak MB of passes": megabytes("VmHWM") - before,
            "threads": torch.get_num_threads(),
        }
        bits, count = 0, 0
        for node in products(done.graph):
            weight = weight_of(done, node)
            assert weight is not None
            value = weight.node.meta["val"]
            stored = [done.parameters.get(f"{weight.site}_{part}") for part in ("codes", "scale", "zero")]
            held = [item for item in stored if item is not None] if stored[0] is not None else [value]
            bits += 8 * sum(item.numel() * item.element_size() for item in held)
            count += value.numel()
        record = done.history[-1]
        if record.declined:
            told["declined"] = len(record.declined)

        def logits(ids: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = done(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
            return found.detach()

        return Result({}, bits / count, told, logits)

    return run


def onnxruntime(algorithm: str, group: int, symmetric: bool) -> Row:
    """The weights that onnxruntime's `MatMulNBitsQuantizer` makes, which onnxruntime-genai's builder calls, too."""

    def run(source: Source) -> Result:
        found, bits, count = {}, 0.0, 0
        for name, linear in source.linears.items():
            weight = linear.weight.detach()
            found[name], size = _through_onnxruntime(weight, algorithm, group, symmetric)
            bits, count = bits + size, count + weight.numel()
        return Result(found, bits / count)

    return run


def _through_onnxruntime(
    weight: torch.Tensor, algorithm: str, group: int, symmetric: bool
) -> tuple[torch.Tensor, float]:
    """A weight [N, K] quantized as the operand of one MatMul, read back from its MatMulNBits; and the bits that it takes."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import matmul_nbits_quantizer as quantizer

    rows, columns = weight.shape
    kernel = numpy_helper.from_array(weight.T.contiguous().numpy(), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", rows])],
        [kernel],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    configs: dict[str, Any] = {
        "default": lambda: None,
        "rtn": quantizer.RTNWeightOnlyQuantConfig,
        "k_quant": quantizer.KQuantWeightOnlyQuantConfig,
        "hqq": lambda: quantizer.HQQWeightOnlyQuantConfig(block_size=group, bits=4),
    }
    made = quantizer.MatMulNBitsQuantizer(
        model, block_size=group, is_symmetric=symmetric, algo_config=configs[algorithm]()
    )
    made.process()
    result = made.model.model if hasattr(made.model, "model") else made.model
    tensors = {item.name: numpy_helper.to_array(item) for item in result.graph.initializer}
    node = next(item for item in result.graph.node if item.op_type == "MatMulNBits")
    assert isinstance(result, onnx.ModelProto)
    packed, scales, *zeros = (torch.from_numpy(tensors[name].copy()) for name in node.input[1:4] if name)
    count = -(-columns // group)
    codes = torch.stack([packed & 15, packed >> 4], -1).reshape(rows, count, group).float()
    if not zeros:
        zero = torch.full((rows, count), 8.0)
    elif zeros[0].is_floating_point():
        zero = zeros[0].reshape(rows, count)
    else:
        lines = zeros[0].reshape(rows, -1)
        zero = torch.stack([lines & 15, lines >> 4], -1).reshape(rows, -1)[:, :count].float()
    value = (codes - zero.unsqueeze(-1)) * scales.reshape(rows, count, 1)
    size = 8 * sum(item.numel() * item.element_size() for item in (packed, scales, *zeros))
    return value.reshape(rows, -1)[:, :columns].contiguous(), size


def onnxruntime_gptq(group: int) -> Row:
    """onnxruntime's own GPTQ with its default options, given X^T X of the inputs of the model in fp32, as its `gptq_quantize` gives
    it. Its search of scales (`mse`) is off by default, and rightly: it compares codes with weights, and perplexity at groups of 64
    is 212 with it."""

    def run(source: Source) -> Result:
        import numpy as np
        from onnxruntime.quantization.neural_compressor.weight_only import gptq, pad_tensor

        sums = _second_moments(source)
        found, bits, total = {}, 0, 0
        for name, linear in source.linears.items():
            weight = linear.weight.detach().T.contiguous().numpy().astype(np.float64)
            columns = len(weight)
            count = -(-columns // group)
            padded = pad_tensor(weight, group, count)
            second = np.zeros((len(padded), len(padded)))
            second[:columns, :columns] = sums[name].numpy()
            value = gptq(padded, second, 4, group, "asym")
            found[name] = torch.from_numpy(value[:columns].T.copy()).float()
            bits += weight.shape[1] * count * (4 * group + 36)
            total += weight.size
        return Result(found, bits / total)

    return run


def _second_moments(source: Source) -> dict[str, torch.Tensor]:
    """X^T X f64[in, in] of the inputs X of each linear, over the windows that bmgraph calibrates with."""
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).float()
            found = (rows.T @ rows).double()
            sums[name] = sums[name] + found if name in sums else found

        return hook

    handles = [item.register_forward_pre_hook(watch(name)) for name, item in source.linears.items()]
    ids = source.tokenizer(source.text)["input_ids"][: 48 * 256]
    with torch.no_grad():
        for window in torch.tensor(ids).reshape(-1, 1, 256):
            source.model(input_ids=window)
    for handle in handles:
        handle.remove()
    return sums


def torchao(group: int, algorithm: str, symmetric: bool) -> Row:
    """The weights of torchao's `IntxWeightOnlyConfig`, dequantized by itself."""

    def run(source: Source) -> Result:
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
        from torchao.quantization.quant_primitives import MappingType
        from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

        config = IntxWeightOnlyConfig(
            weight_dtype=torch.int4,
            granularity=PerGroup(group),
            mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
            intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm(algorithm),
        )
        found = {}
        for name, linear in source.linears.items():
            one = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, bias=False))
            one[0].weight = nn.Parameter(linear.weight.detach().clone())
            quantize_(one, config)
            weight: Any = one[0].weight
            found[name] = weight.dequantize().detach().float()
        return Result(found, 4 + (32 if symmetric else 36) / group)

    return run


def fp32(source: Source) -> Result:
    """The weights as they are."""
    return Result({}, 32.0)


CODES = "embeddings=8,site_drift=2.0"

ROTATED: Mapping[str, str] = {
    **{
        f"int4 {method} {group}": f"quantize{{scheme=int4,activations=none,method={method},group={group},{CODES}}}"
        for group in (64, 128, 256)
        for method in ("rtn", "gptq")
    },
    **{f"int3 {method} 64": f"quantize{{scheme=int3,activations=none,method={method},group=64,{CODES}}}" for method in ("rtn", "gptq")},
    "int4 rtn 64, activations in blocks": f"quantize{{scheme=int4,activations=blocks,method=rtn,group=64,{CODES}}}",
    **{
        f"int8, {mode} activations": f"quantize{{activations={mode},site_drift=2.0,outliers=false}}"
        for mode in ("dynamic", "static")
    },
    "int8, static activations, smoothed": "quantize{activations=static,site_drift=2.0,outliers=false,smooth=true}",
}  # fmt: skip
"""What is measured with `Rotate` in front and without: name -> passes."""

METHODS = ("rtn", "mse", "hqq", "awq", "gptq", "quantease")

ROWS: Mapping[str, Row] = {
    "fp32": fp32,
    "bmgraph int8": ours("quantize{scheme=int8,activations=none,embeddings=8}"),
    **{
        f"bmgraph int4 {method} {group}": ours(
            f"quantize{{scheme=int4,activations=none,method={method},group={group},embeddings=8,site_drift=2.0}}"
        )
        for group in (32, 64, 128)
        for method in METHODS
    },
    **{
        f"bmgraph {scheme} {method} {group}{' with zero points' * with_zeros}": ours(
            f"quantize{{scheme={scheme},activations=none,method={method},group={group},embeddings=8,site_drift=2.0"
            f"{',symmetric=false' * with_zeros}}}"
        )
        for scheme in ("int4", "int3", "int2")
        for group in (64, 128)
        for method in METHODS
        for with_zeros in (True, False)
        if with_zeros or scheme != "int4"
    },
    **{
        f"bmgraph mixed 4.5 {method} 64": ours(
            f"quantize{{scheme=mixed,average=4.5,activations=none,method={method},group=64,embeddings=8,site_drift=2.0}}"
        )
        for method in ("rtn", "gptq")
    },
    **{f"bmgraph {name}": ours(text) for name, text in ROTATED.items()},
    **{
        f"bmgraph rotated {name}": ours(f"rotate{{untie={str('embeddings' in text).lower()}}},{text}")
        for name, text in ROTATED.items()
    },
    **{
        f"onnxruntime int4 {name} {group}": onnxruntime(algorithm, group, symmetric)
        for group in (64, 128)
        for name, algorithm, symmetric in (
            ("default symmetric", "default", True), ("default", "default", False), ("hqq", "hqq", False),
        )
    },
    **{f"onnxruntime int4 {name} 32": onnxruntime(name, 32, False) for name in ("rtn", "k_quant")},
    **{f"onnxruntime int4 gptq {group}": onnxruntime_gptq(group) for group in (64, 128)},
    "torchao int4 64": torchao(64, "affine", False),
    "torchao int4 symmetric 64": torchao(64, "affine", True),
    "torchao int4 hqq 64": torchao(64, "hqq_scale_only", True),
}  # fmt: skip
"""Name of a row -> how its weights are made. The head is quantized in all of them; torchao has no groups that do not divide
576, and onnxruntime's rtn and k_quant fail where a row has an odd number of them."""

PRUNED: Mapping[str, Row] = {
    f"{share} {score}": ours(f"prune{{pattern={pattern},score={score}}}")
    for share, pattern in (("50%", "unstructured"), ("2:4", "2:4"))
    for score in ("magnitude", "wanda", "sparsegpt")
}
"""Half of the weights of all linears but the tied head pruned, by score."""

MINILM: Mapping[str, str] = {
    "int8 weights": "quantize{scheme=int8,activations=none}",
    "int8 static": "quantize{scheme=int8,activations=static}",
    "int8 static, smoothed": "quantize{scheme=int8,activations=static,smooth=true}",
    "int8 static, smoothed, mse": "quantize{scheme=int8,activations=static,smooth=true,method=mse}",
    "int8 static, smoothed, percentile": "quantize{scheme=int8,activations=static,smooth=true,ranges=percentile}",
    "int8 static, smoothed, biases": "quantize{scheme=int8,activations=static,smooth=true,correct_bias=true}",
    **{
        f"int4 {method} {group}": f"quantize{{scheme=int4,activations=none,method={method},group={group},site_drift=2.0}}"
        for group in (32, 64, 128)
        for method in METHODS
    },
}
"""Name of a row of MiniLM -> passes, which run for torch: what the codes stand for, not the kernels of an engine."""


def minilm(passes: str) -> float:
    """The mean cosine of MiniLM's token embeddings after passes to those before, on 8 texts of 128 tokens that did not calibrate."""
    import bmgraph as bg
    from benchmarks import encoders
    from benchmarks.encoder import cosine
    from bmgraph.pass_manager.pass_spec import parse_passes
    from bmgraph.passes import known_passes

    encoder = encoders.minilm()
    batch = encoder.batch(0, 8, 128, None)
    program = bg.capture(encoder.model, batch)
    done = bg.Pipeline(parse_passes(passes, known_passes())).run(
        program, calibration=encoder.calibration(), verify="off"
    )
    name = program.outputs[0].name
    found, expected = (item(**batch)[name].detach().numpy() for item in (done, program))
    return cosine(found, expected, batch["attention_mask"])
