"""Decoding on a CUDA device: tokens/s of `Torch(generate=True)` beside transformers, for Llama shapes in bf16 with random weights.
`python -m benchmarks.decode_cuda` (about 3 minutes).

For each shape and number of rows: NEW greedy tokens behind LENGTH, medians of ROUNDS interleaved runs behind one. Ours: steps recorded as CUDA
graphs, the same engine call by call, and with `--compiled` one of `torch_compile=True` (some minutes more). Peers: `model.generate` as it is, and with a static cache, which transformers
compiles (`--peers eager`: without that one). "of_floor": the time that reading all weights of a step takes at the speed of a copy on the device,
as a part of a step's time. Where the ids of two differ, "apart" says from which token on: kernels differ, and bf16 has ties. Writes
results/decode_cuda.json. On another machine `--device cpu --shapes tiny` tries the script.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bmgraph.ir.pass_record import machine

RESULT = Path(__file__).parent / "results" / "decode_cuda.json"
SHAPES = {
    "tiny": (64, 256, 2, 4, 2, 1000),
    "135M": (576, 1536, 30, 9, 3, 49_152),
    "1.0B": (2048, 8192, 16, 32, 8, 32_000),
}
"""Width, feed-forward, layers, heads, key heads, ids."""
ROWS = (1, 8, 32)
LENGTH, NEW, ROUNDS = 128, 128, 3

Generate = Callable[[torch.Tensor], list[list[int]]]


def model_of(shape: str, device: str) -> Any:
    """A Llama with random weights in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, hidden, layers, heads, groups, ids = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=groups, vocab_size=ids, max_position_embeddings=2048, tie_word_embeddings=True,
            )
        )  # fmt: skip
    return model.to(torch.bfloat16).eval()


def ours(model: Any, device: str, compiled: bool) -> Any:
    """The engine."""
    import bmgraph as bg
    from bmgraph.backends import Torch

    model.config.use_cache = False
    ids = torch.ones(2, 16, dtype=torch.int64, device=device)
    begin = time.perf_counter()
    engine = bg.compile(
        model, example={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, verify="off",
        backend=Torch(generate=True, torch_compile=compiled),
    )  # fmt: skip
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    model.config.use_cache = True
    return engine


def contestants(model: Any, options: argparse.Namespace) -> dict[str, Generate]:
    """What generates NEW tokens behind rows of ids."""

    def engine_runs(engine: Any, recorded: bool) -> Generate:
        decoder = engine.decoder()
        fixed = decoder.steps and decoder.steps.fixed

        def run(ids: torch.Tensor) -> list[list[int]]:
            if decoder.steps:
                decoder.steps.fixed = fixed if recorded else None
            return engine.generate(ids.tolist(), max_new_tokens=NEW, eos=())  # type: ignore[no-any-return]

        return run

    def peer(cache: str | None) -> Generate:
        def run(ids: torch.Tensor) -> list[list[int]]:
            more = {} if cache is None else {"cache_implementation": cache}
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                pad_token_id=0, **more,
            )  # fmt: skip
            return made[:, LENGTH:].tolist()  # type: ignore[no-any-return]

        return run

    plain = ours(model, options.device, False)
    found = {"recorded": engine_runs(plain, True), "call by call": engine_runs(plain, False)}
    if options.compiled:
        found["recorded, torch_compile"] = engine_runs(ours(model, options.device, True), True)
    if "eager" in options.peers:
        found["transformers"] = peer(None)
    if "static" in options.peers:
        found["transformers, static cache"] = peer("static")
    return found


def bytes_a_second(device: str) -> float:
    """Bytes that a copy on the device reads in a second, as many as it writes."""
    source = torch.empty(2**30 if device != "cpu" else 2**26, dtype=torch.uint8, device=device)
    into = torch.empty_like(source)
    found = []
    for _ in range(6):
        wait(device)
        begin = time.perf_counter()
        into.copy_(source)
        wait(device)
        found.append(2 * len(source) / (time.perf_counter() - begin))
    return statistics.median(found)


def wait(device: str) -> None:
    """Until the device is done."""
    if device != "cpu":
        torch.cuda.synchronize()


def measure(shape: str, options: argparse.Namespace, speed: float) -> Iterator[dict[str, Any]]:
    """All contestants on one shape: what is known after each number of rows."""
    model = model_of(shape, options.device)
    weights = sum(tensor.nbytes for tensor in {id(item): item for item in model.parameters()}.values())
    runs, found = contestants(model, options), {}
    for rows in options.rows:
        generator = torch.Generator().manual_seed(rows)
        ids = torch.randint(5, SHAPES[shape][5] - 5, (rows, LENGTH), generator=generator).to(options.device)
        times: dict[str, list[float]] = {}
        texts: dict[str, list[list[int]]] = {}
        first: dict[str, float] = {}
        for number in range(options.rounds + 1):
            for name, run in list(runs.items()):
                wait(options.device)
                begin = time.perf_counter()
                try:
                    texts[name] = run(ids)
                except Exception as error:
                    print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                    del runs[name]
                    continue
                wait(options.device)
                took = time.perf_counter() - begin
                if number:
                    times.setdefault(name, []).append(took)
                else:
                    first[name] = took
        medians = {name: statistics.median(item) for name, item in times.items()}
        own = texts["recorded"]
        found[str(rows)] = {
            name: {
                "tokens_a_second": rows * NEW / took,
                "first_run_s": first[name],
                "of_floor": weights / speed * NEW / took,
                "ours_over_this": took / medians["recorded"],
                "apart": [next((at for at, pair in enumerate(zip(*both)) if pair[0] != pair[1]), NEW) for both in zip(own, texts[name])][:4],
            }
            for name, took in medians.items()
        }  # fmt: skip
        print(shape, rows, json.dumps(found[str(rows)]), flush=True)
        yield {"weights_bytes": weights, "rows": found}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shapes", nargs="*", default=["135M", "1.0B"], choices=SHAPES)
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--peers", nargs="*", default=["eager", "static"])
    parser.add_argument("--compiled", action="store_true", help="measure torch_compile=True too")
    parser.add_argument("--out", default=str(RESULT))
    options = parser.parse_args()
    speed = bytes_a_second(options.device)
    result: dict[str, Any] = {
        "machine": machine(),
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu",
        "bytes_a_second": speed,
        "tokens": {"prompt": LENGTH, "new": NEW},
        "rounds": options.rounds,
        "shapes": {},
    }
    for shape in options.shapes:
        for found in measure(shape, options, speed):
            result["shapes"][shape] = found
            Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
