"""Encoders on bmgraph's int8 and fp32 engines, compared with other compilers: speed and quality in one run.

Run in the environment that `make peers` builds. Writes results/encoder.json and the table in README.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bmgraph as bg
from benchmarks import assets, peers
from benchmarks.contestant import versions
from benchmarks.encoders import ENCODERS, Batch, Encoder
from benchmarks.probes import accuracy, embed
from bmgraph.backends import OpenVINO
from bmgraph.benchmarking import Comparison
from bmgraph.passes import Quantize
from bmgraph.runtime.ort.engine import OrtEngine
from bmgraph.runtime.ort.profile import profile

HERE = Path(__file__).parent
THREADS = 2
PACKAGES = ("bmgraph", "torch", "transformers", "onnxruntime-gpu", "openvino", "nncf", "ctranslate2")
Call = Callable[[Batch], np.ndarray]

OURS, OURS_FP32, EAGER = "bmgraph int8 on openvino", "bmgraph fp32 on openvino", "eager fp32"
OF_INT8 = ("nncf (torch)", "nncf (torch), static", "nncf (onnx)")
OF_FP32 = ("openvino fp32 (onnx)", "openvino fp32 (torch)")

SIZES: dict[str, tuple[int, int, int | None]] = {
    "8x128 all real": (8, 128, None),
    "8x128 lengths 64 to 128": (8, 128, 64),
    "1x128 all real": (1, 128, None),
    "8x32 all real": (8, 32, None),
    "1x32 all real": (1, 32, None),
}
"""Name of a measurement -> rows, length, length of the shortest row."""


def cosine(found: np.ndarray, expected: np.ndarray, mask: torch.Tensor | None) -> float:
    """The mean cosine of token embeddings, without padding."""
    mine, theirs = torch.as_tensor(np.asarray(found)), torch.as_tensor(expected)
    if mask is not None:
        mine, theirs = mine[mask.bool()], theirs[mask.bool()]
    return float(torch.nn.functional.cosine_similarity(mine, theirs, dim=-1).mean())


def probe(call: Call, tokenizer: Any, items: list[tuple[str, Any]]) -> float:
    """Accuracy of a logistic regression on embeddings: 800 training texts, 2,000 held out."""
    texts, labels = [text for text, _ in items[:2800]], np.array([label for _, label in items[:2800]])
    return accuracy(embed(call, tokenizer, texts, 128), labels, slice(800), slice(800, None))


def neighbours(call: Call, encoder: Encoder) -> float:
    """How much the first row of a batch changes (relative L2) when the seven other rows are exchanged; 0 if no bit does."""
    first, second = encoder.batch(0, 8, 128, None), encoder.batch(900, 8, 128, None)
    mixed = {name: torch.cat([value[:1], second[name][1:]]) for name, value in first.items()}
    alone, beside = np.array(call(first)[0]), np.array(call(mixed)[0])
    return float(np.linalg.norm(alone - beside) / np.linalg.norm(alone))


def contestants(encoder: Encoder, folder: Path, few: bool) -> tuple[dict[str, Call], OrtEngine]:
    """Every way to run an encoder (`few`: without those that are known to be slow), as a function from batch to last hidden
    state; and bmgraph's int8 engine on ONNX Runtime."""
    model, calibration = encoder.model, encoder.calibration()

    def eager(batch: Batch) -> np.ndarray:
        with torch.inference_mode():
            return model(**batch).last_hidden_state.numpy()

    program = bg.capture(model, calibration[0])
    small = bg.compile(program, [Quantize("int8")], backend="onnx", calibration=calibration)
    engines: dict[str, Any] = {
        "bmgraph int8": small,
        OURS: bg.compile(program, [Quantize("int8")], backend=OpenVINO(), calibration=calibration),
        OURS_FP32: bg.compile(program, [], backend=OpenVINO()),
    }
    print(engines[OURS].report)
    if not few:
        engines["bmgraph fp32"] = bg.compile(program, [], backend="onnx")
    found: dict[str, Call] = {EAGER: eager}
    for name, engine in engines.items():
        found[name] = lambda batch, engine=engine: np.asarray(engine(**batch)["last_hidden_state"])
    for source in ("onnx", "torch"):
        plain = peers.openvino_model(model, calibration, folder, source, int8=False)
        found[f"openvino fp32 ({source})"] = peers.openvino(plain, THREADS, static=False, precision="f32")
        rounded = peers.openvino_model(model, calibration, folder, source, int8=True)
        found[f"nncf ({source})"] = peers.openvino(rounded, THREADS, static=False)
        if source == "torch":
            found["nncf (torch), static"] = peers.openvino(rounded, THREADS, static=True)
    if few:
        return found, small
    found["onnxruntime quantize_dynamic"] = peers.onnxruntime_dynamic(model, calibration[0], folder, THREADS)
    if encoder.folder is not None:
        found["ctranslate2 int8"] = peers.ctranslate2(encoder.folder, folder, THREADS)
    return found, small


