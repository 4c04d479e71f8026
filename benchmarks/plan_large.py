"""bg.plan of a Llama-70B shape on 1,024 ranks: seconds and memory that planning takes. `python -m benchmarks.plan_large`.

Writes results/plan_large.json. `--layers N` plans a model of that shape with fewer layers.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch

RESULT = Path(__file__).parent / "results" / "plan_large.json"
SHAPE = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
ROWS, TOKENS, RANKS = 1024, 4096, 1024


def main() -> None:
    """Plan once, print the table and write what it took."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--layers", type=int, default=80)
    layers = options.parse_args().layers
    begin, busy = time.perf_counter(), time.process_time()
    from transformers import LlamaConfig, LlamaForCausalLM

    import bmgraph as bg
    from bmgraph.backends import AdamW, Torch
    from bmgraph.passes import Remat, ZeRO

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SHAPE))
    imported = time.perf_counter() - begin
    names = ("input_ids", "attention_mask", "labels")
    example = {name: torch.zeros(ROWS, TOKENS, dtype=torch.long, device="meta") for name in names}
    backend = Torch(optimizer=AdamW(lr=1e-4), clip_norm=1.0)
    plan = bg.plan(model, [Remat("layers"), ZeRO(3)], example=example, backend=backend, world_size=RANKS)
    found = {
        "model": f"Llama of {layers} layers, {sum(item.numel() for item in model.parameters()) / 1e9:.1f}e9 parameters",
        "ranks": RANKS,
        "tokens of a rank": ROWS // RANKS * TOKENS,
        "seconds": round(time.perf_counter() - begin, 1),
        "seconds of importing and making the model": round(imported, 1),
        "CPU seconds": round(time.process_time() - busy, 1),
        "peak RSS in GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "plan": str(plan).splitlines(),
    }
    print(json.dumps(found, indent=2))
    if layers == 80:
        RESULT.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
