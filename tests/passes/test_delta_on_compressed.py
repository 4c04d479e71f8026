"""A compressed program trains a delta and goes on: its codes and masks stay, and the engine equals what was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import AdamW, Onnx, Torch
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.passes import (
    IA3,
    QAT,
    Adapter,
    DoRA,
    LoadDelta,
    LoRA,
    Merge,
    MoEfy,
    Prefix,
    Prune,
    Quantize,
    Shrink,
    StoreCodes,
)
from bmgraph.verify.metrics import relative_error
from tests.helpers.sweep import sweep
from tests.helpers.training import LANGUAGE, captured_to_train, labelled
from tests.helpers.zoo import Batch

pytest.importorskip("onnxruntime")

INT4 = Quantize("int4", group=16, activations="none")

COMPRESSED: dict[str, Sequence[Pass]] = {
    "int4": [INT4],
    "zero points": [Quantize("int4", group=16, method="gptq", symmetric=False)],
    "int3": [Quantize("int3", group=16)],
    "mixed": [Quantize("mixed", average=4.5, group=16)],
    "int8 static": [Quantize("int8", activations="static")],
    "trained codes": [QAT("int4", activations="none"), StoreCodes()],
    "2:4": [Prune("2:4")],
    "wanda": [Prune("2:4", score="wanda")],
    "sparsegpt": [Prune("unstructured", score="sparsegpt")],
    "2:4 of int4": [Prune("2:4"), INT4],
    "moefied": [MoEfy(experts=4, active=2)],
    "moefied int4": [MoEfy(experts=4, active=2), INT4],
    "shrunk": [Shrink(ffn=0.25, hidden=0.25), Shrink(layers=0.5)],
}

MERGES: dict[str, dict[str, float]] = {
    "shrunk": {},
    "int4": {"requantize": 0.9},
    "moefied": {},
    "moefied int4": {"requantize": 0.9},
}
"""Programs that a delta can be folded into, since they round no activations, and the options of `Merge`."""

DELTAS: dict[str, Pass] = {
    "LoRA": LoRA(r=4, targets=("*",)),
    "DoRA": DoRA(r=4, roles=("attention.*",)),
    "IA3": IA3(),
    "Adapter": Adapter(8),
    "Prefix": Prefix(3),
}

EVERY = [
    *((kind, "encoder", "LoRA") for kind in COMPRESSED),
    *((kind, architecture, "LoRA") for kind in ("int4", "2:4", "moefied") for architecture in LANGUAGE),
    *(("2:4 of int4", "llama", delta) for delta in DELTAS),
]


@pytest.mark.parametrize(
    ("kind", "architecture", "delta"), sweep(EVERY, [("int4", "encoder", "LoRA")])
)  # fmt: skip
def test_a_compressed_program_trains_a_delta_and_goes_on(
    kind: str, architecture: str, delta: str, program: Program, batches: list[Batch], tmp_path: Path
) -> None:
    backend = Torch() if kind == "int3" else Onnx()
    source, given = _source(architecture, program, batches)
    small = bg.Pipeline(COMPRESSED[kind]).run(source, calibration=given, max_drift=5.0, target=backend.target)
    loss = "loss" if architecture in LANGUAGE else _squares
    trainer = bg.compile(
        small, [DELTAS[delta]], backend=Torch(optimizer=AdamW(lr=1e-2), loss=loss), max_drift=5.0
    )
    losses = [trainer.step(given[0]).loss for _ in range(8)]
    assert losses[-1] < losses[0]

    tuned = trainer.program()
    kept = small.parameters.keys() & tuned.frozen
    assert {name for name in small.parameters if name.endswith(("_codes", "_mask", "_scale"))} <= kept
    assert all(torch.equal(tuned.parameters[name], small.parameters[name]) for name in kept)
    assert any(
        not torch.equal(tuned(**given[0])[spec.name], small(**given[0])[spec.name]) for spec in small.outputs
    )

    _served(bg.compile(tuned, [], backend=backend, calibration=given), tuned, given[1])
    tuned.save_delta(str(tmp_path / "delta"))
    again = bg.Pipeline([LoadDelta()]).run(small, resources={"delta": str(tmp_path / "delta")}, max_drift=5.0)
    _equal(again, tuned, given[1], 1e-6)
    if delta == "LoRA" and kind in MERGES:
        merged = bg.Pipeline([Merge(**MERGES[kind])]).run(tuned, max_drift=5.0)
        assert not any("lora" in name for name in merged.parameters)
        if not MERGES[kind]:  # codes are rounded again
            _equal(merged, tuned, given[1], 1e-5)
        _served(bg.compile(merged, [], backend=backend, calibration=given), merged, given[1])


def _source(architecture: str, program: Program, batches: list[Batch]) -> tuple[Program, list[Batch]]:
    if architecture == "encoder":
        return program, batches
    return captured_to_train(architecture), [labelled(architecture, 4, 11, seed) for seed in range(3)]


def _squares(
    outputs: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The squared scores of tokens that are not padding."""
    kept = inputs["attention_mask"].to(torch.float32)
    return (outputs["logits"].square().sum(-1) * kept).sum(), kept.sum()


def _served(engine: bg.Engine, program: Program, batch: Batch) -> None:
    """The engine gives what the program gives; rounded activations may cross a step."""
    rounds = any("quantize_" in str(node.target) for node in program.graph.nodes)
    needed = {spec.name: batch[spec.name] for spec in engine.inputs}
    found, expected = engine(**needed), program(**batch)
    for spec in engine.outputs:
        assert relative_error(torch.as_tensor(found[spec.name]), expected[spec.name]) < (
            1e-2 if rounds else 1e-4
        )


def _equal(program: Program, other: Program, batch: Batch, bound: float) -> None:
    found, expected = program(**batch), other(**batch)
    for name, value in expected.items():
        assert relative_error(found[name], value) <= bound, name
