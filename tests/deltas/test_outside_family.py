"""A family of deltas from another package, known by its entry point alone, goes where the built-in ones go: a residual branch
is scaled, y = x + s * f(x), with one learned scale a channel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import bmgraph as bg
from bmgraph.api import (
    Change,
    Delta,
    DeltaFamily,
    LinearFamily,
    NewDelta,
    PassError,
    attach_all,
    delta_base,
    delta_role,
    deltas_of,
    find,
)
from bmgraph.backends import AdamW, Torch
from bmgraph.deltas.backbone import backbone_of
from bmgraph.deltas.peft_format import TENSORS
from bmgraph.deltas.registry import families
from bmgraph.errors import BundleError, InputError, VerificationError
from bmgraph.ir.node_role import ends_delta, is_delta
from bmgraph.ir.program import Program
from bmgraph.passes import Deltas, LoadDelta, LoRA, Merge, MoEfy, Quantize, SoftPrompt
from bmgraph.serialize.opened import open_user_file
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors
from bmgraph.utils.digest import fingerprint
from bmgraph.verify.metrics import relative_error
from tests.helpers.family_package import install_families
from tests.helpers.models import tokens

SITES = {"up.weight", "down.weight"}
ROLE = "delta.scaled_residual"


class Residual(nn.Module):
    """x + down(relu(up(x))), then a head with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3, bias=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x + self.down(self.up(x).relu())
        scores = self.head(x)
        return {"loss": nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()), "scores": scores}


@pytest.fixture(scope="module", autouse=True)
def _package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        assert "scaled_residual" not in {family.name for family in families()}
        install_families(folder)  # after the families were looked for
        yield


def batch(rows: int = 4, length: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (rows, length), generator=generator)
    return {"x": torch.randn(rows, length, 8, generator=generator), "labels": labels}


@pytest.fixture(scope="module")
def plain() -> Program:
    torch.manual_seed(0)
    return bg.capture(Residual(), batch())


def scaled(program: Program, *targets: str, per: str = "channel", whole: tuple[str, ...] = ()) -> Program:
    from scaled_residual import ScaleResiduals  # type: ignore[import-not-found]

    return bg.Pipeline([ScaleResiduals(targets=targets or ("up", "down"), per=per, whole=whole)]).run(program)


def moved(program: Program, seed: int = 0) -> Program:
    """The program with other values for what trains, as if trained."""
    generator, copy = torch.Generator().manual_seed(seed), program.clone()
    for name in sorted(set(program.parameters) - program.frozen):
        copy.parameters[name] = copy.parameters[name] + torch.rand(
            copy.parameters[name].shape, generator=generator
        )
    return copy


def loaded(program: Program, folder: Path, name: str = "d") -> Program:
    return bg.Pipeline([LoadDelta(name)]).run(program, resources={name: folder})


def test_it_is_attached_and_recognised(plain: Program) -> None:
    tuned = scaled(plain)
    assert torch.equal(tuned(**batch())["scores"], plain(**batch())["scores"])
    assert {(delta.family.name, delta.site) for delta in deltas_of(tuned.graph)} == {
        ("scaled_residual", site) for site in SITES
    }
    assert set(tuned.parameters) - tuned.frozen == {f"{site}_scaled_residual_scale" for site in SITES}
    assert set(backbone_of(tuned)) == set(plain.parameters)
    assert fingerprint(backbone_of(tuned)) == plain.fingerprint
    assert tuned.structure().roles == plain.structure().roles
    assert tuned.structure().feedforwards == plain.structure().feedforwards


