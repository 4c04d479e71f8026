"""A Llama shape of 1.1B in bf16 within 1 GB of a CUDA device: time of a call, tokens/s and peak memory beside accelerate's offload to the
host, the whole model on the device, and the way to the device alone. `python -m benchmarks.stream_cuda` (about 3 minutes).

Weights are random, and written to a folder of safetensors first, which the system's page cache then holds. Each contestant is a process of its
own, one after the other, since the device is nobody else's: one row of 16 ids (medians of ROUNDS calls behind two), then NEW tokens behind it with a
KV cache (ours by `engine.generate`, peers by `model.generate`). Peak: `torch.cuda.max_memory_allocated` from behind building on, and what torch's
allocator reserved. "floor": the bytes that do not stay, from pinned memory to the device, once. On another machine `--device cpu --layers 2
--width 128` tries the script. Writes results/stream_cuda.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bmgraph.ir.pass_record import machine
from bmgraph.utils.byte_size import bytes_of

HERE = Path(__file__).parent
RESULT = HERE / "results" / "stream_cuda.json"
ARMS = ("whole", "streamed", "streamed_int8", "accelerate", "accelerate_all")
LENGTH, NEW, ROUNDS = 16, 16, 7


def config(options: argparse.Namespace) -> Any:
    """A Llama's, by default of 16 layers of 2,048."""
    from transformers import LlamaConfig

    width = options.width
    return LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=options.layers, num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256), vocab_size=32_000, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip


def ids() -> torch.Tensor:
    """One row of ids."""
    return torch.randint(1, 31_000, (1, LENGTH), generator=torch.Generator().manual_seed(0))


def write_weights(options: argparse.Namespace) -> None:
    """A model with random weights as a folder."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(options.device):
        model = LlamaForCausalLM(config(options)).to(torch.bfloat16)
    model.save_pretrained(options.folder, max_shard_size="50GB")


def streamed(options: argparse.Namespace, passes: list[Any]) -> dict[str, Any]:
    """Ours."""
    from transformers import LlamaForCausalLM

    import bmgraph as bg
    from bmgraph.backends import Torch
    from bmgraph.passes import Stream

    with torch.device("meta"):
        model = LlamaForCausalLM(config(options)).to(torch.bfloat16).eval()
    model.config.use_cache = False
    batch = {"input_ids": ids(), "attention_mask": torch.ones_like(ids())}
    begin = time.perf_counter()
    engine: Any = bg.compile(
        model, [*passes, Stream(options.memory)], example=batch, weights=options.folder,
        backend=Torch(generate=True, devices=options.device), verify=options.verify,
    )  # fmt: skip
    compiled = time.perf_counter() - begin
    prompt = [ids()[0].tolist()]
    schedule = engine.schedule(**batch)
    print(schedule.summary(), file=sys.stderr)

    def call() -> torch.Tensor:
        return engine(**batch)["logits"][:, -1]  # type: ignore[no-any-return]

    found = measured(options, call, lambda: engine.generate(prompt, max_new_tokens=NEW, eos=()))
    return found | {
        "compile_s": compiled,
        "limit": schedule.limit,
        "read_a_call": schedule.read,
        "stay": schedule.staying,
    }


def peer(options: argparse.Namespace, arm: str) -> dict[str, Any]:
    """The model whole on the device, or with accelerate's hooks: layers that do not fit within the limit, or all, on the host."""
    from transformers import LlamaForCausalLM

    where: dict[str, Any] = {"device_map": options.device}
    if arm == "accelerate":
        where = {"device_map": "auto", "max_memory": {0: bytes_of(options.memory), "cpu": 10**11}}
    if arm == "accelerate_all":
        where = {}
    model = LlamaForCausalLM.from_pretrained(options.folder, dtype=torch.bfloat16, **where).eval()
    if arm == "accelerate_all":
        from accelerate import cpu_offload

        cpu_offload(model, execution_device=torch.device(options.device))
    given = ids().to(options.device)

    def call() -> torch.Tensor:
        return model(input_ids=given, use_cache=False).logits[:, -1]  # type: ignore[no-any-return]

    return measured(
        options, call,
        lambda: model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False),
    )  # fmt: skip


