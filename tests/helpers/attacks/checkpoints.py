"""Hostile training checkpoints, signed again: each is refused, and nothing of it is taken over, or is loaded as what it holds."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.errors import BmgraphError
from bmgraph.runtime.training.checkpoint import COMPUTATION_FILE, STATE_FILE
from bmgraph.runtime.training.trainer import Trainer
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
from tests.helpers.bundles import edit_json, sign

WEIGHT, MEAN, SQUARE = "value/layer.weight", "exp_avg/layer.weight", "exp_avg_sq/layer.weight"


class Normed(nn.Module):
    """A frozen layer, a trained one, a batch norm, whose statistics training changes, and a constant buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.layer, self.norm = nn.Linear(4, 4), nn.Linear(4, 3), nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.tensor([0.0, 0.5, 1.0]))
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """x f[B, 4], y i64[B] -> loss f[]."""
        return {"loss": nn.functional.cross_entropy(self.norm(self.layer(self.frozen(x))) + self.mask, y)}


def trained() -> Trainer:
    """A trainer after two steps."""
    torch.manual_seed(0)
    batch = {"x": torch.randn(6, 4), "y": torch.randint(0, 2, (6,))}
    trainer: Trainer = bg.compile(Normed(), example=batch, backend=Torch(optimizer=AdamW(lr=1e-2)))
    trainer.step(batch)
    trainer.step(batch)
    return trainer


def _in(file: str, **values: Any) -> Change:
    """Change tensors of a file, by short names."""
    names = {
        "weight": WEIGHT,
        "mean": MEAN,
        "square": SQUARE,
        "mask": "value/mask",
        "running": "value/norm.running_var",
    }

    def edit(found: dict[str, torch.Tensor]) -> None:
        for name, make in values.items():
            found[names[name]] = make(found[names[name]])

    return tensors(file, edit)


