"""Writes checkpoints: each rank its own share, beside the others, and rank 0 commits when all have written.

With wait=False a copy of this rank's share is written by a thread. What ranks then say to each other goes over their watch
(`distributed/watch.py`), never over the process group that training uses: collectives of two threads would mix.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bmgraph.distributed.connect import BUILDING
from bmgraph.distributed.link import HINT, Link, current
from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import BundleError, RankError
from bmgraph.runtime.training.checkpoint_fit import COMPUTATION_FILE, settings_of
from bmgraph.runtime.training.checkpoint_layout import (
    SPANS,
    STATE_FILE,
    Part,
    frozen_parameters,
    held,
    held_moments,
    own_parts,
    spans_of,
    state_file,
)
from bmgraph.runtime.training.checkpoint_sections import SECTIONS, saved_sections
from bmgraph.serialize.aside import new_folder_aside, remove_all_left_behind, user_modes
from bmgraph.serialize.bundle import cannot_save, check_destination, commit, write_file
from bmgraph.serialize.safetensors_io import stream_tensors
from bmgraph.utils.locked_folder import LockedFolder
from bmgraph.utils.versions import versions

if TYPE_CHECKING:
    from bmgraph.runtime.training.trainer import Trainer

Exchange = Callable[[str], list[str]]
"""All-gather of a text of each rank."""


def save_trainer(trainer: Trainer, path: Path, wait: bool) -> None:
    """Write a checkpoint; collective, also where it does not `wait` until it is written.

    Raises BundleError on all ranks if one cannot write, and then leaves nothing behind.
    """
    ranks = trainer.state.ranks
    trainer.saver.wait()
    manifest = _manifest(trainer)
    draft = _begin(ranks, path.absolute(), manifest, trainer.state.computation)
    if not draft.shared:
        trainer.report.notes.append(
            f"ranks do not share the folder of {path}: rank 0 gathered the checkpoint, and wrote all of it"
        )
        _write_gathered(trainer, draft)
        return
    link, parts = current() if ranks.size > 1 else None, own_parts(trainer)
    work = partial(_write, draft, ranks, exchange=_exchange(ranks, link, trainer.timeout))
    if wait or (ranks.size > 1 and (link is None or link.watch is None)):
        work(parts)
        if not wait:
            trainer.report.notes.append(
                f"{path} was saved at once: ranks have no connection beside their collectives"
            )
        return
    copies = [replace(part, tensor=part.tensor.detach().to("cpu", copy=True)) for part in parts]
    trainer.saver.start(partial(work, copies))
    if link is not None and trainer.saver.end not in link.before_end:
        link.before_end.append(trainer.saver.end)


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is being written to a hidden folder beside its path. `shared`: all ranks see it, and write there.

    `owner` is on rank 0, which removes the folder; `modes` are permissions (`user_modes`).
    """

    path: Path
    aside: Path
    modes: tuple[int, int]
    shared: bool
    manifest: Mapping[str, Any]
    computation: str
    owner: LockedFolder | None

    def close(self) -> None:
        """Remove the folder, if it still is there."""
        if self.owner is not None:
            self.owner.delete()

    def write(self, first: bool, name: str, write: Callable[[Path], object]) -> dict[str, Any]:
        """Write a file, on the first rank beside the computation; returns the entries of the manifest by name."""
        writers = {name: write}
        if first:
            writers[COMPUTATION_FILE] = lambda file: file.write_text(self.computation, encoding="utf-8")
        with cannot_save(self.path):
            return {
                file: write_file(self.aside / file, self.modes[0], each) for file, each in writers.items()
            }

    def commit(self, files: Mapping[str, Any], spans: Mapping[str, Any]) -> None:
        """Give it its name; raises BundleError if that fails."""
        more = {SPANS: spans} if spans else {}
        with cannot_save(self.path):
            commit(self.aside, self.path, "trainer", {**self.manifest, **more}, files, self.modes)


