"""A Llama-70B shape without weights: time and memory of capture, structure and one pass, for increasing depth."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

from bmgraph.ir.pass_record import machine

HERE = Path(__file__).parent
LAYERS = (10, 20, 40, 80)


def measure(layers: int) -> dict[str, float]:
    """Measure one depth, in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import bmgraph as bg
    from bmgraph.passes import Quantize

    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=layers, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    example = {
        name: torch.zeros(2, 16, dtype=torch.long, device="meta") for name in ("input_ids", "attention_mask")
    }
    times = [time.perf_counter()]
    program = bg.capture(model, example)
    times.append(time.perf_counter())
    structure = program.structure()
    times.append(time.perf_counter())
    small = bg.Pipeline([Quantize("int8", activations="none")]).run(program)
    times.append(time.perf_counter())
    assert len(structure.attentions) == len(structure.feedforwards) == layers
    assert len(small.history[-1].edits) >= 7 * layers
    spent = [later - earlier for earlier, later in pairwise(times)]
    return {
        "capture_s": spent[0], "structure_s": spent[1], "pass_s": spent[2], "total_s": sum(spent),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "parameters": sum(tensor.numel() for tensor in program.parameters.values()), "nodes": len(program.graph.nodes),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, help="measure one depth and print it")
    options = parser.parse_args()
    if options.layers:
        print(json.dumps(measure(options.layers)))
        return
    rows = {}
    for layers in LAYERS:
        command = [sys.executable, "-m", "benchmarks.large", "--layers", str(layers)]
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=True)
        rows[layers] = json.loads(done.stdout.splitlines()[-1])
        print(layers, {name: round(value, 2) for name, value in rows[layers].items()}, flush=True)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "large.json").write_text(
        json.dumps({"layers": rows, "machine": machine()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
