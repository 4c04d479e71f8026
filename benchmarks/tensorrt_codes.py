"""MiniLM in 8 bits for TensorRT: how far the programs that its plans are built from move on torch's CPU, and the size of the plans.

`python -m benchmarks.tensorrt_codes` (half a minute; no GPU is needed, and nothing runs on one). Needs the extras `engines` and `demo`.
"""

from __future__ import annotations

from torch.nn.functional import cosine_similarity

import bmgraph as bg
from benchmarks.assets import minilm
from bmgraph.backends import TensorRT
from bmgraph.cli.model_source import TEXTS, open_source
from bmgraph.passes import Quantize


def main() -> None:
    source = open_source(str(minilm()))
    batches = source.batches(list(TEXTS), 4, 64)
    program = bg.capture(source.model, source.example)
    batch = batches[1]
    real = batch["attention_mask"].bool()
    expected = program(**batch)["last_hidden_state"][real]
    print(f"floats: plan of {_plan(program) / 1e6:.1f} MB")
    for scheme in ("fp8", "int8"):
        for activations in ("static", "none"):
            made = bg.Pipeline([Quantize(scheme, activations=activations)]).run(
                program, calibration=batches, target=TensorRT.target
            )
            found = made(**batch)["last_hidden_state"][real]
            error = float((found - expected).norm() / expected.norm())
            cosine = float(cosine_similarity(found, expected).mean())
            print(
                f"{scheme}, {activations} activations: cosine {cosine:.4f}, relative error {error:.3f}, plan of "
                f"{_plan(made) / 1e6:.1f} MB"
            )


def _plan(program: bg.Program) -> int:
    engine = bg.compile(program, backend="tensorrt")
    assert engine.report.bytes is not None
    return engine.report.bytes


if __name__ == "__main__":
    main()
