"""`trainer.fit`: steps, metrics, validation, checkpoints, and exact resumption by any loader."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.errors import BundleError, InputError
from bmgraph.passes import ZeRO
from bmgraph.runtime.training.interrupt import Interrupts
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.serialize.plain_values import from_plain_json, plain_json
from tests.helpers.ranks import run_ranks
from tests.helpers.sweep import sweep
from tests.helpers.words import Batch, Rows, Stateful, batch_of, captured_words

ALL = [batch_of(seed) for seed in range(5)]
STEPS = 8


def built(*passes: Any, batch: str = "whole") -> Trainer:
    options = Torch(optimizer=AdamW(lr=0.01), batch=batch)
    trainer: Trainer = bg.compile(captured_words(), passes=list(passes), backend=options)
    return trainer


def shuffled() -> DataLoader[Batch]:
    """Shuffles by torch's global generator, from which its rows draw noise too."""
    return DataLoader(Rows(noisy=True), batch_size=7, shuffle=True)


LOADERS: dict[str, Callable[[], Any]] = {
    "list": lambda: ALL,
    "DataLoader": shuffled,
    "stateful": lambda: Stateful(ALL),
}


def values(trainer: Trainer) -> list[torch.Tensor]:
    return list(trainer.program().parameters.values())


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", sweep(("list", "DataLoader", "stateful"), ("DataLoader",)))
def test_a_resumed_run_is_bit_equal(tmp_path: Path, kind: str) -> None:
    whole, valid = built(), [batch_of(30)]
    torch.manual_seed(3)
    done = whole.fit(LOADERS[kind](), STEPS, eval=valid, eval_every=3, metrics=tmp_path / "whole.jsonl")
    drawn = torch.rand(1)
    options: dict[str, Any] = {"save": tmp_path / "run", "resume": "auto", "eval": valid, "eval_every": 3}
    torch.manual_seed(3)
    built().fit(LOADERS[kind](), STEPS - 1, save_every=3, keep=2, **options)
    names = {name for name in os.listdir(tmp_path / "run") if name != "tensorboard"}
    assert names == {"metrics.jsonl", "step-00000006", "step-00000007"}
    shutil.rmtree(tmp_path / "run" / "step-00000007")
    loader, resumed = LOADERS[kind](), built()
    torch.manual_seed(99)  # the position brings its generators
    again = resumed.fit(loader, STEPS, **options)
    assert torch.equal(torch.rand(1), drawn)
    assert all(torch.equal(one, other) for one, other in zip(values(whole), values(resumed)))
    assert again.loss == done.loss
    assert again.evaluation == done.evaluation == whole.evaluate(valid)
    skipped = any("batches of epoch 1 are read and skipped" in note for note in again.notes)
    assert skipped is (kind != "stateful")
    if kind == "stateful":
        assert loader.read == 2  # one left of the epoch, one of the next
    curves = [
        [(item["step"], item["loss"], item.get("eval")) for item in records(tmp_path / path)]
        for path in ("whole.jsonl", "run/metrics.jsonl")
    ]
    assert curves[0] == curves[1]
    assert [item[0] for item in curves[0]] == list(range(1, STEPS + 1))
    assert {"rate", "count", "epoch", "tokens_per_second", "items_per_second", "memory"} <= set(
        records(tmp_path / "whole.jsonl")[0]
    )


@pytest.mark.slow
def test_a_second_call_goes_on_in_the_same_loader() -> None:
    one, two, loader = built(), built(), Stateful(ALL)
    one.fit(ALL, 7)
    two.fit(loader, 3)
    two.fit(loader, 7)
    assert all(torch.equal(mine, other) for mine, other in zip(values(one), values(two)))
    assert two.fit(loader, 7).loss is None


def test_a_damaged_newest_checkpoint_is_skipped(tmp_path: Path) -> None:
    built().fit(ALL, 4, save=tmp_path, save_every=2)
    state = tmp_path / "step-00000004" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    trainer = built()
    done = trainer.fit(ALL, 2, save=tmp_path, resume="auto")
    assert (trainer.steps, done.path) == (2, tmp_path / "step-00000002")
    assert "step-00000004 is skipped, since it is damaged" in done.notes[0]
    with pytest.raises(
        InputError,
        match='holds checkpoints of an earlier run, up to step 4: go on from it with resume="auto"',
    ):
        built().fit(ALL, 5, save=tmp_path)


@pytest.mark.slow
def test_a_whole_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    built().fit(ALL, 1, save=tmp_path)
    from bmgraph.backends import SGD

    other = bg.compile(captured_words(), backend=Torch(optimizer=SGD()))
    with pytest.raises(BundleError, match="was saved with AdamW, this trainer has SGD"):
        other.fit(ALL, 2, save=tmp_path, resume="auto")