def test_it_is_trained_saved_and_loaded_to_the_same_bits(plain: Program, tmp_path: Path) -> None:
    trainer = bg.compile(scaled(plain), backend=Torch(optimizer=AdamW(lr=1e-1)))
    trainer.step(batch())
    trainer.save(tmp_path / "checkpoint")
    trainer.save_delta(tmp_path / "d")
    again = loaded(plain, tmp_path / "d")
    assert torch.equal(again(**batch(seed=1))["scores"], trainer.program()(**batch(seed=1))["scores"])
    assert not torch.equal(again(**batch())["scores"], plain(**batch())["scores"])
    assert {"down.weight"} < {edit.site for edit in again.history[-1].edits}
    resumed = bg.compile(scaled(plain), backend=Torch(optimizer=AdamW(lr=1e-1)))
    resumed.load(tmp_path / "checkpoint")
    assert resumed.step(batch(seed=2)).loss == trainer.step(batch(seed=2)).loss
    again.save(str(tmp_path / "program"))
    back = bg.load(tmp_path / "program")
    assert [delta.site for delta in deltas_of(back.graph)] == [delta.site for delta in deltas_of(again.graph)]
    torch.manual_seed(1)
    other = bg.capture(Residual(), batch())
    with pytest.raises(PassError, match="another backbone"):
        loaded(other, tmp_path / "d")


def test_it_is_merged_in_its_order_among_others(plain: Program) -> None:
    for passes in (("lora", "scale"), ("scale", "lora"), ("scale",)):
        tuned = plain
        for name in passes:
            tuned = scaled(tuned) if name == "scale" else bg.Pipeline([LoRA(r=2, targets=("up",))]).run(tuned)
        tuned = moved(tuned)
        merged = bg.Pipeline([Merge()]).run(tuned)
        assert set(merged.parameters) == set(plain.parameters)
        assert not torch.equal(merged.parameters["up.bias"], plain.parameters["up.bias"])
        assert relative_error(merged(**batch())["scores"], tuned(**batch())["scores"]) < 1e-5


def test_a_module_trains_whole_beside_it(plain: Program, tmp_path: Path) -> None:
    tuned = moved(scaled(plain, whole=("head",)))
    tuned.save_delta(str(tmp_path / "d"))
    again = loaded(plain, tmp_path / "d")
    assert again.trained_whole == {"head.weight"}
    assert torch.equal(again(**batch())["scores"], tuned(**batch())["scores"])
    with pytest.raises(PassError, match=r"changes head.weight whole \(modules_to_save\), which a row cannot"):
        bg.Pipeline([Deltas(("d",))]).run(plain, resources={"d": tmp_path / "d"})


def test_a_bias_is_merged_where_there_was_none_and_where_others_read_it(tmp_path: Path) -> None:
    """A layer that is used twice, of which one use has the delta, and one without a bias."""
    from scaled_residual import Shift

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(self.inner(x).relu()))

    x = torch.randn(3, 8)
    program = bg.capture(Twice(), {"x": x})
    shifted, shift = program.clone(), Change({"shift": torch.arange(8.0)})
    new = [(linear, NewDelta(Shift(), linear.name, linear.name, shift)) for linear in find(program).linears]
    attach_all(shifted, new, by="test")
    shifted.save_delta(str(tmp_path / "d"))
    again = loaded(program, tmp_path / "d")
    with again.edit() as editor:
        first = next(delta for delta in deltas_of(editor.graph) if delta.site == "inner.weight")
        first.total.replace_all_uses_with(first.linear)
    merged = bg.Pipeline([Merge()]).run(again)
    assert not deltas_of(merged.graph)
    assert relative_error(merged(x=x)["output"], again(x=x)["output"]) < 1e-5
    assert torch.equal(merged.parameters["inner.bias"], program.parameters["inner.bias"])
    assert set(merged.parameters) - set(program.parameters) == {
        "inner.weight_merged", "inner.bias_merged", "head.bias_merged"
    }  # fmt: skip


def test_what_cannot_be_merged_is_declined(plain: Program) -> None:
    codes = bg.Pipeline([Quantize("int8", activations="none", smallest=1)]).run(scaled(plain))
    with pytest.raises(PassError, match=r"down.weight: its weight is int8 codes"):
        bg.Pipeline([Merge()]).run(codes)