def compared(result: Comparison) -> dict[str, Any]:
    """A measurement with the medians of paired ratios: ours over every other, and over the best peer."""
    names = [name for name in result.milliseconds if name not in (OURS, OURS_FP32)]
    return {
        **result.as_json(),
        "int8 over": {name: result.speedup(OURS, name) for name in names},
        "fp32 over": {name: result.speedup(OURS_FP32, name) for name in names},
        "int8 over the best peer": min(result.speedup(OURS, name) for name in OF_INT8),
        "fp32 over the best peer": min(result.speedup(OURS_FP32, name) for name in OF_FP32),
    }


def speed(calls: Mapping[str, Call], encoder: Encoder, sizes: Mapping[str, Any], runs: int) -> dict[str, Any]:
    """All contestants at all sizes, in interleaved runs with pauses."""
    found = {}
    for name, (rows, length, shortest) in sizes.items():
        batch = encoder.batch(0, rows, length, shortest)
        ready = {other: (lambda call=call, batch=batch: call(batch)) for other, call in calls.items()}
        result = bg.benchmark(ready, batch, runs=runs, warmup=4)
        print(name, result, sep="\n", flush=True)
        found[name] = compared(result)
    return found


def quality(calls: Mapping[str, Call], encoder: Encoder, probes: bool) -> dict[str, Any]:
    """How near each contestant is to the eager model, and what a row's neighbours change."""
    full, ragged = encoder.batch(300, 8, 128, None), encoder.batch(300, 8, 128, 64)
    found: dict[str, Any] = {}
    for name, call in calls.items():
        row = {
            "cosine": cosine(call(full), calls[EAGER](full), full.get("attention_mask")),
            "cosine with padding": cosine(call(ragged), calls[EAGER](ragged), ragged.get("attention_mask")),
            "neighbours": neighbours(call, encoder),
        }
        if probes:
            row["sms"] = probe(call, encoder.tokenizer, encoder.texts)
            row["trec"] = probe(call, encoder.tokenizer, assets.trec())
        print(name, row, flush=True)
        found[name] = row
    return found


def measured(name: str, runs: int, probes: bool) -> dict[str, Any]:
    """Speed and quality of one encoder: MiniLM at all sizes, with probes, the others at fewer."""
    encoder, first = ENCODERS[name](), name == "minilm"
    sizes = SIZES if first else dict(list(SIZES.items())[: 1 if "vit" in name else 3])
    with tempfile.TemporaryDirectory() as folder:
        calls, engine = contestants(encoder, Path(folder), few=not first)
        found = {
            "speed": speed(calls, encoder, sizes, runs),
            "quality": quality(calls, encoder, probes and first),
        }
        if first:
            where = profile(engine, encoder.batch(0, 8, 128, None)).as_json()
            found["int8 engine, microseconds"] = {key: where[key] for key in ("operator", "made_by")}
        return found


def table(result: Mapping[str, Any]) -> str:
    """The figures of one encoder as the Markdown table in README.md."""
    lines = [
        "| | " + " | ".join(result["speed"]) + " | cosine | SMS | TREC-6 | neighbours |",
        "|---|" + "---|" * (len(result["speed"]) + 4),
    ]
    for name, scores in result["quality"].items():
        cells = []
        for rows in result["speed"].values():
            row = rows["contestants"][name]
            cells.append(f"{row['median_ms']:.1f} ms ({row['speedup']:.2f}x)")
        cells.append(f"{scores['cosine']:.4f}")
        cells += [f"{scores[key]:.3f}" if key in scores else "" for key in ("sms", "trec")]
        lines.append(f"| {name} | " + " | ".join([*cells, f"{scores['neighbours']:.4f}"]) + " |")
    return "\n".join(lines)


def summary(results: Mapping[str, Any]) -> str:
    """The ratios to the best peers, of all encoders, as Markdown."""
    lines = ["| | int8 over the best peer | fp32 over the best peer | cosine of int8 |", "|---|---|---|---|"]
    for name, result in results.items():
        for size, row in result["speed"].items():
            lines.append(
                f"| {name}, {size} | {row['int8 over the best peer']:.2f} | {row['fp32 over the best peer']:.2f} | "
                f"{result['quality'][OURS]['cosine']:.4f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure the encoders that are asked for; the others keep what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=25, help="timed rounds per size")
    parser.add_argument("--only", nargs="*", choices=list(ENCODERS), default=list(ENCODERS))
    parser.add_argument("--no-probes", action="store_true", help="without the logistic regressions")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "encoder.json")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.only:
        results[name] = measured(name, options.runs, not options.no_probes)
        results |= {"versions": versions(PACKAGES), "threads": THREADS, "seed": 0}
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    shown = {name: results[name] for name in ENCODERS if OURS in results.get(name, {}).get("quality", {})}
    text = f"{table(shown['minilm'])}\n\n{summary(shown)}" if "minilm" in shown else summary(shown)
    page, begin, end = HERE / "README.md", "<!-- encoder -->", "<!-- /encoder -->"
    whole = page.read_text()
    if options.out.parent == HERE / "results" and begin in whole:
        page.write_text(f"{whole[: whole.index(begin) + len(begin)]}\n{text}\n{whole[whole.index(end) :]}")
    print(text)


if __name__ == "__main__":
    main()