def _last(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(value: torch.Tensor) -> torch.Tensor:
        value.view(-1)[-1] = number
        return value

    return change


def _state(**values: Any) -> Change:
    return _in(STATE_FILE, **values)


def _renamed(old: str, new: str) -> Change:
    return tensors(STATE_FILE, lambda found: found.update({new: found.pop(old)}))


def _longer(folder: Path) -> None:
    text = (folder / COMPUTATION_FILE).read_text()
    (folder / COMPUTATION_FILE).write_text(
        text.replace("cross_entropy", "mse_loss").replace("addmm", "mm") + "\nmore"
    )


def _unlisted(file: str) -> Change:
    return lambda folder: edit_json(folder / MANIFEST, lambda manifest: manifest["files"].pop(file) and None)


NAN, HUGE = float("nan"), 2**62

CASES: dict[str, Change] = {
    "steps without moments": both(
        say(MANIFEST, moments=[]), tensors(STATE_FILE, lambda found: [found.pop(name) for name in list(found) if "exp_avg" in name])
    ),
    "moments that the manifest does not name": say(MANIFEST, moments=[]),
    "moments before any step": say(MANIFEST, steps=0),
    "a moment of two": say(MANIFEST, moments=["exp_avg"]),
    "a moment twice": say(MANIFEST, moments=["exp_avg", "exp_avg", "exp_avg_sq"]),
    "moments that are no names": say(MANIFEST, moments=[{}, ["exp_avg"], None]),
    "values as a moment": say(MANIFEST, moments=["value", "exp_avg", "exp_avg_sq"]),
    "many moments": say(MANIFEST, moments=["exp_avg"] * 400_000),
    "steps below 0": say(MANIFEST, steps=-1),
    "steps beyond floats": say(MANIFEST, steps=HUGE),
    "half a step": say(MANIFEST, steps=2.5),
    "steps that are true": say(MANIFEST, steps=True),
    "a seed of text": say(MANIFEST, seed="0"),
    "a seed of 64 bits": say(MANIFEST, seed=2**64 - 1),
    "a seed below 0": say(MANIFEST, seed=-(2**63)),
    "another optimizer": say(MANIFEST, optimizer="SGD"),
    "no optimizer": unsay(MANIFEST, "optimizer", "moments"),
    "a weight that is NaN": _state(weight=_last(NAN)),
    "a moment that is infinite": _state(mean=_last(float("inf"))),
    "a square below 0": _state(square=_last(-1e-30)),
    "a variance below 0": _state(running=_last(-1.0)),
    "a constant that differs": _state(mask=_last(9.0)),
    "a transposed weight": _state(weight=lambda value: value.T),
    "a weight of another dtype": _state(weight=lambda value: value.double()),
    "a weight of integers": _state(weight=lambda value: value.int()),
    "a moment of another dtype": _state(mean=lambda value: value.to(torch.complex64)),
    "an empty weight": _state(weight=lambda value: value[:0]),
    "a flat weight": _state(weight=lambda value: value.reshape(-1)),
    "a weight under another name": _renamed(WEIGHT, "value/layer.weights"),
    "a weight missing": tensors(STATE_FILE, lambda found: found.pop(WEIGHT)),
    "a weight more": tensors(STATE_FILE, lambda found: found.update({"value/frozen.weight": torch.ones(4, 4)})),
    "a shape that lies": header(STATE_FILE, lambda found: found[WEIGHT].update(shape=[HUGE, 0, 12])),
    "tensors that overlap": header(STATE_FILE, lambda found: found[MEAN].update(data_offsets=found[WEIGHT]["data_offsets"])),
    "a header beyond the file": written(STATE_FILE, b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"),
    "a header of many tensors": written(
        STATE_FILE,
        (lambda text: len(text).to_bytes(8, "little") + text)(
            json.dumps({f"value/{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(150_000)}).encode()
        ),
    ),
    "half of the tensors": cut(STATE_FILE),
    "tensors that are a link": linked(STATE_FILE, "/etc/passwd"),
    "tensors that are a pipe": piped(STATE_FILE),
    "no tensors": both(removed(STATE_FILE), _unlisted(STATE_FILE)),
    "another computation": _longer,
    "a computation of lines alone": written(COMPUTATION_FILE, b"\n" * 50_000_000),
    "a computation that is noise": written(COMPUTATION_FILE, bytes(range(256)) * 4000),
    "no computation": both(removed(COMPUTATION_FILE), _unlisted(COMPUTATION_FILE)),
    "no frozen parameters": say(MANIFEST, frozen={}),
    "other frozen parameters": say(MANIFEST, frozen={"frozen.weight": "00", "frozen.bias": "00"}),
    "frozen parameters of lists": say(MANIFEST, frozen={"frozen.weight": [[]], "frozen.bias": None}),
    "settings of lists": say(MANIFEST, settings={"lr": [[[]]], "more": {"a": None}}),
    "a program": say(MANIFEST, kind="program"),
    "versions that differ": both(say(MANIFEST, versions=["x"] * 9), _longer),
}  # fmt: skip
"""Name of an attack -> what it changes in a checkpoint of `trained`."""

HARMLESS = {
    "a seed of 64 bits", "a seed below 0", "no computation", "settings of lists", "versions that differ",
}  # fmt: skip
"""Attacks whose checkpoint may be loaded: it is what it says, or the user is told."""


def original(folder: Path) -> list[Path]:
    """A folder with a checkpoint."""
    trained().save(folder)
    return [folder]


def attacked(saved: list[Path], folder: Path, names: list[str]) -> Iterator[tuple[str, Path]]:
    """A copy of a checkpoint with each of the attacks, signed again: (name, folder)."""
    for index, name in enumerate(names):
        target = Path(shutil.copytree(saved[0], folder / str(index)))
        CASES[name](target)
        if all((target / file).is_file() for file in json.loads((target / MANIFEST).read_text())["files"]):
            sign(target)
        yield name, target
        shutil.rmtree(target)


def loader(warm: list[str]) -> Callable[[str], None]:
    """Loads checkpoints; AssertionError if a refused one changed the trainer, or a loaded one is not what its file holds."""
    from safetensors.torch import load_file

    trainer = trained()
    for path in warm:
        trainer.load(path)

    def load(path: str) -> None:
        before = _seen(trainer)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer.load(path)
        except BmgraphError:
            assert _seen(trainer) == before, "a refused checkpoint changed the trainer"
            raise
        stored = load_file(Path(path) / STATE_FILE)
        for name, tensor in trainer.state.tensors.items():
            place = trainer.state.places[name]
            for key, value in {"value": tensor, **trainer.update.moments.get(name, {})}.items():
                for part, whole in place.join(value, trainer.state.ranks).items():
                    if f"{key}/{part}" in stored or name in trainer.state.trained:
                        assert torch.equal(whole, stored[f"{key}/{part}"]), (
                            f"{key} of {part} is not what the file holds"
                        )
        trainer.step({"x": torch.ones(6, 4), "y": torch.zeros(6, dtype=torch.int64)})

    return load


def _seen(trainer: Trainer) -> tuple[Any, ...]:
    state = [
        sorted((key, value.numpy().tobytes()) for key, value in moments.items())
        for moments in trainer.update.moments.values()
    ]
    values = {name: value.detach().numpy().tobytes() for name, value in trainer.state.tensors.items()}
    return values, state, trainer.update.count, trainer.steps, trainer.seed
