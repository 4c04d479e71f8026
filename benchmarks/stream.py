"""SmolLM2-135M in fp32 within 200 MB: output, anonymous memory, time of cold calls beside the disk's and accelerate's disk offload; and
the plan of a Llama-70B shape in sparse files. `python -m benchmarks.stream` (some minutes; `--folder` keeps the weights).

Each contestant is a process of its own. "Cold": the system's copies of the files are dropped before a call (POSIX_FADV_DONTNEED). The
disk is measured before and after each call by reading the same file whole, in the way that was fastest of several: O_DIRECT with
blocks and threads of different numbers, into huge pages, and reads through the page cache. The next call, behind each cold one, drops
nothing. Memory is RssAnon, sampled every 10 ms in cold calls before the disk is measured, above what the process held before the engine's
first call, and above what it held after its imports, which counts Python's objects of the captured graph, too. Writes results/stream.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from bmgraph.ir.pass_record import machine
from bmgraph.runtime.torch.stream.place import huge_pages

HERE = Path(__file__).parent
RESULT = HERE / "results" / "stream.json"
MEMORY, LENGTH, ROUNDS = "200MB", 16, 9
LARGE_MEMORY = "8GB"
Way = tuple[bool, int, int]
"""Whether past the page cache; threads; bytes of a read."""
WAYS: list[Way] = [
    (True, 1, 4 << 20),
    (True, 4, 1 << 20),
    (True, 4, 4 << 20),
    (True, 8, 16 << 20),
    (False, 2, 4 << 20),
]


def ids() -> torch.Tensor:
    """One row of ids."""
    return torch.randint(49_000, (1, LENGTH), generator=torch.Generator().manual_seed(0))


def write_weights(folder: Path) -> None:
    """SmolLM2 as a folder of safetensors."""
    from safetensors.torch import save_file

    from benchmarks.smollm2 import loaded

    model, _ = loaded()
    state = {
        name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)


def drop_copies(folder: Path) -> None:
    """Let the system forget what it holds of the files of a folder."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def fastest_way(folder: Path) -> Way:
    """The way of reading the weights whole, cold, whose median of three is best."""
    speeds: dict[Way, list[float]] = {way: [] for way in WAYS}
    for _ in range(3):
        for way, found in speeds.items():
            found.append(disk_speed(folder, way))
    return max(WAYS, key=lambda way: statistics.median(speeds[way]))


def disk_speed(folder: Path, way: Way) -> float:
    """Bytes a second of reading the weights whole, cold."""
    direct, threads, block = way
    drop_copies(folder)
    descriptor = os.open(folder / "model.safetensors", os.O_RDONLY | (os.O_DIRECT if direct else 0))
    size = os.fstat(descriptor).st_size
    buffers = huge_pages(threads, block)
    for buffer in buffers:
        buffer[:] = b"\1" * block
    places, lock = iter(range(0, size, block)), threading.Lock()

    def read(buffer: memoryview) -> None:
        while True:
            with lock:
                place = next(places, None)
            if place is None:
                return
            os.preadv(descriptor, [buffer], place)

    workers = [threading.Thread(target=read, args=(buffer,)) for buffer in buffers]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - begin
    os.close(descriptor)
    return size / seconds