def measured(
    options: argparse.Namespace, call: Callable[[], torch.Tensor], generate: Callable[[], Any]
) -> dict[str, Any]:
    """Times and peaks of both."""
    cuda = options.device != "cpu"

    def timed(function: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        with torch.no_grad():
            function()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    first = timed(call)
    timed(call)
    calls = [timed(call) for _ in range(ROUNDS)]
    timed(generate)
    generated = [timed(generate) for _ in range(3)]
    with torch.no_grad():
        logits = call().float().cpu()
    torch.save(logits, Path(options.folder) / f"{options.arm}.pt")
    return {
        "first_call_s": first,
        "call_s": statistics.median(calls),
        "tokens_a_second": NEW / statistics.median(generated),
        "peak": torch.cuda.max_memory_allocated() if cuda else 0,
        "reserved": torch.cuda.max_memory_reserved() if cuda else 0,
    }


def way(options: argparse.Namespace) -> float:
    """Bytes a second from pinned memory to the device."""
    source = torch.empty(2**28, dtype=torch.uint8, pin_memory=options.device != "cpu")
    into = torch.empty_like(source, device=options.device)
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        into.copy_(source, non_blocking=True)
        if options.device != "cpu":
            torch.cuda.synchronize()
        found.append(len(source) / (time.perf_counter() - begin))
    return statistics.median(found)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One contestant, in this process."""
    if options.arm.startswith("streamed"):
        from bmgraph.passes import Quantize

        return streamed(
            options, [Quantize("int8", activations="none")] if options.arm == "streamed_int8" else []
        )
    return peer(options, options.arm)


def main() -> None:
    """Write the weights, run the contestants, compare and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--memory", default="1000MB")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--folder", default="")
    parser.add_argument("--arm", default="")
    parser.add_argument("--verify", default="numeric")
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--out", default=str(RESULT))
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run(options)))
        return
    with tempfile.TemporaryDirectory() as made:
        options.folder = options.folder or made
        write_weights(options)
        names = ["folder", "device", "memory", "layers", "width", "verify"]
        given = [text for name in names for text in (f"--{name}", str(getattr(options, name)))]
        arms: dict[str, Any] = {}
        for arm in options.arms:
            command = [sys.executable, "-m", "benchmarks.stream_cuda", "--arm", arm, *given]
            done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, check=False)
            print(done.stderr[-1500:], file=sys.stderr)
            arms[arm] = (
                json.loads(done.stdout.splitlines()[-1])
                if done.returncode == 0
                else {"failed": done.stderr[-300:]}
            )
            print(arm, arms[arm], flush=True)
        logits = {
            arm: torch.load(Path(options.folder) / f"{arm}.pt", weights_only=True)
            for arm in arms
            if "call_s" in arms[arm]
        }
    result: dict[str, Any] = {
        "shape": {"layers": options.layers, "width": options.width},
        "memory": options.memory,
        "arms": arms,
    }
    result["bytes_a_second_to_the_device"] = way(options)
    if "whole" in logits:
        whole = logits["whole"]
        result["logits_off"] = {
            arm: float((item - whole).norm() / whole.norm()) for arm, item in logits.items()
        }
    if "call_s" in arms.get("streamed", {}):
        own = arms["streamed"]
        result["floor_s"] = own["read_a_call"] / result["bytes_a_second_to_the_device"]
        result["accelerate_over_ours"] = {
            arm: {"call": arms[arm]["call_s"] / own["call_s"], "tokens": own["tokens_a_second"] / arms[arm]["tokens_a_second"]}
            for arm in ("accelerate", "accelerate_all") if "call_s" in arms.get(arm, {})
        }  # fmt: skip
    device = torch.cuda.get_device_name() if options.device != "cpu" else "cpu"
    Path(options.out).write_text(
        json.dumps({"machine": machine(), "device": device, **result}, indent=1) + "\n"
    )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
