"""Trained encoders on bmgraph's int8 and fp32 engines, compared with other compilers: speed and quality in one run.

Run in the environment that `make peers` builds. Writes results/encoder.json and the table in README.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import bmgraph as bg
from benchmarks import assets, peers
from bmgraph.benchmarking import Comparison
from bmgraph.passes import Quantize
from bmgraph.runtime.ort.engine import OrtEngine
from bmgraph.runtime.ort.profile import profile

HERE = Path(__file__).parent
THREADS = 2
PACKAGES = ("bmgraph", "torch", "transformers", "onnxruntime-gpu", "openvino", "nncf", "ctranslate2")
Batch = dict[str, torch.Tensor]
Call = Callable[[Batch], np.ndarray]


class Texts:
    """Builds batches of texts with a given length and padding."""

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        self.tokenizer = tokenizer
        self.texts = texts

    def batch(self, start: int, size: int, length: int, shortest: int | None = None) -> Batch:
        """`size` rows of `length` tokens: without padding, or with row lengths from `shortest` to `length`."""
        ids, mask = torch.zeros(size, length, dtype=torch.long), torch.zeros(size, length, dtype=torch.long)
        for row in range(size):
            text = " ".join(
                self.texts[(start + row * 8 + i) % len(self.texts)] for i in range(8 * (1 + length // 128))
            )
            kept = (
                length
                if shortest is None or size == 1
                else shortest + (length - shortest) * row // (size - 1)
            )
            found = self.tokenizer(
                text, truncation=True, max_length=kept, padding="max_length", return_tensors="pt"
            )
            ids[row, :kept], mask[row, :kept] = found["input_ids"][0], 1
        return {"input_ids": ids, "attention_mask": mask}

    def calibration(self) -> list[Batch]:
        """32 batches of 8 rows of up to 128 tokens, from texts that no measurement uses."""
        return [self.batch(2000 + 64 * i, 8, 128, 24) for i in range(32)]


def cosine(found: np.ndarray, expected: np.ndarray, mask: torch.Tensor) -> float:
    """The mean cosine of token embeddings, without padding."""
    real = mask.bool()
    mine, theirs = torch.as_tensor(np.asarray(found))[real], torch.as_tensor(expected)[real]
    return float(torch.nn.functional.cosine_similarity(mine, theirs, dim=-1).mean())


def embed(call: Call, tokenizer: Any, texts: list[str]) -> np.ndarray:
    """Mean-pooled sentence embeddings."""
    found = []
    for start in range(0, len(texts), 16):
        rows = tokenizer(
            texts[start : start + 16], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        batch = {name: rows[name] for name in ("input_ids", "attention_mask")}
        hidden = torch.as_tensor(np.asarray(call(batch)))
        mask = batch["attention_mask"][:, : hidden.shape[1]].unsqueeze(-1)
        found.append(((hidden * mask).sum(1) / mask.sum(1)).numpy())
    return np.concatenate(found)


def probe(call: Call, tokenizer: Any, items: list[tuple[str, Any]]) -> float:
    """Accuracy of a logistic regression on embeddings: 800 training texts, 2,000 held out."""
    from sklearn.linear_model import LogisticRegression

    texts, labels = [text for text, _ in items[:2800]], np.array([label for _, label in items[:2800]])
    vectors = embed(call, tokenizer, texts)
    model = LogisticRegression(max_iter=2000).fit(vectors[:800], labels[:800])
    return float((model.predict(vectors[800:]) == labels[800:]).mean())


def neighbours(call: Call, texts: Texts) -> float:
    """How much the first row of a batch changes (relative L2) when the seven other rows are exchanged."""
    first, second = texts.batch(0, 8, 128), texts.batch(900, 8, 128)
    mixed = {name: torch.cat([value[:1], second[name][1:]]) for name, value in first.items()}
    alone, beside = np.array(call(first)[0]), np.array(call(mixed)[0])
    return float(np.linalg.norm(alone - beside) / np.linalg.norm(alone))


def contestants(
    model: nn.Module, texts: Texts, folder: Path, source: Path | None, quick: bool
) -> tuple[dict[str, Call], OrtEngine]:
    """Every way to run the encoder, as a function from batch to last hidden state; and bmgraph's int8 engine."""
    calibration = texts.calibration()
    program = bg.capture(model, calibration[0])
    small = bg.compile(program, passes=[Quantize("int8")], backend="onnx", calibration=calibration)
    plain = bg.compile(program, passes=[], backend="onnx")
    print(small.report)

    def eager(batch: Batch) -> np.ndarray:
        with torch.inference_mode():
            return model(**batch).last_hidden_state.numpy()

    found: dict[str, Call] = {
        "eager fp32": eager,
        "bmgraph int8": lambda batch: small(**batch)["last_hidden_state"].numpy(),
        "bmgraph fp32": lambda batch: plain(**batch)["last_hidden_state"].numpy(),
        "onnxruntime quantize_dynamic": peers.onnxruntime_dynamic(model, calibration[0], folder, THREADS),
    }
    if quick:
        return found, small
    found["openvino fp32"] = peers.openvino(model, calibration, folder, THREADS, int8=False)
    found["openvino nncf int8"] = peers.openvino(model, calibration, folder, THREADS, int8=True)
    if source is not None:
        found["ctranslate2 int8"] = peers.ctranslate2(source, folder, THREADS)
    compiled = torch.compile(model, dynamic=True)

    def run_compiled(batch: Batch) -> np.ndarray:
        with torch.inference_mode():
            return compiled(**batch).last_hidden_state.numpy()

    try:
        run_compiled(calibration[0])
        found["torch.compile fp32"] = run_compiled
    except Exception as error:  # it needs a C++ compiler, which may be missing
        print(f"skipping torch.compile: {str(error).splitlines()[0]}")
    return found, small