def _begin(ranks: Ranks, path: Path, manifest: Mapping[str, Any], computation: str) -> Draft:
    """Make the folder, on rank 0, and see whether the other ranks share it; collective."""
    owner: LockedFolder | None = None
    told = ""
    with ranks.on_rank0() as first:
        if first:
            with cannot_save(path):
                check_destination(path)
                remove_all_left_behind(path.parent)
                owner = new_folder_aside(path)
                told = json.dumps([str(owner.path), user_modes(owner.path)])
    aside, modes = json.loads(ranks.broadcast_text(told))
    seen = ranks.gather_texts("yes" if is_there(Path(aside)) else "no")
    return Draft(path, Path(aside), (modes[0], modes[1]), "no" not in seen, manifest, computation, owner)


def is_there(folder: Path) -> bool:
    """Whether this rank sees a folder of rank 0."""
    return folder.is_dir()


def _manifest(trainer: Trainer) -> dict[str, Any]:
    state = trainer.state
    return {
        "steps": trainer.steps,
        "seed": trainer.seed,
        "ranks": state.ranks.size,
        "optimizer": type(trainer.optimizer).__name__,
        "moments": held_moments(trainer),
        "settings": settings_of(trainer),
        "versions": versions(),
        "frozen": {
            name: item.hex() for name, item in state.digests.items() if name in frozen_parameters(state)
        },
        SECTIONS: saved_sections(trainer.sections, state.ranks),
    }


def _exchange(ranks: Ranks, link: Link | None, timeout: float) -> Exchange:
    """How ranks tell each other what they have written: over the watch, if they have one."""
    if link is None or link.watch is None:
        return ranks.gather_texts
    watch, number, count = link.watch, link.next_exchange(), iter(range(9))

    def exchange(text: str) -> list[str]:
        try:
            return watch.exchange(f"{number}.{next(count)}", text, timeout, BUILDING * timeout)
        except TimeoutError as error:
            raise RankError(f"the checkpoint was not saved: {error}; {HINT}") from error

    return exchange


def _write(draft: Draft, ranks: Ranks, parts: Sequence[Part], exchange: Exchange) -> None:
    """Write this rank's file, and on rank 0 commit when all have written; what fails on one is raised on all."""
    try:
        entries: dict[str, Any] = {}
        error: BundleError | None = None
        tensors = {part.key: (part.tensor.dtype, tuple(part.tensor.shape)) for part in parts}
        try:
            entries = draft.write(
                ranks.rank == 0,
                state_file(ranks.rank, ranks.size),
                lambda file: stream_tensors(file, tensors, (part.tensor for part in parts)),
            )
        except BundleError as failed:
            error = failed
        found = [json.loads(text) for text in exchange(json.dumps([_said(error), entries, spans_of(parts)]))]
        _raise_first(error, [str(item[0]) for item in found])
        if ranks.rank == 0:
            spans = {state_file(rank, ranks.size): item[2] for rank, item in enumerate(found)}
            files = {name: entry for item in found for name, entry in item[1].items()}
            try:
                draft.commit(files, spans if ranks.size > 1 else {})
            except BundleError as failed:
                error = failed
        _raise_first(error, exchange(_said(error)))
    finally:
        draft.close()


def _said(error: BundleError | None) -> str:
    return "" if error is None else str(error)


def _raise_first(own: BundleError | None, errors: Sequence[str]) -> None:
    """Raise the first error of any rank, the same on all."""
    for rank, text in enumerate(errors):
        if text:
            raise BundleError(f"rank {rank}: {text}" if len(errors) > 1 else text) from own


def _write_gathered(trainer: Trainer, draft: Draft) -> None:
    """Write all on rank 0, one flat tensor after another as it is gathered; collective."""
    state = trainer.state
    tensors = _gathered(trainer)
    entries = {
        f"{key}/{part}": (place.dtype, tuple(state.outline.tensor(part).shape))
        for key, place, _ in held(trainer)
        for part in place.names
    }
    try:
        with state.ranks.on_rank0() as first:
            try:
                if first:
                    write = partial(stream_tensors, entries=entries, tensors=tensors)
                    draft.commit(draft.write(True, STATE_FILE, write), {})
            finally:
                for _ in tensors:
                    pass  # gathering is collective: the other ranks take part, and so does rank 0 if writing failed
    finally:
        draft.close()


def _gathered(trainer: Trainer) -> Iterator[torch.Tensor]:
    """The stored tensors, whole, one flat tensor at a time; collective, so every rank exhausts it."""
    for _, place, tensor in held(trainer):
        yield from place.join(tensor, trainer.state.ranks).values()
