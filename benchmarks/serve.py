"""`bmgraph serve` with SmolLM2-135M in 4 bits: 32 clients of mixed lengths against one at a time, over HTTP, streamed.

Each level of concurrency answers the same requests (ids as prompts, greedy, with as many new tokens as asked for); levels take turns,
round by round. The server and the clients share the machine. It keeps nothing of prompts that were read, since the same come in each round
(`--prefixes 500MB` lets it). With `--llama-server PATH`, a built one of llama.cpp, that answers the same requests of the most clients in
turn with ours, on as many threads, with weights of as many bits that were made of the same fp32 ones. Writes results/serve.json and prints a table. With `--soak MINUTES` the most clients then go on that long, a
fifth of them leaving in the middle of an answer, and the memory of the server is sampled.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import decode_models
from benchmarks.contestant import versions
from bmgraph.ir.pass_record import machine

HERE = Path(__file__).parent
PROMPTS, NEW = (16, 224), (16, 128)
"""The fewest and the most tokens of a prompt and of an answer."""

INT4 = "quantize{scheme=int4,method=gptq,group=128,embeddings=8}"


@dataclass
class Measured:
    """Times of the answers of one level in one round, in seconds."""

    wall: float = 0.0
    new: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


def served(folder: Path) -> Path:
    """The engine with its tokenizer, as `bmgraph serve` takes it."""
    out = folder / "served-int4"
    if not out.exists():
        from transformers import AutoTokenizer

        import bmgraph as bg
        from bmgraph.runtime.generation.tokenizer import tokenizer_of

        _, rows = decode_models.texts(folder)
        engine = bg.load(decode_models.ours(folder, "int4", INT4, rows[: decode_models.CALIBRATION]))
        engine.tokenizer = tokenizer_of(
            AutoTokenizer.from_pretrained(str(decode_models.hugging_face(folder)))
        )
        engine.save(out)
    return out


def workload(folder: Path, count: int) -> list[dict[str, Any]]:
    """Bodies of requests with prompts of WikiText-2's training text."""
    _, rows = decode_models.texts(folder)
    draw = random.Random(0)
    found = []
    for _ in range(count):
        new = draw.randint(*NEW)
        prompt = draw.choice(rows[decode_models.CALIBRATION :])[: draw.randint(*PROMPTS)]
        found.append({
            "model": "smollm2", "prompt": prompt, "max_tokens": new, "min_tokens": new, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        })  # fmt: skip
    return found


async def answered(
    host: str, port: int, body: dict[str, Any], into: Measured, leave_after: int | None = None
) -> None:
    """One streamed request on a connection of its own; the client leaves after so many pieces."""
    sent = json.dumps(body).encode()
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Length: {len(sent)}\r\n\r\n"
    writer.write(head.encode() + sent)
    status = await reader.readline()
    assert b" 200 " in status, status
    last, pieces = None, 0
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event.get("usage"):
            into.new += event["usage"]["completion_tokens"]
            assert event["usage"]["completion_tokens"] == body["max_tokens"], event
        elif event["choices"][0]["text"]:
            now = time.perf_counter()
            (into.first if last is None else into.between).append(now - (begin if last is None else last))
            last, pieces = now, pieces + 1
            if pieces == leave_after:
                break
    writer.close()


async def level(host: str, port: int, bodies: Sequence[dict[str, Any]], clients: int) -> Measured:
    """All requests, `clients` at a time."""
    found, waiting = Measured(), list(reversed(bodies))

    async def client() -> None:
        while waiting:
            await answered(host, port, waiting.pop(), found)

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    found.wall = time.perf_counter() - begin
    return found