def measure(calls: Mapping[str, Call], batch: Batch, runs: int) -> Comparison:
    """Time all contestants on one batch, in interleaved runs with pauses."""
    ready = {name: (lambda call=call: call(batch)) for name, call in calls.items()}
    return bg.benchmark(ready, batch, runs=runs, warmup=4)


def minilm(runs: int) -> dict[str, Any]:
    """Speed at all sizes and quality of the sentence encoder."""
    from transformers import AutoModel, AutoTokenizer

    source = assets.minilm()
    model = AutoModel.from_pretrained(str(source)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(source))
    sms = assets.sms()
    texts = Texts(tokenizer, [text for text, _ in sms])
    with tempfile.TemporaryDirectory() as folder:
        calls, engine = contestants(model, texts, Path(folder), source, quick=False)
        speed = {}
        for name, batch, count in (
            ("8x128 all real", texts.batch(0, 8, 128), 2 * runs),
            ("8x128 lengths 64 to 128", texts.batch(0, 8, 128, 64), 2 * runs),
            ("8x32 all real", texts.batch(0, 8, 32), runs),
            ("1x128 all real", texts.batch(0, 1, 128), runs),
            ("1x32 all real", texts.batch(0, 1, 32), runs),
        ):
            result = measure(calls, batch, count)
            print(name, result, sep="\n", flush=True)
            speed[name] = {
                **result.as_json(),
                "bmgraph int8 over": {other: result.speedup("bmgraph int8", other) for other in calls},
                "bmgraph fp32 over": {other: result.speedup("bmgraph fp32", other) for other in calls},
            }
        held = texts.batch(300, 8, 128, 64)
        full = texts.batch(300, 8, 128)
        quality = {}
        for name, call in calls.items():
            quality[name] = {
                "cosine": cosine(call(full), calls["eager fp32"](full), full["attention_mask"]),
                "cosine with padding": cosine(call(held), calls["eager fp32"](held), held["attention_mask"]),
                "neighbours": neighbours(call, texts),
                "sms": probe(call, tokenizer, sms),
                "trec": probe(call, tokenizer, assets.trec()),
            }
            print(name, quality[name], flush=True)
        where = profile(engine, texts.batch(0, 8, 128)).as_json()
    return {
        "speed": speed,
        "quality": quality,
        "int8 engine, microseconds": {k: where[k] for k in ("operator", "made_by")},
    }


