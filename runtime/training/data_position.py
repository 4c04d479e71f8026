"""The batches of a loader, and the position in them, which a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import BundleError, InputError
from bmgraph.runtime.training.checkpoint_sections import Found, Section, Take
from bmgraph.runtime.training.generators import check_generators, generators, set_generators
from bmgraph.serialize.plain_values import from_plain_json, plain_json
from bmgraph.training.step_program import WHOLE
from bmgraph.utils.progress import track

Batch = Mapping[str, object]


@runtime_checkable
class Stateful(Protocol):
    """A loader that can say where it is."""

    def state_dict(self) -> dict[str, Any]:
        """Its position."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a position."""


@runtime_checkable
class HasEpochs(Protocol):
    """A sampler that shuffles otherwise in each epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch."""


class DataPosition(Section):
    """Reads a loader, any iterable of batches, epoch after epoch; a section of checkpoints.

    The position is the epoch, the batches taken in it, the loader's own state where it has `state_dict` and
    `load_state_dict`, and the random generators at the beginning of the epoch and now. A loader without a state is read
    forward to the position, with the generators as they were at the beginning, so that it shuffles the same.
    """

    name = "data"
    per_rank = True

    def __init__(self, loader: Iterable[Batch], ranks: Ranks, kind: str) -> None:
        self.loader = loader
        self.epoch = 0
        self.taken = 0
        """Batches taken in this epoch."""
        self.once = isinstance(loader, Iterator)
        """Whether the loader can be read once only."""
        self._ranks, self._kind = ranks, kind
        self._iterator: Iterator[Batch] | None = None
        self._start = generators()
        self._resumed: dict[str, Any] | None = None

    def take(self) -> Batch | None:
        """The next batch; None at the end of the epoch. Not collective; raises InputError for what is not a dict."""
        if self._iterator is None:
            self._iterator = self._begin()
        batch = next(self._iterator, None)
        if batch is None:
            return None
        if not isinstance(batch, Mapping):
            raise InputError(
                f"the loader gives a {type(batch).__name__}: give dicts of tensors by input name (a DataLoader makes them "
                "with collate_fn=)"
            )
        self.taken += 1
        return batch

    def next_epoch(self) -> None:
        """Begin the next epoch; raises InputError if this one had no batch at all."""
        self.check_not_empty()
        self.epoch, self.taken, self._iterator = self.epoch + 1, 0, None

    def check_not_empty(self) -> None:
        """Raise InputError if no batch was taken in this epoch."""
        if self.taken == 0:
            raise InputError("the loader gives no batches")

    def _begin(self) -> Iterator[Batch]:
        for item in (self.loader, getattr(self.loader, "sampler", None)):
            if isinstance(item, HasEpochs):
                item.set_epoch(self.epoch)
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            self._start = generators()
            return iter(self.loader)
        self._start = resumed["start"]
        if resumed["loader"] is not None and isinstance(self.loader, Stateful):
            self.loader.load_state_dict(resumed["loader"])
            iterator = iter(self.loader)
        else:
            set_generators(self._start)
            iterator = iter(self.loader)
            for index in track(range(self.taken), "skipping batches", self.taken):
                if next(iterator, None) is None:
                    raise InputError(
                        f"the loader ends after {index} batches, of which {self.taken} were taken before: it is not the "
                        "one that the checkpoint was trained with"
                    )
        set_generators(resumed["now"])
        return iterator

    def saved(self) -> dict[str, Any]:
        now = generators()
        if self._iterator is None:
            self._start = now
        state = self.loader.state_dict() if isinstance(self.loader, Stateful) else None
        fields = self._resumed or {"loader": state, "start": self._start, "now": now}
        return {"epoch": self.epoch, "taken": self.taken} | {
            key: plain_json(value, f"the loader's state_dict()[{key!r}]" if key == "loader" else key)
            for key, value in fields.items()
        }

    def checked(self, found: Sequence[Found], notes: list[str]) -> Take:
        if not found:
            notes.append("the checkpoint does not say how far its data was read: the loader begins anew")
            return lambda: None
        same = len(found) == self._ranks.size or self._kind == WHOLE
        own = found[self._ranks.rank] if len(found) == self._ranks.size else found[0]
        taken = own.get("taken", int, 0)
        epoch = own.get("epoch", int, 0)
        fields = {key: from_plain_json(own.fields.get(key), own.where) for key in ("loader", "start", "now")}
        for key in ("start", "now"):
            check_generators(fields[key], own.where)
        if fields["loader"] is not None and not isinstance(fields["loader"], dict):
            raise BundleError(f"{own.where} holds a state of the loader that is not valid")
        if not same:  # the ranks share the epoch otherwise
            taken = sum(one.get("taken", int, 0) for one in found) // self._ranks.size
            fields["loader"] = None
            notes.append(
                f"the checkpoint's data was read by {len(found)} ranks: each of these {self._ranks.size} goes on after "
                f"{taken} batches of its own, so that as many are behind all together, but not the same ones"
            )
        if taken and (fields["loader"] is None or not isinstance(self.loader, Stateful)):
            notes.append(
                f"the loader has no state_dict() to go on from: {taken} batches of epoch {epoch} are read and skipped"
            )

        def take() -> None:
            self.epoch, self.taken, self._iterator = epoch, taken, None
            self._resumed = fields

        return take
