"""The ranks of torch.distributed: their number, collectives, and errors that all of them raise together."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bmgraph.distributed.link import collective_call, current
from bmgraph.errors import BmgraphError, InputError, RankError

collective = torch.ops._c10d_functional

_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Ranks:
    """The ranks of torch.distributed's default group, or a single rank if it is not initialized.

    All methods except `here` and `group` are collective: all ranks must call them, in the same order. They raise RankError,
    which says what is known of the reason, if a rank has left, is stopped or does not answer.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def here() -> Ranks:
        """The ranks of this process; raises InputError if WORLD_SIZE is above 1 without an initialized process group."""
        if dist.is_available() and dist.is_initialized():
            kind = SilentRanks if dist.get_backend() == "fake" else Ranks
            return kind(dist.get_rank(), dist.get_world_size())
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1:
            raise InputError(
                f"{started} ranks were started (WORLD_SIZE), but this process has not joined the group: "
                "call torch.distributed.init_process_group() first"
            )
        return Ranks()

    @property
    def group(self) -> str:
        """The name of the group for functional collectives."""
        if self.size == 1:
            return ""
        link = current()
        if link is not None:
            return link.name
        assert dist.group.WORLD is not None
        return str(dist.group.WORLD.group_name)

    def gather(self, shard: torch.Tensor) -> torch.Tensor:
        """All-gather: [n] on each rank -> [ranks * n] in the order of ranks; n is the same on all ranks."""
        if self.size == 1:
            return shard
        whole = shard.contiguous()
        with collective_call():
            sent = collective.all_gather_into_tensor(whole, self.size, self.group)
            return collective.wait_tensor(sent)  # type: ignore[no-any-return]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce: the sum over ranks."""
        if self.size == 1:
            return tensor
        with collective_call():
            return collective.wait_tensor(collective.all_reduce(tensor, "sum", self.group))  # type: ignore[no-any-return]

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Broadcast: the tensor of rank 0."""
        if self.size == 1:
            return tensor
        with collective_call():
            return collective.wait_tensor(collective.broadcast(tensor, 0, self.group))  # type: ignore[no-any-return]

    def check_same(
        self, what: str, digests: Mapping[str, bytes], advice: str = "the same program and weights"
    ) -> None:
        """Raise InputError on all ranks, naming the first rank that differs, unless all have the same digests.

        `digests` are sha256 by name; `what` is named in the error if the names differ, and what to give by `advice`. The names are compared first, so
        that no rank waits for bytes that another does not send.
        """
        names = hashlib.sha256("\n".join(digests).encode()).digest()
        for entries in ({what: names}, digests):
            found = self.first_different(entries)
            if found is not None:
                raise InputError(
                    f"rank {found[0]} has a different {found[1]} than rank 0: give all ranks {advice}"
                )

    def first_different(self, digests: Mapping[str, bytes]) -> tuple[int, str] | None:
        """The first name, and the first rank whose digest (sha256) of it differs from rank 0's; names are the same on all."""
        if self.size == 1:
            return None
        mine = torch.frombuffer(bytearray(b"".join(digests.values())), dtype=torch.uint8)
        rows = self.gather(mine.to(_device())).reshape(self.size, len(digests), _DIGEST_BYTES).cpu()
        for index, name in enumerate(digests):
            for rank in range(1, self.size):
                if not torch.equal(rows[rank, index], rows[0, index]):
                    return rank, name
        return None

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """If the body fails on one rank, raise on all.

        The body itself must not be collective, unless it takes part in all its collectives even where it fails. Where a
        collective fails because a rank has left (RankError), nothing is asked of the others.
        """
        error: Exception | None = None
        try:
            yield
        except RankError:
            raise
        except Exception as raised:  # of any kind: the others must not wait for a rank that has left
            error = raised
        self._agree(error)

    @contextmanager
    def on_rank0(self) -> Iterator[bool]:
        """Gives True on rank 0, which alone does the work; the others wait, and fail if it fails."""
        with self.fail_together():
            yield self.rank == 0

    def broadcast_text(self, text: str) -> str:
        """Broadcast a text of rank 0, of any length."""
        if self.size == 1:
            return text
        length = int(self.broadcast(torch.tensor(len(text.encode())).to(_device())))
        return _text(self.broadcast(_bytes(text, max(length, 1))).cpu())

    def gather_texts(self, text: str) -> list[str]:
        """All-gather: a text of any length on each rank -> the texts in the order of ranks."""
        if self.size == 1:
            return [text]
        lengths = self.gather(torch.tensor([len(text.encode())]).to(_device()))
        longest = max(int(lengths.max()), 1)
        return [_text(row) for row in self.gather(_bytes(text, longest)).reshape(self.size, -1).cpu()]

    def _agree(self, error: Exception | None) -> None:
        """Raise on all ranks if any has an error: its own error, or a BmgraphError with the first of the others."""
        failures = torch.tensor(int(error is not None)).to(_device()) if self.size > 1 else None
        if failures is not None and int(self.sum(failures)):
            texts = self.gather_texts("" if error is None else str(error) or type(error).__name__)
            failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
            if failed and error is None:
                raise BmgraphError(failed[0])
        if error is not None:
            raise error


@dataclass(frozen=True)
class SilentRanks(Ranks):
    """Ranks that are planned for: nothing is asked of them, and each is taken to be like this one.

    Collectives on tensors without data go through torch's operators, which send nothing then.
    """

    @property
    def group(self) -> str:
        """The name of the group, which is not looked up."""
        return super().group if dist.is_available() and dist.is_initialized() else "planned"

    def first_different(self, digests: Mapping[str, bytes]) -> tuple[int, str] | None:
        """None."""
        return None

    def gather_texts(self, text: str) -> list[str]:
        """This rank's text for each of them."""
        return [text] * self.size

    def broadcast_text(self, text: str) -> str:
        """This rank's text."""
        return text

    def _agree(self, error: Exception | None) -> None:
        if error is not None:
            raise error


def _bytes(text: str, length: int) -> torch.Tensor:
    """u8[length], length >= 1: a text's bytes, followed by zeros; those of a longer text are cut off."""
    data = bytearray(text.encode()[:length].ljust(length, b"\0"))
    return torch.frombuffer(data, dtype=torch.uint8).to(_device())


def _text(message: torch.Tensor) -> str:
    return bytes(message.tolist()).rstrip(b"\0").decode(errors="replace")


def _device() -> torch.device:
    """The device that tensors must be on for the group's backend."""
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda" if nccl else "cpu")
