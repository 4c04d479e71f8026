"""Hostile adapters, of bmgraph and of PEFT: each is refused, or loaded as what it holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import bmgraph as bg
from bmgraph.deltas.peft_format import CONFIG, TENSORS
from bmgraph.deltas.registry import deltas_of
from bmgraph.ir.program import Program
from bmgraph.passes import Deltas, LoadDelta, LoRA
from bmgraph.serialize.bundle import MANIFEST
from tests.helpers.attacks.changes import (
    Change,
    both,
    cut,
    header,
    linked,
    piped,
    removed,
    say,
    tensors,
    unsay,
    written,
)
from tests.helpers.bundles import sign

PREFIX = "base_model.model."
A, B = f"{PREFIX}up.lora_A.weight", f"{PREFIX}up.lora_B.weight"


class Two(nn.Module):
    """Two linears and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x f[B, 6] -> f[B, 3]."""
        found: torch.Tensor = self.down(self.norm(self.up(x)))
        return found


def program() -> Program:
    """The program that adapters are put on."""
    torch.manual_seed(0)
    return bg.capture(Two().eval(), {"x": torch.randn(5, 6)})


def original(folder: Path) -> list[Path]:
    """A folder with an adapter, as bmgraph saves it."""
    adapted = bg.Pipeline([LoRA(r=2, alpha=4, targets=("*up*", "*down*"))]).run(program())
    for delta in deltas_of(adapted.graph):
        name = str(delta.tensors["b"].target)
        adapted.parameters[name] = torch.randn_like(adapted.tensor(name))
    adapted.save_delta(str(folder))
    return [folder]


def _edit(**values: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Change the factors A and B of the first linear."""
    names = {"a": A, "b": B}
    return tensors(
        TENSORS,
        lambda found: found.update({names[key]: make(found[names[key]]) for key, make in values.items()}),
    )