def test_rows_choose_among_them_and_low_rank_ones(plain: Program, tmp_path: Path) -> None:
    programs = {
        "one": moved(scaled(plain), 1),
        "layer": moved(scaled(plain, "down", per="layer"), 2),
        "lora": moved(bg.Pipeline([LoRA(r=2, targets=("up",))]).run(plain), 3),
    }
    for name, program in programs.items():
        program.save_delta(str(tmp_path / name))
    resources = {name: tmp_path / name for name in programs}
    together = bg.Pipeline([Deltas(tuple(programs))]).run(plain, resources=resources)
    found = together(**batch(), delta=["lora", "one", None, "layer"])["scores"]
    for row, program in enumerate((programs["lora"], programs["one"], plain, programs["layer"])):
        assert relative_error(found[row], program(**batch())["scores"][row]) < 1e-5
    assert all(delta.bound for delta in deltas_of(together.graph))
    with pytest.raises(InputError, match="none for rows that choose"):
        together.save_delta(str(tmp_path / "rows"))


def test_a_layer_below_what_stays_is_not_folded(plain: Program, tmp_path: Path) -> None:
    """Scales above a delta that rows choose: folding them into the weight would leave the delta unscaled."""
    moved(bg.Pipeline([LoRA(r=2, targets=("up",))]).run(plain)).save_delta(str(tmp_path / "lora"))
    tuned = bg.Pipeline([Deltas(("lora",))]).run(scaled(plain, "up"), resources={"lora": tmp_path / "lora"})
    with pytest.raises(
        PassError, match="is for rows that choose their own and stays, and their order matters"
    ):
        bg.Pipeline([Merge()]).run(moved(tuned))


def test_two_families_are_not_saved_in_one_folder(plain: Program, tmp_path: Path) -> None:
    both = bg.Pipeline([LoRA(r=2, targets=("up",))]).run(scaled(plain))
    with pytest.raises(InputError, match="of the families lora and scaled_residual, and a folder holds one"):
        both.save_delta(str(tmp_path / "d"))
    head = bg.Pipeline([LoRA(r=2, targets=("up",), modules_to_save=("head",))]).run(plain)
    alone = moved(bg.Pipeline([Merge()]).run(head))
    with pytest.raises(InputError, match="no delta to save"):
        alone.save_delta(str(tmp_path / "d"))


def test_it_is_lowered(plain: Program, tmp_path: Path) -> None:
    tuned = moved(scaled(plain))
    engine = bg.compile(tuned, backend="onnx")
    engine.save(tmp_path / "engine")
    found = bg.load(tmp_path / "engine")(**batch(3, 4, 5))["scores"]
    assert relative_error(torch.as_tensor(found), tuned(**batch(3, 4, 5))["scores"]) < 1e-4


