"""Gates on whole layers: exact while open, trained to their share, and gone with the layers that they close."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.errors import InputError, PassError
from bmgraph.ir.program import Program
from bmgraph.passes import L0, Distill, LoRA, Quantize, Shrink
from tests.helpers.captured import captured
from tests.helpers.models import tokens
from tests.passes.test_l0 import check_leaves_out_what_is_closed, data, gate, model


def deep() -> nn.Module:
    """The encoder with four blocks, of which the second and the fourth do nearly nothing."""
    torch.manual_seed(1)
    found = model()
    more = [model().blocks[place] for place in (0, 1)]
    found.blocks = nn.ModuleList([found.blocks[0], more[0], found.blocks[1], more[1]])
    with torch.no_grad():
        for place in (1, 3):
            for linear in (found.blocks[place].o, found.blocks[place].down):
                linear.weight *= 1e-3
                linear.bias *= 1e-3
    return found


def closing(program: Program, values: list[float]) -> Program:
    """The gated program with other log alphas, layer after layer."""
    found = program.clone()
    names = [name for name in found.parameters if name.endswith("_log_alpha")]
    for name, value in zip(sorted(names), values, strict=True):
        found.parameters[name] = torch.tensor([value])
    return found


def naive(values: list[float], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The encoder whose blocks' outputs are mixed with their inputs."""
    found = deep().eval()
    for block, value in zip(found.blocks, values):
        share = float(gate(torch.tensor(value)))

        def mixed(_, given, out, share=share):  # type: ignore[no-untyped-def]
            return out * share + given[0] * (1 - share)

        block.register_forward_hook(mixed)
    with torch.no_grad():
        result: torch.Tensor = found(**batch)["logits"]
    return result


@pytest.mark.parametrize("values", [[2.2, -3.0, 0.4, -3.0], pytest.param([-3.0] * 4, marks=pytest.mark.slow)])
def test_open_gates_change_nothing_and_closed_layers_go(values: list[float]) -> None:
    source = bg.capture(deep(), tokens(4, 8))
    gated = bg.Pipeline([L0(layers=0.5)]).run(source)
    batch = tokens(5, 7, seed=9)
    assert torch.equal(gated(**batch)["logits"], source(**batch)["logits"])
    assert gated.structure().roles == source.structure().roles
    assert len([edit for edit in gated.history[-1].edits if edit.what == "a gate on the layer"]) == 4
    mixed = closing(gated, values)
    expected = naive(values, batch)
    assert torch.allclose(mixed(**batch)["logits"], expected, atol=1e-5)
    shrunk = bg.Pipeline([Shrink(score="gates")]).run(mixed)
    assert torch.allclose(shrunk(**batch)["logits"], expected, atol=1e-5)
    left = sum(value > -3 for value in values) or 1  # one stays
    assert len([name for name in shrunk.parameters if name.endswith("up.weight")]) == left
    assert not [name for name in shrunk.tensors() if "noise" in name or "alpha" in name]
    assert shrunk.step_rules == ()


@pytest.mark.slow
def test_the_loss_trains_them_to_the_target(tmp_path: Path) -> None:
    """The layers that do nothing go, and no others; the result is an ordinary program."""
    source = bg.capture(deep(), tokens(4, 8))
    given = {"teacher": source, "text": data(), "trainer": Torch(optimizer=AdamW(lr=1e-3))}
    passes = [
        L0(layers=0.5),
        Distill(steps=400),
        Shrink(score="gates"),
        LoRA(),
        Quantize("int8", activations="none"),
    ]
    done = bg.Pipeline(passes).run(source, resources=given)
    said = {edit.site: edit.what for edit in done.history[2].edits}
    assert [place for place in range(4) if said[f"blocks.{place}"].startswith("removed")] == [1, 3]
    done.save(tmp_path / "small")
    batch = tokens(5, 7, seed=9)
    assert torch.equal(bg.load(tmp_path / "small")(**batch)["logits"], done(**batch)["logits"])


@pytest.mark.slow
def test_with_heads_and_neurons_at_once() -> None:
    source = bg.capture(deep(), tokens(4, 8))
    gated = bg.Pipeline([L0(layers=0.5, heads=0.5, ffn=0.5)]).run(source)
    values = gated.clone()
    generator = torch.Generator().manual_seed(0)
    for key in [key for key in gated.parameters if key.endswith("_log_alpha")]:
        values.parameters[key] = 4 * torch.randn(gated.parameters[key].shape, generator=generator)
    shrunk = bg.Pipeline([Shrink(score="gates")]).run(values)
    batch = tokens(5, 7, seed=9)
    assert torch.allclose(shrunk(**batch)["logits"], values(**batch)["logits"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "gemma2", "opt", "phi", "mixtral"])
def test_on_architectures(name: str) -> None:
    _, program = captured(name)
    gated = bg.Pipeline([L0(layers=0.5)]).run(program)
    names = sorted(key for key in gated.parameters if key.endswith("_log_alpha"))
    mixed = closing(gated, [(-3.0, 0.3)[place % 2] for place in range(len(names))])
    check_leaves_out_what_is_closed(name, program, mixed)


def test_bad_input_is_one_error() -> None:
    with pytest.raises(InputError, match="give a share to close, from 0 to below 1"):
        L0(layers=1.0)
    gated = bg.Pipeline([L0(layers=0.5)]).run(bg.capture(deep(), tokens(4, 8)))
    with pytest.raises(PassError, match=r"layers have gates, which say what goes: Shrink\(score='gates'\)"):
        bg.Pipeline([Shrink(layers=(1,))]).run(gated)
    with pytest.raises(PassError, match="layers have gates already"):
        bg.Pipeline([L0(layers=0.5)]).run(gated)
