"""Training SmolLM2-135M's shape on two gloo ranks: bmgraph's ZeRO-3 against DDP, FSDP2 and DeepSpeed.

Each arm has two processes of its own, with one thread each. All arms take turns step by step, so that ratios stay valid when
the machine's speed drifts; the parent samples the resident memory of every process every 10 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent
RANKS, TOKENS, RATE, SEED = 2, 256, 1e-4, 0
ARMS = ("head", "compiled", "zero3", "ddp", "fsdp2", "deepspeed")
"""ours with ParallelHead, the same with torch_compile=True, ours without ParallelHead, and the others."""

Step = Callable[[int], float]
"""Takes the number of a step and returns the mean loss over all ranks."""


def model(layers: int) -> Any:
    """A Llama of SmolLM2-135M's shape with random weights, the same on all ranks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def whole_batch(step: int) -> dict[str, Any]:
    """Token ids and labels i64[ranks, tokens]: a row for each rank."""
    import torch

    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, 49152, (RANKS, TOKENS), generator=generator)
    return {"input_ids": ids, "labels": ids}


def bmgraph_arm(rank: int, layers: int, options: str, profile: bool) -> Step:
    """`options`: the passes, by their text form."""
    import bmgraph as bg
    from bmgraph.backends import AdamW, Torch
    from bmgraph.passes import Remat, ZeRO

    passes: list[Any] = [Remat("auto"), ZeRO(stage=3, prefetch=1)]
    if options in ("head", "compiled"):
        from bmgraph.passes import ParallelHead

        passes.append(ParallelHead())
    saved = os.environ.get("BMGRAPH_PROGRAM")  # while developing: the program of a run before
    source = bg.load(saved) if saved else model(layers)
    trainer: Any = bg.compile(
        source, passes=passes, example=None if saved else whole_batch(0), verify="structure" if saved else "numeric",
        backend=Torch(optimizer=AdamW(lr=RATE, weight_decay=0.1, no_decay=False), optimizer_in_backward=True,
            torch_compile=options == "compiled"),
    )  # fmt: skip
    if rank == 0:
        print(json.dumps(trainer.report.seconds), file=sys.stderr)

    def step(index: int) -> float:
        return float(trainer.step(whole_batch(index)).loss)

    if not profile:
        return step

    def profiled(index: int) -> float:
        if index != 3:
            return step(index)
        import torch

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            loss = step(index)
        if rank == 0:
            table = seen.key_averages().table(
                sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60
            )
            print(table, file=sys.stderr)
        return loss

    return profiled


def own_rows(index: int, rank: int) -> dict[str, Any]:
    return {name: value[rank : rank + 1] for name, value in whole_batch(index).items()}


def _mean_over_ranks(loss: Any) -> float:
    import torch.distributed as dist

    value = loss.detach().clone()
    dist.all_reduce(value)
    return float(value) / RANKS


def _plain_steps(net: Any, rule: Any, rank: int) -> Step:
    def step(index: int) -> float:
        rule.zero_grad(set_to_none=True)
        loss = net(**own_rows(index, rank)).loss
        loss.backward()
        rule.step()
        return _mean_over_ranks(loss)

    return step


def ddp_arm(rank: int, layers: int) -> Step:
    """DistributedDataParallel with gradients as views of its buckets, fused AdamW."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    net = DistributedDataParallel(model(layers), gradient_as_bucket_view=True)
    rule = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.1, fused=True)
    return _plain_steps(net, rule, rank)


def fsdp2_arm(rank: int, layers: int) -> Step:
    """`fully_shard` of each layer and of the whole (ZeRO-3), fused AdamW."""
    import torch
    from torch.distributed.fsdp import fully_shard

    net = model(layers)
    for layer in net.model.layers:
        fully_shard(layer)
    fully_shard(net)
    rule = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.1, fused=True)
    return _plain_steps(net, rule, rank)


def deepspeed_arm(rank: int, layers: int) -> Step:
    """DeepSpeed ZeRO-3 with its own AdamW for CPUs where it builds, else torch's."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import torch

    net = model(layers)
    rule = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.1, fused=True)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=net, optimizer=rule, config=settings, dist_init_required=False)

    def step(index: int) -> float:
        loss = engine(**own_rows(index, rank)).loss
        engine.backward(loss)
        engine.step()
        return _mean_over_ranks(loss)

    return step


