"""A Llama-70B shape whose weights stay in files: capture, one pass on one layer, and saving, with the memory they take.

All files are sparse (holes read as zeros) but for the one layer, whose weights are real numbers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from bmgraph.ir.pass_record import machine

HERE = Path(__file__).parent
SHAPE = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 1000, "max_position_embeddings": 256,
}  # fmt: skip
LAYERS_PER_FILE = 4
ROWS = 512
"""How many rows of a weight are made and compared at a time."""


def make_model(shape: dict[str, int], layers: int) -> Any:
    """A Llama in bfloat16 on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=layers)).to(torch.bfloat16).eval()


def write_files(folder: Path, model: Any, real: int) -> None:
    """Sparse safetensors files with an index, as transformers names them; layer `real` has random weights."""
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        found = name.split(".")
        number = int(found[2]) // LAYERS_PER_FILE if found[1] == "layers" else 999
        files.setdefault(f"model-{number:05d}.safetensors", {})[name] = tensor
    for file, tensors in files.items():
        _write_sparse(folder / file, tensors, f"model.layers.{real}.")
    index = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def _write_sparse(path: Path, tensors: dict[str, torch.Tensor], real: str) -> None:
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
        for name, tensor in tensors.items():
            if not name.startswith(real):
                continue
            stream.seek(8 + len(text) + header[name]["data_offsets"][0])
            for first in range(0, len(tensor), ROWS):
                rows = torch.randn(min(ROWS, len(tensor) - first), *tensor.shape[1:]) * 0.02
                stream.write(rows.to(torch.bfloat16).view(torch.uint8).numpy().data)


class AnonymousMemory:
    """Samples the anonymous memory of this process in a thread; `peak` is the most above what it was at first, in bytes."""

    def __init__(self) -> None:
        self._first, self.peak = self._now(), 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def end(self) -> float:
        """Stop; the peak in GB."""
        self._ended.set()
        self._thread.join()
        return self.peak / 1e9

    def _sample(self) -> None:
        while not self._ended.wait(0.01):
            self.peak = max(self.peak, self._now() - self._first)

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
        raise OSError("this system does not tell RssAnon")


def measure(folder: Path, shape: dict[str, int], layers: int, real: int) -> dict[str, float]:
    """Capture, quantise the real layer, check its values, save by reference and load, in this process."""
    import transformers  # noqa: F401  (before memory is counted)

    import bmgraph as bg
    from bmgraph.passes import Quantize

    model = make_model(shape, layers)
    example = {name: torch.ones(2, 16, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    bg.capture(torch.nn.Linear(4, 4), (torch.zeros(2, 4),))  # what torch.export imports late
    memory, seconds = AnonymousMemory(), {}

    def timed(name: str, begin: float) -> float:
        seconds[f"{name}_s"] = time.perf_counter() - begin
        seconds[f"{name}_peak_gb"] = memory.peak / 1e9
        return time.perf_counter()

    begin = time.perf_counter()
    program = bg.capture(model, example, weights=folder)
    begin = timed("capture", begin)
    small = bg.Pipeline([Quantize("int8", activations="none", include=(f"model.layers.{real}.*",))]).run(
        program
    )
    begin = timed("pass", begin)
    small.save(str(folder / "saved"), weights="reference")
    begin = timed("save", begin)
    loaded = bg.load(folder / "saved")
    timed("load", begin)
    peak = memory.end()
    record = small.history[-1]
    assert len(record.edits) == 7, record.edits
    checked = check_values(program, loaded, real)
    held = sum(file.stat().st_size for file in (folder / "saved").iterdir())
    return {
        **seconds, "peak_gb": peak, "layers": layers, "values_checked": checked, "saved_gb": held / 1e9,
        "weights_gb": sum(tensor.nbytes for tensor in program.parameters.values()) / 1e9,
        "fits_in_memory": program.fits_in_memory,
    }  # fmt: skip


def check_values(program: Any, small: Any, real: int) -> int:
    """Compare codes x scales with the weights in the files, row by row; the number of values."""
    from bmgraph.utils.stored_tensor import row_blocks

    count = 0
    for name, tensor in program.parameters.items():
        if not name.startswith(f"model.layers.{real}.") or tensor.dim() != 2:
            continue
        codes, scales = small.parameters[f"{name}_codes"], small.parameters[f"{name}_scale"]
        for first, rows in row_blocks(tensor):
            scale = rows.abs().amax(1) / 127
            own = slice(first, first + len(rows))
            assert torch.equal(scales[own], scale), name
            expected = torch.clamp(torch.round(rows / scale[:, None]), -127, 127).to(torch.int8)
            assert torch.equal(codes[own], expected), name
            count += rows.numel()
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--small", action="store_true", help="a small shape, to try this script")
    parser.add_argument("--folder", type=Path, help="measure with these files, and print the result")
    options = parser.parse_args()
    shape, real = SMALL if options.small else SHAPE, options.layers // 2
    if options.folder:
        print(json.dumps(measure(options.folder, shape, options.layers, real)))
        return
    folder = Path(tempfile.mkdtemp(prefix="bmgraph-70b-"))
    try:
        write_files(folder, make_model(shape, options.layers), real)
        command = [sys.executable, "-m", "benchmarks.tensors_on_disk", "--layers", str(options.layers)]
        command += ["--folder", str(folder), *(["--small"] if options.small else [])]
        done = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print({name: round(value, 2) for name, value in found.items()})
    if not options.small:
        (HERE / "results").mkdir(exist_ok=True)
        text = json.dumps({**found, "machine": machine()}, indent=1) + "\n"
        (HERE / "results" / "tensors_on_disk.json").write_text(text)


if __name__ == "__main__":
    main()
