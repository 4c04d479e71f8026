"""Trains as a configuration file says, on one process or on the ranks that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from bmgraph.cli.console import CleanConsole
from bmgraph.cli.model_source import open_source
from bmgraph.cli.train_config import TrainConfig, read_config
from bmgraph.cli.training_data import batches_of
from bmgraph.compiler import compile as compile_model
from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import InputError
from bmgraph.pass_manager.pass_spec import parse_passes
from bmgraph.passes import known_passes


def train(file: Path, console: CleanConsole) -> None:
    """Train as a file says; rank 0 prints.

    Raises InputError, before a model is read, for a configuration that is not valid.
    """
    config = read_config(file)
    passes = parse_passes(config.passes, known_passes())
    with _ranks() as ranks:
        shown = ranks.rank == 0
        torch.manual_seed(config.backend.seed)
        source = open_source(config.model)
        device = (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
        seed = config.backend.seed if config.data.shuffle else None
        loader = batches_of(config.data.train, source, config.data, config.backend.batch, seed)
        valid = None
        if config.data.valid is not None:
            valid = batches_of(config.data.valid, source, config.data, config.backend.batch, None)
        example = next(iter(islice(iter(loader), 1)), None)
        if example is None:
            raise InputError(f"{config.data.train} gives no batches")
        if config.weights is None:
            source.model.to(device)
        elif device.type != "cpu":
            raise InputError(
                "weights: shards are read from files into the memory of CPUs only, and this trains on a GPU"
            )
        trainer = compile_model(
            source.model.train(), passes, example={name: value.to(device) for name, value in example.items()},
            backend=config.backend, weights=config.weights,
        )  # fmt: skip
        for note in (*source.notes, *trainer.report.notes) if shown else ():
            console.print(f"note: {note}")
        done = trainer.fit(loader, eval=valid, **config.fit)
        if shown:
            console.print(_summary(config, done.steps, done.loss))
            if done.evaluation is not None:
                perplexity = done.evaluation.perplexity
                more = "" if perplexity is None else f", perplexity {perplexity:.2f}"
                console.print(f"validation loss {done.evaluation.loss:.4f}{more}")
        if config.save_delta is not None:
            trainer.save_delta(config.save_delta)
        if config.save_program is not None:
            program = trainer.program()
            with ranks.on_rank0() as first:
                if first:
                    program.save(config.save_program)


def _summary(config: TrainConfig, steps: int, loss: float | None) -> str:
    last = "no step was left to make" if loss is None else f"last loss {loss:.4f}"
    saved = f"; checkpoints are in {config.fit['save']}" if config.fit["save"] else ""
    return f"{steps} steps, {last}{saved}"


@contextmanager
def _ranks() -> Iterator[Ranks]:
    """Join the group of the ranks that a launcher started, and leave it at the end; one process alone needs none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Ranks.here()
        return
    local, cuda = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo")
    yield Ranks.here()  # what fails ends the process, and with it the group
    dist.destroy_process_group()
