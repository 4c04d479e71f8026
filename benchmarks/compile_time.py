"""What compiling costs: CPU seconds and peak memory of whole compilations, each in a process of its own, medians of 3."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bmgraph.ir.pass_record import machine

HERE = Path(__file__).parent
REPEATS = 3
BOUNDS = {
    "smollm2_int8_onnx": {"cpu_s": 60.0, "peak_mb": 2500.0},
    "minilm_int8_static_onnx": {"cpu_s": 10.0},
    "program_call": {"ratio": 1.3},
    "split_outliers_11008": {"cpu_s": 3.0},
    "trainer_start": {"cpu_s": 15.0},
}
"""Case -> the largest figures that we promise ourselves."""


def smollm2() -> Any:
    """A Llama of SmolLM2-135M's shape; its weights are random, since nothing but time and memory is measured."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch(rows: int, length: int, labels: bool = False) -> dict[str, Any]:
    """Token ids of SmolLM2's vocabulary i64[rows, length], with a mask of ones."""
    import torch

    ids = torch.randint(0, 49152, (rows, length), generator=torch.Generator().manual_seed(0))
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**found, "labels": ids} if labels else found


class Clock:
    """CPU seconds of this process, of all threads, since it was made; and the peak of its memory."""

    def __init__(self) -> None:
        self._begin = time.process_time()

    def read(self) -> dict[str, float]:
        """The seconds so far, and the peak since the process began."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {"cpu_s": time.process_time() - self._begin, "peak_mb": peak}


def smollm2_int8_onnx() -> dict[str, float]:
    """`Quantize("int8", activations="none")` of SmolLM2's shape to an ONNX engine."""
    import bmgraph as bg
    from bmgraph.passes import Quantize

    model, example = smollm2().eval(), batch(2, 16)
    clock = Clock()
    bg.compile(model, passes=[Quantize("int8", activations="none")], example=example, backend="onnx")
    return clock.read()


def minilm_int8_static_onnx() -> dict[str, float]:
    """MiniLM with static int8 from 8 batches of 8 texts, to an ONNX engine."""
    from transformers import AutoModel, AutoTokenizer

    import bmgraph as bg
    from benchmarks.assets import minilm
    from bmgraph.passes import Quantize

    model, tokenizer = AutoModel.from_pretrained(minilm()).eval(), AutoTokenizer.from_pretrained(minilm())
    text = "The quick brown fox number {} jumps over {} lazy dogs while it rains in town. "
    texts = [text.format(index, index * 7 % 13) * (1 + index % 3) for index in range(64)]
    calibration = [
        dict(tokenizer(texts[index : index + 8], padding=True, return_tensors="pt"))
        for index in range(0, 64, 8)
    ]
    clock = Clock()
    bg.compile(
        model, passes=[Quantize("int8")], example=calibration[0], calibration=calibration, backend="onnx"
    )
    return clock.read()


def program_call() -> dict[str, float]:
    """A program's call on a toy Llama against its eager model's, interleaved."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import bmgraph as bg

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=99
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 99, (2, 16))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = bg.capture(model, example)
    times: dict[str, list[float]] = {"program": [], "eager": []}
    with torch.no_grad():
        for _ in range(60):
            for name, call in (("program", lambda: program(**example)), ("eager", lambda: model(**example))):
                begin = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begin)
    found = {f"{name}_ms": 1e3 * statistics.median(values[10:]) for name, values in times.items()}
    return {**found, "ratio": found["program_ms"] / found["eager_ms"]}


def split_outliers(largest: float, channels: int) -> dict[str, float]:
    """`SplitOutliers` with all its checks on a feed-forward of so many channels, one of whose weights is `largest`."""
    import torch
    from torch import nn

    import bmgraph as bg
    from bmgraph.passes import SplitOutliers

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, channels), nn.GELU(), nn.Linear(channels, 64))
    x = torch.randn(32, 64)
    x[:, 3] *= 50
    with torch.no_grad():
        model[0].weight[5] *= 80
        if largest:
            model[0].weight[7, 0] = largest
    program = bg.capture(model, (x,))
    clock = Clock()
    bg.Pipeline([SplitOutliers()]).run(program, calibration=[{program.inputs[0].name: x}])
    return clock.read()


def trainer_start() -> dict[str, float]:
    """A trainer of SmolLM2's shape up to its first step, and the peak of two steps."""
    import bmgraph as bg
    from bmgraph.backends import AdamW, Torch

    model, example = smollm2(), batch(2, 32, labels=True)
    clock = Clock()
    trainer = bg.compile(model, example=example, backend=Torch(optimizer=AdamW(lr=1e-3)))
    start = clock.read()["cpu_s"]
    del model
    for _ in range(2):
        trainer.step(example)
    return {"cpu_s": start, "peak_mb": clock.read()["peak_mb"]}


def eager_training() -> dict[str, float]:
    """Two eager steps of the same model: what the trainer's memory is compared with."""
    import torch

    model, example = smollm2(), batch(2, 32, labels=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    clock = Clock()
    for _ in range(2):
        optimizer.zero_grad()
        model(**example).loss.backward()
        optimizer.step()
    return clock.read()


CASES: dict[str, Callable[[], dict[str, float]]] = {
    "smollm2_int8_onnx": smollm2_int8_onnx,
    "minilm_int8_static_onnx": minilm_int8_static_onnx,
    "program_call": program_call,
    "split_outliers_2752": lambda: split_outliers(0, 2752),
    "split_outliers_11008": lambda: split_outliers(0, 11008),
    "split_outliers_11008_1e30": lambda: split_outliers(1e30, 11008),
    "trainer_start": trainer_start,
    "eager_training": eager_training,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, help="measure one case once, in this process, and print it")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    if options.case:
        import torch

        torch.set_num_threads(1)
        print(json.dumps(CASES[options.case]()))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    for _ in range(REPEATS):  # interleaved, so that a busy minute is in no case alone
        for name, found in runs.items():
            command = [sys.executable, "-m", "benchmarks.compile_time", "--case", name]
            done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    path = HERE / "results" / "compile_time.json"
    rows = json.loads(path.read_text())["cases"] if path.exists() else {}
    for name, found in runs.items():
        medians = {key: statistics.median(run[key] for run in found) for key in found[0]}
        missed = [key for key, bound in BOUNDS.get(name, {}).items() if medians[key] > bound]
        rows[name] = {**medians, "bounds": BOUNDS.get(name, {}), "missed": missed}
        print(
            name,
            {key: round(value, 2) for key, value in medians.items()},
            f"missed: {missed}" if missed else "",
        )
    path.write_text(json.dumps({"cases": rows, "repeats": REPEATS, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