def reference(layers: int, steps: int) -> list[float]:
    """The losses of plain PyTorch in one process on whole batches."""
    import torch

    net = model(layers)
    rule = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.1)
    found = []
    for index in range(steps):
        rule.zero_grad()
        loss = net(**whole_batch(index)).loss
        loss.backward()
        rule.step()
        found.append(loss.item())
    return found


def serve(arm: str, rank: int, port: int, layers: int, profile: bool) -> None:
    """One rank of one arm: answers every line on stdin, the number of a step, with seconds, CPU seconds and the loss."""
    import torch
    import torch.distributed as dist

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS, timeout=timedelta(minutes=20)
    )
    import transformers  # noqa: F401

    print(json.dumps({"imported": True}), file=answers, flush=True)
    begin, cpu = time.perf_counter(), time.process_time()
    makers: dict[str, Callable[[], Step]] = {
        "ddp": lambda: ddp_arm(rank, layers),
        "fsdp2": lambda: fsdp2_arm(rank, layers),
        "deepspeed": lambda: deepspeed_arm(rank, layers),
    }
    step = makers.get(arm, lambda: bmgraph_arm(rank, layers, arm, profile))()
    told = {"start_s": time.perf_counter() - begin, "start_cpu_s": time.process_time() - cpu}
    print(json.dumps(told), file=answers, flush=True)
    for line in sys.stdin:
        begin, cpu = time.perf_counter(), time.process_time()
        loss = step(int(line))
        told = {"s": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu, "loss": loss}
        print(json.dumps(told), file=answers, flush=True)
    os._exit(0)