def second(runs: int) -> dict[str, Any]:
    """Speed of an encoder from another domain: protein residues, eight layers of width 512."""
    from transformers import BertConfig, BertModel

    folder = assets.unpacked("antiberty==0.1.3", "antiberty/trained_models/AntiBERTy_md_smooth")
    config = json.loads((folder / "config.json").read_text())
    known = {
        key: value
        for key, value in config.items()
        if key in BertConfig().to_dict() and key != "architectures"
    }
    model = BertModel(BertConfig(**known), add_pooling_layer=False).eval()
    state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    state = {key.removeprefix("bert."): value for key, value in state.items() if key.startswith("bert.")}
    missing, _ = model.load_state_dict(state, strict=False)
    assert not [name for name in missing if "position_ids" not in name], missing

    class Rows(Texts):
        def batch(self, start: int, size: int, length: int, shortest: int | None = None) -> Batch:
            ids = torch.randint(5, 25, (size, length), generator=torch.Generator().manual_seed(start))
            kept = torch.tensor(
                [
                    length
                    if shortest is None or size == 1
                    else shortest + (length - shortest) * row // (size - 1)
                    for row in range(size)
                ]
            )
            return {"input_ids": ids, "attention_mask": (torch.arange(length)[None] < kept[:, None]).long()}

    texts = Rows(None, [])
    with tempfile.TemporaryDirectory() as work:
        calls, _ = contestants(model, texts, Path(work), None, quick=True)
        batch = texts.batch(0, 8, 128, 64)
        result = measure(calls, batch, runs)
        print("antiberty 8x128", result, sep="\n", flush=True)
        return {
            **result.as_json(),
            "bmgraph int8 over": {other: result.speedup("bmgraph int8", other) for other in calls},
            "cosine": cosine(
                calls["bmgraph int8"](batch), calls["eager fp32"](batch), batch["attention_mask"]
            ),
            "cosine quantize_dynamic": cosine(
                calls["onnxruntime quantize_dynamic"](batch),
                calls["eager fp32"](batch),
                batch["attention_mask"],
            ),
        }


def versions() -> dict[str, str]:
    """The versions of all contestants."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def table(results: Mapping[str, Any]) -> str:
    """The figures as the Markdown table in README.md."""
    speed, quality = results["minilm"]["speed"], results["minilm"]["quality"]
    names = list(quality)
    lines = [
        "| | " + " | ".join(speed) + " | cosine | SMS | TREC-6 | neighbours |",
        "|---|" + "---|" * (len(speed) + 4),
    ]
    for name in names:
        cells = []
        for rows in speed.values():
            row = rows["contestants"][name]
            cells.append(f"{row['median_ms']:.1f} ms ({row['speedup']:.2f}x)")
        scores = quality[name]
        cells += [
            f"{scores['cosine']:.4f}",
            f"{scores['sms']:.3f}",
            f"{scores['trec']:.3f}",
            f"{scores['neighbours']:.4f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=25, help="timed rounds per size")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "encoder.json")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    results = {
        "minilm": minilm(options.runs),
        "antiberty": second(options.runs),
        "versions": versions(),
        "threads": THREADS,
        "seed": 0,
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    page = HERE / "README.md"
    begin, end = "<!-- encoder -->", "<!-- /encoder -->"
    if page.exists() and begin in page.read_text():
        text = page.read_text()
        page.write_text(
            text[: text.index(begin) + len(begin)] + "\n" + table(results) + "\n" + text[text.index(end) :]
        )
    print(table(results))


if __name__ == "__main__":
    main()