async def soak(
    host: str, port: int, bodies: Sequence[dict[str, Any]], clients: int, seconds: float, process: int
) -> dict[str, Any]:
    """Requests without end for so many seconds; the memory of the server in MiB, each 5 s."""
    found, memory, draw, end = Measured(), [], random.Random(1), time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            leaves = draw.randint(1, 10) if draw.random() < 0.2 else None
            await answered(host, port, draw.choice(bodies), found, leaves)

    async def watch() -> None:
        while time.perf_counter() < end:
            status = Path(f"/proc/{process}/status").read_text().splitlines()
            memory.append(int(next(line for line in status if line.startswith("VmRSS")).split()[1]) // 1024)
            await asyncio.sleep(5)

    await asyncio.gather(watch(), *(client() for _ in range(clients)))
    return {"seconds": seconds, "new_tokens_of_whole_answers": found.new, "resident_mib": memory}


def started(bundle: Path, rows: int, prefill: int, prefixes: str, wide: bool) -> tuple[Any, str, int]:
    """The server's process, and where it listens."""
    command = [
        sys.executable, "-m", "bmgraph", "serve", str(bundle), "--port", "0", "--name", "smollm2", "--rows", str(rows),
        "--prefill", str(prefill), "--prefixes", prefixes, "--wide" if wide else "--no-wide",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    where = re.search(r"http://([^:]+):(\d+)", process.stdout.readline())
    assert where is not None, "the server did not start: run the command by hand"
    return process, where[1], int(where[2])


def llama_started(program: Path, model: Path, rows: int) -> tuple[Any, str, int]:
    """As `started`, of llama.cpp's server, which keeps nothing of prompts either."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads, most = str(len(os.sched_getaffinity(0))), rows * (PROMPTS[1] + NEW[1])
    command = [
        str(program), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-t", threads, "-tb", threads, "-np", str(rows),
        "-c", str(most), "--no-cache-prompt", "--cache-ram", "0",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.perf_counter() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                if answer.status == 200:
                    return process, "127.0.0.1", port
        except OSError:
            pass
        assert process.poll() is None, "llama.cpp's server did not start: run the command by hand"
        assert time.perf_counter() < end, "llama.cpp's server took more than a minute to start"
        time.sleep(0.1)


def percentile(values: Sequence[float], share: float) -> float:
    """A percentile in milliseconds."""
    return 1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))]


def summary(rounds: Sequence[Measured]) -> dict[str, Any]:
    """Medians over rounds of tokens per second, and percentiles over all answers."""
    first = [value for item in rounds for value in item.first]
    between = [value for item in rounds for value in item.between]
    return {
        "tokens_per_second": statistics.median(item.new / item.wall for item in rounds),
        "first_token_ms": {"p50": percentile(first, 0.5), "p99": percentile(first, 0.99)},
        "between_tokens_ms": {"p50": percentile(between, 0.5), "p99": percentile(between, 0.99)},
        "rounds": [{"wall_s": item.wall, "new_tokens": item.new} for item in rounds],
    }


def main() -> None:
    """Run all levels and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--prefill", type=int, default=256)
    parser.add_argument(
        "--prefixes", default="0", help='what the server keeps of texts that it read; "" for its default'
    )
    parser.add_argument("--no-wide", action="store_true", help="one form of weights for all steps")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server, to be measured beside ours")
    parser.add_argument("--soak", type=float, default=0, help="minutes of a soak behind the rounds")
    parser.add_argument(
        "--work", type=Path, default=decode_models.assets.CACHE / "decode", help="where models are kept"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "serve.json")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    bundle, bodies = served(options.work), workload(options.work, options.requests)
    most = max(options.clients)
    process, host, port = started(bundle, most, options.prefill, options.prefixes, not options.no_wide)
    other = None
    theirs: list[Measured] = []
    their_bodies = [{**body, "ignore_eos": True} for body in bodies]
    found: dict[int, list[Measured]] = {clients: [] for clients in options.clients}
    try:
        if options.llama_server is not None:
            model = decode_models.llama_as_ours(options.work)
            other, *where = llama_started(options.llama_server, model, most)
            asyncio.run(level(*where, their_bodies[:4], 2))
        asyncio.run(level(host, port, bodies[:4], 2))  # warm
        for number in range(options.rounds):
            for clients in options.clients:
                found[clients].append(asyncio.run(level(host, port, bodies, clients)))
                item = found[clients][-1]
                print(f"round {number}: {clients} clients {item.new / item.wall:.0f} tokens/s", flush=True)
            if other is not None:
                theirs.append(asyncio.run(level(*where, their_bodies, most)))
                item = theirs[-1]
                print(
                    f"round {number}: llama.cpp, {most} clients {item.new / item.wall:.0f} tokens/s",
                    flush=True,
                )
        lasting = None
        if options.soak:
            lasting = asyncio.run(
                soak(host, port, bodies, max(options.clients), 60 * options.soak, process.pid)
            )
            print(f"soak: resident MiB {lasting['resident_mib']}", flush=True)
    finally:
        if other is not None:
            other.terminate()
            other.wait(60)
        process.terminate()
        code = process.wait(60)
    assert code == 0, code
    results = {
        "machine": machine(), "versions": versions(("bmgraph", "onnxruntime", "onnxruntime-gpu", "starlette", "uvicorn")),
        "requests": {"count": len(bodies), "prompt_tokens": PROMPTS, "new_tokens": NEW}, "prefill": options.prefill,
        "prefixes": options.prefixes, "wide": not options.no_wide,
        "clients": {str(clients): summary(rounds) for clients, rounds in found.items()},
    }  # fmt: skip
    if lasting is not None:
        results["soak"] = lasting
    lowest = options.clients[0]
    results["over_one"] = {
        str(clients): statistics.median(
            (mine.new / mine.wall) / (one.new / one.wall) for mine, one in zip(rounds, found[lowest])
        )
        for clients, rounds in found.items()
    }
    if theirs:
        results["llama.cpp"] = {
            "clients": most, **summary(theirs), "bytes_of_weights": model.stat().st_size,
            "our_bytes_of_weights": (bundle / "model.onnx.data").stat().st_size,
            "ours_over_it": statistics.median((mine.new / mine.wall) / (its.new / its.wall) for mine, its in zip(found[most], theirs)),
        }  # fmt: skip
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(
        f"| clients | tokens/s | over {lowest} | first token p50 / p99, ms | between tokens p50 / p99, ms |\n|---|---|---|---|---|"
    )
    shown = {**results["clients"], **({"llama.cpp": results["llama.cpp"]} if theirs else {})}
    for name, item in shown.items():
        first, between = item["first_token_ms"], item["between_tokens_ms"]
        print(
            f"| {name} | {item['tokens_per_second']:.0f} | {results['over_one'].get(name, 0):.2f} | {first['p50']:.0f} / {first['p99']:.0f} | "
            f"{between['p50']:.1f} / {between['p99']:.1f} |"
        )


if __name__ == "__main__":
    main()