@dataclass
class Arm:
    """The processes of an arm, and what was measured of them."""

    name: str
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    steps: list[list[dict[str, float]]] = field(default_factory=list)
    start_s: float = 0.0
    start_cpu_s: float = 0.0
    imported_mb: float = 0.0
    load_peak_mb: float = 0.0
    peak_mb: list[float] = field(default_factory=lambda: [0.0] * RANKS)
    """The peak of each rank since `reset`."""

    def start(self, layers: int, profile: bool) -> None:
        """Start the ranks, and wait until they are ready for steps."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        for rank in range(RANKS):
            command = [sys.executable, "-m", "benchmarks.training", "--serve", self.name]
            command += ["--rank", str(rank), "--port", str(port), "--layers", str(layers)]
            command += ["--profile"] * profile
            self.processes.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
                )
            )
        self._answers()
        self.imported_mb = max(self.sample())
        self.reset()
        started = self._answers()
        self.start_s = max(answer["start_s"] for answer in started)
        self.start_cpu_s = max(answer["start_cpu_s"] for answer in started)
        self.load_peak_mb = max(self.peak_mb)
        self.reset()

    def reset(self) -> None:
        """Begin a new peak."""
        self.peak_mb = [0.0] * RANKS

    def step(self, index: int) -> None:
        """One step on all ranks."""
        for process in self.processes:
            stdin: IO[str] | None = process.stdin
            assert stdin is not None
            stdin.write(f"{index}\n")
            stdin.flush()
        self.steps.append(self._answers())

    def sample(self) -> list[float]:
        """The resident megabytes of each rank now; keeps the peak."""
        found = [_resident(process.pid) for process in self.processes]
        self.peak_mb = [max(pair) for pair in zip(self.peak_mb, found)] if found else self.peak_mb
        return found

    def _answers(self) -> list[dict[str, float]]:
        found = []
        for process in self.processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"a rank of {self.name} ended with {process.wait()}")
            found.append(json.loads(line))
        return found

    def summary(self, warm: int) -> dict[str, Any]:
        """Medians over the steps after the first ones."""
        kept = self.steps[warm:]
        seconds = [max(rank["s"] for rank in step) for step in kept]
        cpu = [statistics.mean(rank["cpu_s"] for rank in step) for step in kept]
        return {
            "tokens_per_s": RANKS * TOKENS / statistics.median(seconds),
            "step_s": [round(second, 4) for second in seconds],
            "cpu_s_per_rank": statistics.median(cpu),
            "peak_mb": max(self.peak_mb),
            "load_peak_mb": self.load_peak_mb,
            "imported_mb": self.imported_mb,
            "start_s": self.start_s,
            "start_cpu_s": self.start_cpu_s,
            "losses": [step[0]["loss"] for step in self.steps],
        }


def _resident(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(names: list[str], layers: int, rounds: int, warm: int, profile: bool) -> dict[str, Any]:
    """All arms in turn, `rounds` steps each after `warm` ones."""
    arms = [Arm(name) for name in names]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            for arm in arms:
                if len(arm.processes) == RANKS:
                    arm.sample()

    threading.Thread(target=watch, daemon=True).start()
    try:
        for arm in arms:
            arm.start(layers, profile)
            print(
                f"{arm.name}: started in {arm.start_s:.1f} s ({arm.start_cpu_s:.1f} CPU s), peak {arm.load_peak_mb:.0f} MB",
                file=sys.stderr,
            )
        for index in range(warm + rounds):
            for arm in arms:
                arm.step(index)
    finally:
        ended.set()
        for arm in arms:
            for process in arm.processes:
                process.kill()
    return {arm.name: arm.summary(warm) for arm in arms}


def ratios(found: dict[str, Any], other: str) -> dict[str, dict[str, float]]:
    """Of each arm against another: the median of the ratios of each round, and of the peaks."""
    base = found[other]
    return {
        name: {
            "speed": statistics.median(a / b for a, b in zip(base["step_s"], arm["step_s"])),
            "cpu": base["cpu_s_per_rank"] / arm["cpu_s_per_rank"],
            "peak": arm["peak_mb"] / base["peak_mb"],
        }
        for name, arm in found.items()
    }


def main() -> None:
    """Measure the arms that are named, compare, and write results/training.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", default="head,zero3,ddp,fsdp2", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument(
        "--reference", type=int, default=0, help="steps of plain training to compare losses with"
    )
    parser.add_argument("--profile", action="store_true", help="print where our fourth step spends its time")
    parser.add_argument("--out", type=Path, help="the file to write; none without it")
    for hidden in ("--serve", "--rank", "--port"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.serve, int(asked.rank), int(asked.port), asked.layers, asked.profile)
    from bmgraph.ir.pass_record import machine
    from bmgraph.utils.versions import versions

    plain = reference(asked.layers, asked.reference) if asked.reference else []
    names = asked.arms.split(",")
    found = measure(names, asked.layers, asked.rounds, asked.warm, asked.profile)
    for name, arm in found.items():
        errors = [abs(a - b) / abs(b) for a, b in zip(arm["losses"], plain)]
        arm["loss_error"] = max(errors, default=None)
        print(
            f"{name:10} {arm['tokens_per_s']:7.1f} tokens/s  cpu {arm['cpu_s_per_rank']:.2f} s  peak {arm['peak_mb']:.0f} MB"
            f"  load {arm['load_peak_mb']:.0f} MB  start {arm['start_s']:.1f} s ({arm['start_cpu_s']:.1f} CPU s)  loss error {arm['loss_error']}"
        )
    told = {"against": {other: ratios(found, other) for other in ("fsdp2", "ddp") if other in found}}
    for other, rows in told["against"].items():
        for name, row in rows.items():
            print(
                f"{name:10} against {other}: speed {row['speed']:.2f}, cpu {row['cpu']:.2f}, peak {row['peak']:.2f}"
            )
    if asked.out:
        about = {
            "machine": machine(),
            "versions": versions(),
            "seed": SEED,
            "layers": asked.layers,
            "ranks": RANKS,
        }
        about |= {"tokens_per_rank": TOKENS, "rounds": asked.rounds, "warm": asked.warm}
        asked.out.write_text(json.dumps({**about, "arms": found, **told}, indent=1) + "\n")


if __name__ == "__main__":
    main()
