"""Train a LoRA on an int8 language model, sharded over ranks: torchrun --nproc-per-node 2 -m examples.two_tasks.train trec"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

import bmgraph as bg
from bmgraph.backends import AdamW, Linear, Torch
from bmgraph.passes import LoRA, Quantize, ZeRO
from examples.two_tasks.model import language_model
from examples.two_tasks.tasks import batch, task


def main() -> None:
    """Train, then write the adapter and the losses and time of the training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("trec", "sms"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=16, help="rows of the global batch")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
    lead = not dist.is_initialized() or dist.get_rank() == 0

    source, job = language_model(), task(options.task)
    trainer = bg.compile(
        source.model,
        passes=[Quantize("int8", activations="none"), LoRA(r=8, alpha=16)],
        example=batch(source.tokenizer, job, job.items[:4]),
        backend=Torch(
            optimizer=AdamW(lr=options.lr, weight_decay=0.0),
            schedule=Linear(warmup=options.steps // 10, steps=options.steps),
            clip_norm=1.0,
            passes=(ZeRO(3),),
        ),
    )
    begin, losses = time.perf_counter(), []
    for step in range(options.steps):
        rows = job.items[step * options.rows : (step + 1) * options.rows]
        losses.append(trainer.step(batch(source.tokenizer, job, rows)).loss)
        if lead and (step % 5 == 0 or step == options.steps - 1):
            print(
                f"{job.name} step {step} loss {losses[-1]:.3f} after {time.perf_counter() - begin:.0f} s",
                flush=True,
            )
    trainer.save_delta(options.out)
    if lead:
        summary = {
            "steps": options.steps,
            "rows": options.rows,
            "seconds": time.perf_counter() - begin,
            "losses": losses,
        }
        (options.out.parent / f"{job.name}.json").write_text(json.dumps(summary))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
