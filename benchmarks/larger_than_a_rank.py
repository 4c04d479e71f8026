"""Training a Llama shape that is larger than what a rank may hold: anonymous memory of four ranks while weights are read
from a folder into shards, three steps are made, and a checkpoint is saved. `python -m benchmarks.larger_than_a_rank`.

The ranks are gloo processes on this machine, sampled every 10 ms from outside, above what each held after its imports.
Losses are compared with a plain PyTorch loop in one process. Writes results/larger_than_a_rank.json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
RESULT = HERE / "results" / "larger_than_a_rank.json"
RANKS, STEPS, SEED = 4, 3, 0
ROWS, LENGTH = 4, 64
RATE = 1e-2
LIMIT = 0.8
"""The share of the model's bytes that a rank's anonymous memory stays below."""
SAMPLE = 0.01
SHAPE = {
    "hidden_size": 896, "intermediate_size": 2432, "num_attention_heads": 14, "num_key_value_heads": 14,
    "vocab_size": 8000, "max_position_embeddings": 256, "num_hidden_layers": 24,
}  # fmt: skip
LAYERS = "LARGER_LAYERS"
"""Names the environment variable that sets another number of layers, to try this script."""
WAYS = ("SGD", "AdamW, Offload('optimizer')")


def make_model() -> Any:
    """A Llama on the current device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = int(os.environ.get(LAYERS, SHAPE["num_hidden_layers"]))
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers}, use_cache=False))


def batches() -> list[dict[str, torch.Tensor]]:
    """One batch a step."""
    ids = torch.randint(
        SHAPE["vocab_size"], (STEPS, ROWS, LENGTH), generator=torch.Generator().manual_seed(SEED)
    )
    return [{"input_ids": row, "labels": row} for row in ids]


def write_folder(folder: Path) -> int:
    """The weights as a safetensors folder; returns their bytes."""
    from safetensors.torch import save_file

    torch.manual_seed(SEED)
    state = make_model().state_dict()
    save_file(state, folder / "model.safetensors")
    return sum(tensor.nbytes for tensor in state.values())


def plain_losses(folder: Path, way: str) -> list[float]:
    """The losses of a plain loop in this process."""
    from safetensors.torch import load_file

    model = make_model()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    kind = torch.optim.SGD if way == "SGD" else torch.optim.AdamW
    decay = {} if way == "SGD" else {"weight_decay": 0.0}
    optimizer = kind(model.parameters(), lr=RATE if way == "SGD" else RATE / 100, **decay)
    found = []
    for batch in batches():
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def train(folder: Path, way: str, told: Path) -> None:
    """What one rank does; writes when its phases began, and its losses."""
    import torch.distributed as dist
    import transformers  # noqa: F401  (before memory is counted)

    import bmgraph as bg
    from bmgraph.backends import SGD, AdamW, Torch
    from bmgraph.passes import Offload, ZeRO

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    bg.capture(torch.nn.Linear(4, 4), (torch.zeros(2, 4),))  # what torch.export imports late
    with torch.device("meta"):
        model = make_model()
    phases = {"load": time.time()}
    optimizer = SGD(lr=RATE) if way == "SGD" else AdamW(lr=RATE / 100, weight_decay=0.0)
    passes = [ZeRO(3, prefetch=1)] + ([] if way == "SGD" else [Offload("optimizer")])
    trainer = bg.compile(
        model,
        passes=passes,
        example=batches()[0],
        backend=Torch(optimizer=optimizer, timeout=600, optimizer_in_backward=True),
        weights=folder,
    )
    phases["steps"] = time.time()
    losses = [trainer.step(batch).loss for batch in batches()]
    phases["save"] = time.time()
    trainer.save(folder / f"checkpoint-{WAYS.index(way)}")
    phases["end"] = time.time()
    result = {"phases": phases, "losses": losses, "notes": trainer.report.notes}
    told.with_suffix(".part").write_text(json.dumps(result))
    os.replace(told.with_suffix(".part"), told)
    dist.destroy_process_group()


def measure(folder: Path, way: str) -> dict[str, Any]:
    """Run the ranks, sample their memory; the peak of each phase above that at its begin of `load`, over all ranks, in bytes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    told = [folder / f"rank-{rank}.json" for rank in range(RANKS)]
    for file in told:
        file.unlink(missing_ok=True)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.larger_than_a_rank", "--rank-of", way, str(folder), str(file)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=HERE.parent,
        )
        for rank, file in enumerate(told)
    ]  # fmt: skip
    samples: list[list[tuple[float, int]]] = [[] for _ in ranks]
    while any(process.poll() is None for process in ranks):
        if any(process.poll() for process in ranks):
            for process in ranks:
                process.kill()
        for index, process in enumerate(ranks):
            samples[index].append((time.time(), _anonymous(process.pid)))
        time.sleep(SAMPLE)
    if any(process.returncode for process in ranks):
        raise RuntimeError(f"a rank failed: {[process.returncode for process in ranks]}")
    found = [json.loads(file.read_text()) for file in told]
    peaks: dict[str, int] = {}
    for rank, series in zip(found, samples):
        begin = max((time_, size) for time_, size in series if time_ <= rank["phases"]["load"])[1]
        for (phase, first), (_, last) in pairwise(rank["phases"].items()):
            most = max(size - begin for time_, size in series if first <= time_ <= last)
            peaks[phase] = max(peaks.get(phase, 0), most)
    seconds = {
        phase: round(last - first, 1) for (phase, first), (_, last) in pairwise(found[0]["phases"].items())
    }
    return {"peaks": peaks, "seconds": seconds, "losses": found[0]["losses"], "notes": found[0]["notes"]}


def _anonymous(pid: int) -> int:
    """The anonymous memory of a process in bytes; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def main() -> None:
    """Measure both ways to train and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rank-of", nargs=3, metavar=("WAY", "FOLDER", "FILE"), help="run one rank (internal)"
    )
    parser.add_argument(
        "--folder", help="where weights and checkpoints are written; a temporary folder by default"
    )
    asked = parser.parse_args()
    if asked.rank_of:
        way, folder, told = asked.rank_of
        train(Path(folder), way, Path(told))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=asked.folder) as temporary:
        total = write_folder(Path(temporary))
        for way in WAYS:
            row = {"optimizer": way, **measure(Path(temporary), way)}
            row["plain_losses"] = plain_losses(Path(temporary), way)
            most = max(row["peaks"].values())
            row |= {
                "peak": most,
                "peak_over_model": round(most / total, 3),
                "below_limit": most < LIMIT * total,
            }
            row["largest_loss_error"] = max(
                abs(mine - plain) / plain for mine, plain in zip(row["losses"], row["plain_losses"])
            )
            rows.append(row)
            print(json.dumps(row, indent=2), flush=True)
            _write(total, rows)


def _write(total: int, rows: list[dict[str, Any]]) -> None:
    """Write what is known by now, unless another number of layers was asked for."""
    from bmgraph.ir.pass_record import machine

    if LAYERS in os.environ:
        return
    result = {
        "what": f"Llama shape {SHAPE}, fp32, {RANKS} gloo ranks, ZeRO(3, prefetch=1), {STEPS} steps of {ROWS} x {LENGTH} "
        "tokens; anonymous memory of the worst rank above that after imports, sampled from outside every 10 ms, in bytes",
        "model_bytes": total, "limit_bytes": int(LIMIT * total), "seed": SEED, "machine": machine(), "torch": torch.__version__,
        "rows": rows,
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