def _filled(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda value: torch.full_like(value, number)


def _add(name: str, value: torch.Tensor) -> Change:
    return tensors(TENSORS, lambda found: found.update({name: value}))


def _renamed(old: str, new: str) -> Change:
    return tensors(TENSORS, lambda found: found.update({new: found.pop(old)}))


def _many(count: int) -> bytes:
    entry = {"dtype": "F32", "shape": [0, 2], "data_offsets": [0, 0]}
    text = json.dumps({f"{PREFIX}m{i}.lora_A.weight": entry for i in range(count)}).encode()
    return len(text).to_bytes(8, "little") + text


WHOLE = f"{PREFIX}norm.weight"
LONG = "x" * 100_000

CASES: dict[str, Change] = {
    "factors that do not fit": _edit(a=lambda a: a[:1]),
    "factors of rank 0": both(_edit(a=lambda a: a[:0]), _edit(b=lambda b: b[:, :0])),
    "a factor of three axes": _edit(a=lambda a: a[None]),
    "a flat factor": _edit(b=lambda b: b.reshape(-1)),
    "a transposed factor": _edit(b=lambda b: b.T),
    "factors of another width": _edit(a=lambda a: torch.cat([a, a], 1)),
    "factors of integers": _edit(a=lambda a: a.int()),
    "factors of bytes": _edit(a=lambda a: a.to(torch.uint8)),
    "factors of truths": _edit(a=lambda a: a > 0),
    "complex factors": _edit(a=lambda a: a.to(torch.complex64)),
    "factors of 8 bits": _edit(a=lambda a: a.to(torch.float8_e4m3fn), b=lambda b: b.to(torch.float8_e5m2)),
    "factors of 64 bits": _edit(a=lambda a: a.double(), b=lambda b: b.double()),
    "factors of two dtypes": _edit(a=lambda a: a.half(), b=lambda b: b.bfloat16()),
    "a factor that is NaN": _edit(a=_filled(float("nan"))),
    "a factor that is infinite": _edit(b=_filled(float("inf"))),
    "factors beyond floats": _edit(a=_filled(3e38), b=_filled(3e38)),
    "factors of 64 bits beyond 32": both(_edit(a=lambda a: a.double().fill_(1e300), b=lambda b: b.double())),
    "a factor missing": tensors(TENSORS, lambda found: found.pop(A)),
    "a module that is none": both(_renamed(A, f"{PREFIX}nowhere.lora_A.weight"), _renamed(B, f"{PREFIX}nowhere.lora_B.weight")),
    "a module without a name": both(_renamed(A, f"{PREFIX}.lora_A.weight"), _renamed(B, f"{PREFIX}.lora_B.weight")),
    "a module of a long name": both(_renamed(A, f"{PREFIX}{LONG}.lora_A.weight"), _renamed(B, f"{PREFIX}{LONG}.lora_B.weight")),
    "an adapter of an adapter": _renamed(A, f"{PREFIX}up.lora_A.default.weight"),
    "a name of control characters": header(TENSORS, lambda found: found.update({"\x1b[2J": found.pop(A)})),
    "a tensor of the backbone": _add(f"{PREFIX}down.lora_weight", torch.ones(2)),
    "a magnitude": _add(f"{PREFIX}up.lora_magnitude_vector", torch.ones(4)),
    "a whole tensor of another shape": both(say(CONFIG, modules_to_save=["norm"]), _add(WHOLE, torch.ones(5))),
    "a whole tensor of integers": both(say(CONFIG, modules_to_save=["norm"]), _add(WHOLE, torch.ones(4).int())),
    "a complex whole tensor": both(say(CONFIG, modules_to_save=["norm"]), _add(WHOLE, torch.ones(4).to(torch.complex64))),
    "a whole tensor of 8 bits": both(say(CONFIG, modules_to_save=["norm"]), _add(WHOLE, torch.ones(4).to(torch.float8_e4m3fn))),
    "a whole tensor beyond floats": both(say(CONFIG, modules_to_save=["norm"]), _add(WHOLE, torch.full((4,), 1e300, dtype=torch.float64))),
    "a whole tensor that is missing": say(CONFIG, modules_to_save=["norm"]),
    "a whole tensor that the program lacks": both(say(CONFIG, modules_to_save=["more"]), _add(f"{PREFIX}more.weight", torch.ones(4))),
    "modules to save of text": say(CONFIG, modules_to_save="norm"),
    "modules to save without names": say(CONFIG, modules_to_save=[""]),
    "a rank that lies": say(CONFIG, r=64),
    "a rank of text": say(CONFIG, r="2"),
    "a rank pattern that lies": say(CONFIG, rank_pattern={"up": 7}),
    "a rank pattern of lists": say(CONFIG, rank_pattern=["up"]),
    "an alpha of text": say(CONFIG, lora_alpha="4"),
    "an alpha that is true": say(CONFIG, lora_alpha=True),
    "an alpha beyond floats": say(CONFIG, lora_alpha=1e308),
    "an alpha pattern of lists": say(CONFIG, alpha_pattern=["up"]),
    "an alpha pattern without an end": say(CONFIG, alpha_pattern={"(a+)+$": 5}),
    "an alpha pattern of text": say(CONFIG, alpha_pattern={"up": "5"}),
    "many alpha patterns": say(CONFIG, alpha_pattern={f"m{i}": 5 for i in range(300_000)}),
    "rslora of text": say(CONFIG, use_rslora="false"),
    "DoRA": say(CONFIG, use_dora=True),
    "DoRA of text": say(CONFIG, use_dora="false"),
    "a dropout above 1": say(CONFIG, lora_dropout=1.5),
    "a dropout below 0": say(CONFIG, lora_dropout=-0.5),
    "a bias that is trained": say(CONFIG, bias="all"),
    "an option that is not known": say(CONFIG, lora_gain=2),
    "another kind of adapter": say(CONFIG, peft_type="LOHA"),
    "an adapter without a kind": unsay(CONFIG, "peft_type"),
    "tied weights of text": say(CONFIG, ensure_weight_tying="false"),
    "a configuration that is deep": written(CONFIG, b"[" * 100_000),
    "a configuration that is wide": written(CONFIG, b'{"a": [' + b"0," * 10_000_000 + b"0]}"),
    "a configuration of no object": written(CONFIG, b"[]"),
    "a configuration that is noise": written(CONFIG, bytes(range(256))),
    "half of the tensors": cut(TENSORS),
    "tensors that overlap": header(TENSORS, lambda found: found[B].update(data_offsets=found[A]["data_offsets"])),
    "a shape that lies": header(TENSORS, lambda found: found[A].update(shape=[2**40, 2**40])),
    "a negative shape": header(TENSORS, lambda found: found[A].update(shape=[-2, -6])),
    "a header beyond the file": written(TENSORS, b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"),
    "many tensors": written(TENSORS, _many(150_000)),
    "tensors that are a link": linked(TENSORS, "/etc/passwd"),
    "tensors that are a pipe": piped(TENSORS),
    "no configuration": removed(CONFIG),
    "no tensors": removed(TENSORS),
    "pickled tensors": both(removed(TENSORS), written("adapter_model.bin", b"\x80\x04.")),
    "another backbone": say(MANIFEST, backbone="00" * 32),
    "a backbone of lists": say(MANIFEST, backbone=[[]]),
    "an engine": say(MANIFEST, kind="engine"),
}  # fmt: skip
"""Name of an attack -> what it changes in an adapter."""

HARMLESS = {"factors of 64 bits", "factors of two dtypes", "a whole tensor that is missing"}
"""Attacks whose adapter may be loaded: it is what it says."""


def attacked(originals: list[Path], folder: Path, names: list[str]) -> Iterator[tuple[str, Path]]:
    """A copy of an adapter with each of the attacks, signed again, or without a manifest, as PEFT's are: (name, folder)."""
    saved = originals[0]
    for index, name in enumerate(names):
        target = Path(shutil.copytree(saved, folder / str(index)))
        CASES[name](target)
        if index % 2 and json.loads((target / MANIFEST).read_text()) == json.loads(
            (saved / MANIFEST).read_text()
        ):
            (target / MANIFEST).unlink()
        elif all((target / file).is_file() for file in json.loads((target / MANIFEST).read_text())["files"]):
            sign(target)
        yield name, target
        shutil.rmtree(target)


def loader(warm: list[str]) -> Callable[[str], None]:
    """Loads adapters with LoadDelta and with Deltas; AssertionError if a loaded one does not compute what its files hold."""
    before = program()

    def load(path: str) -> None:
        resources = {"d": path}
        alone = bg.Pipeline([LoadDelta("d")]).run(before, resources=resources)
        _check(before, alone(**before.example), path)
        served = bg.Pipeline([Deltas(("d",))]).run(before, resources=resources)
        _check(before, served(**before.example, delta="d"), path)

    for path in warm:
        load(path)
    return load


def _check(before: Program, found: dict[str, torch.Tensor], path: str) -> None:
    from safetensors.torch import load_file

    factors, config = load_file(Path(path) / TENSORS), json.loads((Path(path) / CONFIG).read_text())
    model = Two()
    model.load_state_dict({name: value.clone() for name, value in before.parameters.items()})
    with torch.no_grad():
        for name in ("up", "down"):
            a, b = (factors[f"{PREFIX}{name}.lora_{letter}.weight"].float() for letter in "AB")
            getattr(model, name).weight += config["lora_alpha"] / config["r"] * (b @ a)
        expected = model(before.example["x"])
    value = next(iter(found.values()))
    assert torch.allclose(value, expected, rtol=1e-2, atol=1e-2), (
        f"off by {float((value - expected).abs().max())}"
    )
