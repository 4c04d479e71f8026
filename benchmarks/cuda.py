"""Training a 1B-class Llama shape on one CUDA device in bf16: bmgraph against eager PyTorch and torch.compile.

Each arm is a process of its own, one after the other, since the device is nobody else's: 3 steps to warm up, then the median
of the rest. Peers hold the same numbers: parameters, activations and gradients in bf16, fp32 masters and moments, fused AdamW.
On another machine `--device cpu --layers 2 --width 256 --vocabulary 1000` tries the script.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bmgraph.ir.pass_record import machine

HERE = Path(__file__).parent
ARMS = ("eager", "compile", "bmgraph", "bmgraph_remat", "bmgraph_compile", "bmgraph_zero3_compile")
RATE, SEED, WARM = 1e-4, 0, 3
Step = Callable[[int], float]


def model(options: argparse.Namespace) -> Any:
    """A Llama with random weights, by default of Llama 3.2 1B's shape with a vocabulary of 32,768, on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    width = options.width
    config = LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=options.layers, num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256), vocab_size=options.vocabulary, max_position_embeddings=8192,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    with torch.device(options.device):
        return LlamaForCausalLM(config)


def batch(options: argparse.Namespace, index: int) -> dict[str, Any]:
    """Token ids and labels i64[rows, tokens]."""
    import torch

    generator = torch.Generator().manual_seed(1000 + index)
    ids = torch.randint(0, options.vocabulary, (options.rows, options.tokens), generator=generator)
    ids = ids.to(options.device)
    return {"input_ids": ids, "labels": ids}


def bmgraph_arm(options: argparse.Namespace, arm: str) -> Step:
    import bmgraph as bg
    from bmgraph.backends import AdamW, Torch
    from bmgraph.passes import Remat, ZeRO

    passes: list[Any] = [Remat("layers")] if "remat" in arm else []
    if "zero3" in arm:
        passes.append(ZeRO(3, prefetch=1))
    rule = AdamW(lr=RATE, weight_decay=0.1, no_decay=False)
    backend = Torch(optimizer=rule, precision="bf16", torch_compile="compile" in arm)
    trainer: Any = bg.compile(model(options), passes=passes, example=batch(options, 0), backend=backend)
    print(json.dumps(trainer.report.seconds), file=sys.stderr)

    def step(index: int) -> float:
        loss = float(trainer.step(batch(options, index)).loss)
        if trainer.regions is not None and index == 1:
            found = trainer.regions
            told = {
                "places": found.places,
                "structures": len(found.by_structure),
                "kept apart": found.kept_apart,
            }
            print(json.dumps(told | {"failed": found.failed}), file=sys.stderr)
        return loss

    return step


def plain_arm(options: argparse.Namespace, arm: str) -> Step:
    """bf16 parameters, fp32 masters, fused AdamW on the masters."""
    import torch

    net = model(options)
    masters = [parameter.detach().clone() for parameter in net.parameters()]
    net.to(torch.bfloat16)
    values = [parameter.data for parameter in net.parameters()]
    rule = torch.optim.AdamW(masters, lr=RATE, weight_decay=0.1, fused=True)
    called = torch.compile(net) if arm == "compile" else net

    def step(index: int) -> float:
        loss = called(**batch(options, index)).loss
        loss.backward()
        for master, parameter in zip(masters, net.parameters()):
            master.grad, parameter.grad = parameter.grad.float(), None  # type: ignore[union-attr]
        rule.step()
        torch._foreach_copy_(values, masters)
        for master in masters:
            master.grad = None
        return float(loss.detach())

    return step


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one arm, in this process."""
    import torch
    import torch.distributed as dist

    cuda = options.device == "cuda"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("nccl" if cuda else "gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    began = time.perf_counter()
    step = (bmgraph_arm if options.arm.startswith("bmgraph") else plain_arm)(options, options.arm)
    built = time.perf_counter() - began
    times, losses, peak = [], [], 0
    for index in range(options.steps):
        if cuda and index == WARM:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        losses.append(step(index))  # reads the loss, so waits for the device
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    if cuda:
        peak = torch.cuda.max_memory_allocated()
    if options.profile:
        with torch.profiler.profile() as seen:
            step(0)
        by = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        print(seen.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60), file=sys.stderr)
    dist.destroy_process_group()
    median = statistics.median(times[WARM:])
    return {
        "tokens_per_s": options.rows * options.tokens / median, "step_s": [round(value, 4) for value in times],
        "build_s": built, "peak_gb": peak / 1e9, "losses": losses,
        "device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    for name, default in (
        ("layers", 16),
        ("width", 2048),
        ("vocabulary", 32768),
        ("rows", 8),
        ("tokens", 1024),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--arms", default=",".join(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--profile", action="store_true", help="print where a step spends its time")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cuda.json")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run(options)))
        return
    found: dict[str, Any] = {}
    for arm in options.arms.split(","):
        command = [sys.executable, "-m", "benchmarks.cuda", *sys.argv[1:], "--arm", arm]
        done = subprocess.run(
            command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True, check=False, env=os.environ
        )
        if done.returncode:
            found[arm] = {"failed": done.returncode}
            continue
        found[arm] = json.loads(done.stdout.splitlines()[-1])
        told = {name: round(found[arm][name], 2) for name in ("tokens_per_s", "peak_gb", "build_s")}
        print(arm, told, [round(value, 4) for value in found[arm]["losses"]], flush=True)
        settings = {
            name: value for name, value in vars(options).items() if name not in ("out", "arm", "profile")
        }
        options.out.write_text(
            json.dumps({"settings": settings, "seed": SEED, "arms": found, "machine": machine()}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