def meta_model(folder: Path) -> Any:
    """The model of a folder, without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.use_cache = False
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def streamed(folder: Path) -> dict[str, Any]:
    """Ours: compile within MEMORY, and call cold."""
    import transformers  # noqa: F401  (before memory is counted)

    import bmgraph as bg
    from benchmarks.tensors_on_disk import AnonymousMemory
    from bmgraph.passes import Stream
    from bmgraph.utils.host_memory import give_back_memory

    model = meta_model(folder)
    bg.capture(torch.nn.Linear(4, 4), (torch.zeros(2, 4),))  # what torch.export imports late
    whole = AnonymousMemory()
    begin = time.perf_counter()
    example = {"input_ids": ids()}
    engine: Any = bg.compile(
        model, [Stream(MEMORY)], example=example, backend="torch", weights=folder, verify="off"
    )
    found: dict[str, Any] = {
        "compile_s": time.perf_counter() - begin,
        "schedule": engine.schedule(**example).summary(),
    }
    bytes_read = engine.schedule(**example).read
    give_back_memory()
    calls = AnonymousMemory()
    drop_copies(folder)
    begin = time.perf_counter()
    outputs = engine(**example)
    found["first_call_s"] = time.perf_counter() - begin
    for _ in range(ROUNDS):
        drop_copies(folder)
        engine(**example)
    found |= {"calls_peak_mb": 1e3 * calls.end(), "whole_peak_mb": 1e3 * whole.end()}
    way = fastest_way(folder)
    found["disk_way"] = dict(zip(("direct", "threads", "block"), way))
    rounds = []
    before = disk_speed(folder, way)
    for _ in range(ROUNDS):
        drop_copies(folder)
        begin, processor = time.perf_counter(), time.process_time()
        engine(**example)
        seconds = time.perf_counter() - begin
        processor = time.process_time() - processor
        begin = time.perf_counter()
        engine(**example)
        again = time.perf_counter() - begin
        after = disk_speed(folder, way)
        rounds.append((seconds, bytes_read * (1 / before + 1 / after) / 2, processor, again))
        before = after
    found |= {
        "bytes_read_mb": bytes_read / 1e6,
        "call_s": statistics.median(item[0] for item in rounds),
        "disk_allows_s": statistics.median(item[1] for item in rounds),
        "share_of_disk": statistics.median(item[1] / item[0] for item in rounds),
        "call_cpu_s": statistics.median(item[2] for item in rounds),
        "next_call_s": statistics.median(item[3] for item in rounds),
        "rounds": rounds,
    }  # fmt: skip
    torch.save(outputs["logits"], folder / "streamed.pt")
    return found


def eager(folder: Path) -> dict[str, Any]:
    """The model in memory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.use_cache = False
    seconds = []
    with torch.no_grad():
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            logits = model(input_ids=ids()).logits
            seconds.append(time.perf_counter() - begin)
    mine = torch.load(folder / "streamed.pt", weights_only=True)
    return {
        "equal": bool(torch.equal(mine, logits)), "largest_difference": float((mine - logits).abs().max()),
        "relative_difference": float((mine - logits).norm() / logits.norm()), "in_memory_call_s": statistics.median(seconds),
    }  # fmt: skip


def accelerated(folder: Path) -> dict[str, Any]:
    """accelerate's disk_offload of the same model, called cold."""
    import accelerate
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.use_cache = False
    offload = Path(tempfile.mkdtemp(prefix="bmgraph-offload-", dir=folder.parent))
    try:
        accelerate.disk_offload(model, str(offload), execution_device=torch.device("cpu"))
        seconds = []
        with torch.no_grad():
            for _ in range(3):
                drop_copies(offload)
                begin = time.perf_counter()
                model(input_ids=ids())
                seconds.append(time.perf_counter() - begin)
    finally:
        shutil.rmtree(offload, ignore_errors=True)
    return {"accelerate_call_s": statistics.median(seconds), "accelerate": accelerate.__version__}


def large(folder: Path) -> dict[str, Any]:
    """Plan for a Llama-70B shape in sparse files, which are made here."""
    import transformers  # noqa: F401  (before memory is counted)

    import bmgraph as bg
    from benchmarks.tensors_on_disk import SHAPE, AnonymousMemory, make_model, write_files
    from bmgraph.passes import Stream

    model = make_model(SHAPE, 80)
    place = Path(tempfile.mkdtemp(prefix="bmgraph-70b-", dir=folder.parent))
    try:
        write_files(place, model, -1)
        example = {name: torch.ones(1, 64, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        bg.capture(torch.nn.Linear(4, 4), (torch.zeros(2, 4),))
        memory, begin = AnonymousMemory(), time.perf_counter()
        program = bg.capture(model, example, weights=place, prove=False)
        before = _bytes_read()
        engine: Any = bg.compile(program, [Stream(LARGE_MEMORY)], backend="torch", verify="structure")
        return {
            "large_plan_s": time.perf_counter() - begin,
            "large_read_mb": (_bytes_read() - before) / 1e6,
            "large_peak_mb": 1e3 * memory.end(),
            "large_schedule": engine.schedule(**example).summary(),
        }
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


PARTS = {"streamed": streamed, "eager": eager, "accelerated": accelerated, "large": large}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep the weights there, or use those that are there")
    parser.add_argument("--part", choices=PARTS, help="run one contestant here, and print what it found")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.folder)))
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="bmgraph-stream-", dir=HERE))
    found: dict[str, Any] = {"memory": MEMORY, "machine": machine()}
    try:
        folder.mkdir(exist_ok=True)
        if not (folder / "model.safetensors").exists():
            write_weights(folder)
        for part in options.only:
            command = [sys.executable, "-m", "benchmarks.stream", "--folder", str(folder), "--part", part]
            done = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True, check=True)
            found |= json.loads(done.stdout.splitlines()[-1])
            print(part, json.dumps(found, indent=1), flush=True)
            if {"accelerate_call_s", "call_s"} <= found.keys():
                found["times_accelerate"] = found["accelerate_call_s"] / found["call_s"]
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        (folder / "streamed.pt").unlink(missing_ok=True)
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