class Interrupting:
    """A loader that sends a signal to the process when a batch is taken."""

    def __init__(self, at: int, number: int) -> None:
        self.at, self.number = at, number

    def __iter__(self) -> Iterator[Batch]:
        for index, batch in enumerate(ALL):
            if index == self.at:
                os.kill(os.getpid(), self.number)
            yield batch


@pytest.fixture
def listening() -> Iterator[None]:
    """Ctrl-C is ignored in what a shell starts behind it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), pytest.param(signal.SIGTERM, SystemExit, marks=pytest.mark.slow)],
)
def test_an_interrupt_completes_the_step_and_saves(
    tmp_path: Path, number: int, error: type[BaseException]
) -> None:
    before, trainer = signal.getsignal(number), built()
    with pytest.raises(error):
        trainer.fit(Interrupting(2, number), STEPS, save=tmp_path)
    assert trainer.steps == 3
    assert signal.getsignal(number) is before
    resumed, whole = built(), built()
    resumed.fit(ALL, STEPS, save=tmp_path, resume="auto")
    whole.fit(ALL, STEPS)
    assert all(torch.equal(one, other) for one, other in zip(values(whole), values(resumed)))


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.asked is None
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
def test_a_second_interrupt_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher passes the same one on
        assert interrupts.asked == signal.SIGINT
        monkeypatch.setattr("bmgraph.runtime.training.interrupt.ECHO_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_loader_that_can_be_read_once_ends_the_run() -> None:
    trainer = built()
    done = trainer.fit(iter(ALL), STEPS)
    assert (trainer.steps, done.steps) == (5, 5)
    assert "the data ended after 5 of 8 steps" in done.notes[0]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "the loader gives no batches"),
        ([(1, 2)], {}, "the loader gives a tuple: give dicts of tensors by input name"),
        (ALL, {"keep": 0, "save": "x"}, "keep=0: give a whole number of 1 or more"),
        (ALL, {"eval_every": 2}, "eval_every=2 needs eval="),
        (ALL, {"resume": "auto"}, 'resume="auto" needs save='),
        (ALL, {"tensorboard": "x"}, "TensorBoard is not installed"),
    ],
)
def test_what_is_not_valid(
    given: Any, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bmgraph.runtime.training.metrics.find_spec", lambda name: None)
    with pytest.raises(InputError, match=message):
        built().fit(given, 2, **options)


def test_plain_values_and_no_others() -> None:
    value = {
        "a": [1, 2.5, float("inf"), None, True],
        3: (b"\1", "x"),
        "$b": torch.arange(3),
        "c": {"d": torch.zeros(0)},
    }
    found = from_plain_json(json.loads(json.dumps(plain_json(value, "v"))), "file")
    assert found["a"] == value["a"]
    assert found[3] == value[3]
    assert torch.equal(found["$b"], torch.arange(3))
    assert found["c"]["d"].shape == (0,)
    with pytest.raises(InputError, match=r"v\['a'\]\[0\] is a set"):
        plain_json({"a": [{1}]}, "v")
    for altered in (
        {"$tensor": ["f32", [9], "AAAA"]},
        {"$what": 1},
        {"$dict": 3},
        {"$bytes": "?"},
        {"$array": ["O", [], ""]},
    ):
        with pytest.raises(BundleError, match="file holds"):
            from_plain_json(altered, "file")


def _sharded(rank: int, path: str) -> list[float]:
    """Losses of a run over a DistributedSampler, which is resumed in the middle, and of one that is not."""
    from torch.utils.data import DistributedSampler

    def loader() -> DataLoader[Batch]:
        rows = Rows()
        return DataLoader(rows, batch_size=3, sampler=DistributedSampler(rows, 2, rank, seed=1))

    whole = built(ZeRO(2), batch="rank")
    expected = whole.fit(loader(), 7).loss
    built(ZeRO(2), batch="rank").fit(loader(), 5, save=path)
    resumed = built(ZeRO(2), batch="rank").fit(loader(), 7, save=path, resume="auto", eval=[batch_of(3)])
    assert resumed.loss == expected
    assert resumed.evaluation is not None
    return [float(whole.steps), resumed.evaluation.loss]


@pytest.mark.slow
def test_ranks_with_data_of_their_own(tmp_path: Path) -> None:
    first, second = run_ranks(2, partial(_sharded), str(tmp_path / "ckpt"))
    assert first == second
    counts = {item["count"] for item in records(tmp_path / "ckpt" / "metrics.jsonl")}
    assert max(counts) > 12  # items of both ranks