def test_a_wrong_one_does_not_pass(plain: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The proofs hold foreign families to what they say: an attached delta to its folded weights."""
    import scaled_residual

    moved(scaled(plain)).save_delta(str(tmp_path / "d"))
    kind = scaled_residual.ScaledResidual
    monkeypatch.setattr(kind, "folded", lambda self, change, weight, bias: (weight, bias))
    with pytest.raises(VerificationError, match="an output is not scaled"):
        scaled(plain)
    with pytest.raises(VerificationError, match="it does not compute 'd'"):
        loaded(plain, tmp_path / "d")
    monkeypatch.undo()
    neutral = Change({"scale": torch.ones(2, 1)})
    monkeypatch.setattr(kind, "stacked", lambda self, changes, count: neutral)
    with pytest.raises(VerificationError, match="rows that choose 'd' are not what it gives"):
        bg.Pipeline([Deltas(("d",))]).run(plain, resources={"d": tmp_path / "d"})


def test_stacked_tensors_of_wrong_shapes_are_refused_by_name(
    plain: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import scaled_residual

    moved(scaled(plain)).save_delta(str(tmp_path / "d"))
    for shape, said in (
        ((3, 1), r"down.weight: the family 'scaled_residual' stacks 1 deltas as scale of shape \[3, 1\]: expected 2 entries"),
        ((2, 5), r"deltas.*: it adds aten.mul.Tensor at down.weight, which does not take linear.*\[.*, 8\].*\[.*, 5\]"),
    ):  # fmt: skip
        wrong = Change({"scale": torch.ones(shape)})
        monkeypatch.setattr(
            scaled_residual.ScaledResidual, "stacked", lambda self, changes, count, wrong=wrong: wrong
        )
        with pytest.raises(PassError, match=said):
            bg.Pipeline([Deltas(("d",))]).run(plain, resources={"d": tmp_path / "d"})


def test_experts_decline_what_is_no_sum(plain: Program) -> None:
    tuned = scaled(plain, "up")
    with pytest.raises(PassError, match=r"the delta on up\.weight does not add to its output"):
        bg.Pipeline([MoEfy(experts=4)]).run(tuned, calibration=[batch()])


def test_experts_keep_the_family_of_what_adds(program: Program) -> None:
    tuned = moved(bg.Pipeline([LoRA(r=2, roles=("feedforward.*",))]).run(program))
    for node in tuned.graph.nodes:
        if is_delta(node):
            node.meta["part"] = f"{ROLE}.total" if ends_delta(node) else ROLE
    split = bg.Pipeline([MoEfy(experts=4)]).run(tuned, calibration=[tokens()])
    assert {(delta.family.name, delta.bound) for delta in deltas_of(split.graph)} == {
        ("scaled_residual", "experts that each token chooses")
    }
    assert not any(node.meta.get("part") == "delta" for node in split.graph.nodes)
    assert set(backbone_of(split)) & set(tuned.parameters) == set(backbone_of(tuned)) & set(split.parameters)


def test_what_a_family_does_not_say_is_refused_by_its_name(
    plain: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import scaled_residual

    tuned = moved(scaled(plain))
    tuned.save_delta(str(tmp_path / "d"))
    kind = scaled_residual.ScaledResidual
    for name, passes, message in (
        (
            "attach_rows",
            [Deltas(("d",))],
            "delta 'd' in .* is of the family 'scaled_residual', of which rows cannot",
        ),
        (
            "why_not_folded",
            [Merge()],
            "down.weight: a delta of the family 'scaled_residual' is no change of a weight",
        ),
        ("attach", [LoadDelta("d")], "of the family 'scaled_residual', which cannot be put on a program"),
        ("loaded", [LoadDelta("d")], "of the family 'scaled_residual', which is not loaded from folders"),
    ):
        on = tuned if name == "why_not_folded" else plain
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, getattr(DeltaFamily, name))
            with pytest.raises((PassError, BundleError), match=message):
                bg.Pipeline(passes).run(on, resources={"d": tmp_path / "d"})


def test_what_is_of_no_family_is_an_error(plain: Program, tmp_path: Path) -> None:
    strange = scaled(plain)
    strange.save(str(tmp_path / "program"))
    moved(strange).save_delta(str(tmp_path / "d"))
    as_lora = strange.clone()
    for node in as_lora.graph.nodes:
        if node.meta.get("part") == f"{ROLE}.total":
            node.meta["part"], node.target = "delta", torch.ops.aten.add.Tensor
    for act in (lambda: deltas_of(as_lora.graph), lambda: as_lora.save_delta(str(tmp_path / "x"))):
        with pytest.raises(
            PassError, match=r"the delta on \w+.weight, added by scaleresiduals.* is of no family"
        ):
            act()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bmgraph.deltas.registry.ENTRY_POINTS", "nowhere")
        found = bg.load(tmp_path / "program")
        assert torch.equal(found(**batch())["scores"], strange(**batch())["scores"])
        for passes in ([Merge()], [LoadDelta("d")]):
            with pytest.raises((PassError, BundleError), match=r"is of no family|type 'SCALED_RESIDUAL'"):
                bg.Pipeline(passes).run(found, resources={"d": tmp_path / "d"})
        with pytest.raises(PassError, match=f"its nodes have the role '{ROLE}'.*install the package"):
            found.save_delta(str(tmp_path / "y"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numbers": {}}, "names other modules in numbers"),
        ({"numbers": 3}, "has no numbers and options"),
        ({"r": 8}, "has r, which deltas of the family 'scaled_residual' do not have"),
        (
            {"options": {"x": [1]}},
            "'x' in options, which the family 'scaled_residual' does not have: expected",
        ),
        ({"numbers": {"up": {"s": True}, "down": {}}}, "has s='True': expected a number"),
        (
            {"numbers": {"up": {"s": 1.0}, "down": {}}},
            "has the numbers s of up: expected none, as the family",
        ),
        ({"ensure_weight_tying": "false"}, "ensure_weight_tying='false': expected true or false"),
        ({"peft_type": ["LORA"]}, "only LORA, .*SCALED_RESIDUAL, SHIFT can be loaded"),
    ],
)
def test_corrupt_folders_are_refused(
    plain: Program, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    import json

    moved(scaled(plain)).save_delta(str(tmp_path / "d"))
    (tmp_path / "d" / "manifest.json").unlink()
    config = tmp_path / "d" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(BundleError, match=message):
        loaded(plain, tmp_path / "d")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(12, dtype=torch.int32), "scale of up is torch.int32, not floating-point numbers"),
        (torch.ones(12).to(torch.float8_e4m3fn), "holds scale of up as torch.float8_e4m3fn: expected one of"),
        (torch.ones(12, 1), r"scale of up has the shape \[12, 1\]: expected 1 axes of at least one entry"),
        (torch.tensor(1.0), r"scale of up has the shape \[\]: expected 1 axes"),
        (torch.ones(0), r"scale of up has the shape \[0\]: expected 1 axes of at least one entry"),
        (torch.full((12,), float("nan")), "scale of up holds NaN or infinity"),
        (torch.full((12,), 1e300, dtype=torch.float64), "scale of up is beyond what fp32 holds"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(
    plain: Program, tmp_path: Path, value: torch.Tensor, message: str
) -> None:
    moved(scaled(plain)).save_delta(str(tmp_path / "d"))
    (tmp_path / "d" / "manifest.json").unlink()
    tensors = dict(read_tensors(open_user_file(tmp_path / "d" / TENSORS)))
    write_tensors(tmp_path / "d" / TENSORS, {**tensors, "base_model.model.up.scaled_residual_scale": value})
    with pytest.raises(BundleError, match=message):
        loaded(plain, tmp_path / "d")


def test_what_a_family_cannot_size_is_refused(
    plain: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import scaled_residual

    monkeypatch.setattr(scaled_residual.ScaledResidual, "axes", {})
    moved(scaled(plain)).save_delta(str(tmp_path / "d"))
    (tmp_path / "d" / "manifest.json").unlink()
    tensors = dict(read_tensors(open_user_file(tmp_path / "d" / TENSORS)))
    key = "base_model.model.up.scaled_residual_scale"
    write_tensors(tmp_path / "d" / TENSORS, {**tensors, key: torch.tensor(1.0)})
    with pytest.raises(BundleError, match=r"scale\[\] of up are not what the family 'scaled_residual' saves"):
        loaded(plain, tmp_path / "d")

    def read(self: LinearFamily, total: fx.Node) -> Delta:
        """One that a family writes itself, and that forgets its numbers."""
        scale: Any = total.args[1]
        return Delta(self, str(total.meta["site"]), delta_base(total), total, tensors={"scale": scale})

    monkeypatch.setattr(scaled_residual.ScaledResidual, "read", read)
    monkeypatch.setattr(scaled_residual.ScaledResidual, "numbers", ("s",))
    with pytest.raises(InputError, match="has the numbers none, and the family declares s"):
        moved(scaled(plain)).save_delta(str(tmp_path / "e"))


@pytest.mark.parametrize("name", ["total", "Scaled", "a.b", ""])
def test_a_family_has_the_name_of_an_identifier(name: str) -> None:
    with pytest.raises(InputError, match="is no name of a family of deltas"):
        delta_role(name)


def test_two_families_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        __import__("bmgraph.deltas.registry", fromlist=["FAMILIES"]).FAMILIES,
        "ScaledResidual",
        "scaled_residual",
    )
    with pytest.raises(PassError, match="two families of deltas have the name scaled_residual"):
        families()


def test_a_prompt_beside_it_is_declined_by_name() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids).cumsum(1))

    program = bg.capture(Words(), {"ids": torch.randint(0, 20, (2, 5))})
    both = moved(scaled(bg.Pipeline([SoftPrompt(tokens=2)]).run(program), "head"))
    merged = bg.Pipeline([Merge()]).run(both)
    (declined,) = merged.history[-1].declined
    assert "positions in front of the text" in declined.what
