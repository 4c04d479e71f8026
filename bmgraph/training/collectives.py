"""How the collectives of a step graph run: in pooled buffers, begun and awaited apart, and paired where a rank fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from bmgraph.distributed.link import collective_call
from bmgraph.errors import RankError
from bmgraph.ops.parallel_vocabulary import COLLECTIVE
from bmgraph.training.buffer_pool import BufferPool
from bmgraph.training.graph_lowering import OWN
from bmgraph.utils.torch_internals import process_group_of

functional = torch.ops._c10d_functional

DIRECT = 8
"""Up to so many ranks of gloo exchange directly: with more, rings take fewer messages."""

COLLECTIVES = "_c10d_functional"
"""The namespace of the operators in which all ranks take part."""


@dataclass
class _Pending:
    """A collective that was begun: `finish` ends it. It holds the memory that the backend reads and writes meanwhile."""

    result: torch.Tensor
    works: list[Any]
    finish: Callable[[], None] = lambda: None
    read: torch.Tensor | None = None

    def wait(self) -> torch.Tensor:
        try:
            with collective_call():
                for work in self.works:
                    work.wait()
                self.finish()
        except RankError:
            _abandoned.append(self)
            raise
        return self.result


_abandoned: list[_Pending] = []
"""Collectives that failed: threads of the backend may still use their memory, so it is never freed."""


class Buffers:
    """The pooled buffers of a step, which all runners of its graphs share."""

    def __init__(self) -> None:
        self.gathered, self.flat, self.summed = BufferPool(), BufferPool(), BufferPool()
        """For gathered parameters, for gradients of a bucket before they are summed, and for shares of the sums."""

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.gathered.nbytes + self.flat.nbytes + self.summed.nbytes


class Collectives:
    """The collectives of a graph in their order, and how many of them this run has taken part in.

    Results lie in pooled buffers. A few ranks of gloo exchange what the others need directly: gloo's own reduce-scatter sums a
    copy of the whole tensor on every rank, and its rings take more messages.
    """

    def __init__(self, device: torch.device, buffers: Buffers) -> None:
        self._device = device
        self._buffers = buffers
        self._nodes: list[fx.Node] = []
        self._begun = 0
        self._pending: dict[int, _Pending] = {}
        self.sizes: dict[Any, int] = {}
        """The sizes of the inputs of the last run, by symbol."""

    def bind(self, graph: fx.Graph) -> None:
        """Replace the functional collectives of a graph, in place, by calls that are counted as they run."""
        begin: dict[Any, Callable[..., _Pending]] = {
            functional.all_gather_into_tensor.default: self._gather,
            functional.reduce_scatter_tensor.default: self._reduce_scatter,
            functional.all_reduce.default: self._all_reduce,
        }
        in_place: dict[Any, Callable[..., _Pending]] = {
            functional.all_reduce.default: self._all_reduce_in_place
        }
        for node in graph.nodes:
            if node.target in COLLECTIVE:
                self._add(node, self._whole(node.target))
                continue
            if getattr(node.target, "namespace", None) != COLLECTIVES:
                continue
            if node.target is functional.wait_tensor.default:
                node.target = self._waiting()
            else:
                known = begin | in_place if OWN in node.meta else begin
                self._add(node, self._counted(known.get(node.target, self._other(node.target))))

    def _add(self, node: fx.Node, call: Callable[..., Any]) -> None:
        node.meta["collective"] = node.target
        node.target = call
        self._nodes.append(node)

    def __enter__(self) -> None:
        self._begun = 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Begin and end what is left, which is nothing after a whole run; where a rank has left, nothing is to be had."""
        if kind is not None and issubclass(kind, RankError):
            _abandoned.extend(self._pending.values())
            self._pending = {}
            return
        self._end_pending()
        for node in self._nodes[self._begun :]:
            call: Any = node.target
            call(*fx.map_arg(node.args, self._zeros))
            self._end_pending()
        self._begun = len(self._nodes)

    def _zeros(self, node: fx.Node) -> torch.Tensor:
        """Zeros in place of a value that a failed run did not compute."""
        like = node.meta["val"]
        shape = [self._size(size) for size in like.shape]
        return torch.zeros(shape, dtype=like.dtype, device=self._device)

    def _size(self, size: Any) -> int:
        """A size in the last run, as far as it follows from those of the inputs."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        found = size.node.expr.xreplace(self.sizes)
        return int(size) if getattr(found, "free_symbols", None) else int(found)

    def _whole(self, operator: Callable[..., Any]) -> Callable[..., Any]:
        """A call that begins and ends all its collectives."""

        def call_collective(*args: Any) -> Any:
            self._begun += 1
            with collective_call():
                return operator(*args)

        return call_collective

    def _end_pending(self) -> None:
        pending, self._pending = self._pending, {}
        for begun in pending.values():
            begun.wait()

    def _counted(self, begin: Callable[..., _Pending]) -> Callable[..., torch.Tensor]:
        def begin_collective(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
            self._begun += 1
            own = tensor.contiguous()
            with collective_call():
                pending = begin(own, *args)
            self._pending[id(pending.result)] = pending
            return pending.result

        return begin_collective

    def _waiting(self) -> Callable[[torch.Tensor], torch.Tensor]:
        def wait_collective(tensor: torch.Tensor) -> torch.Tensor:
            return self._pending.pop(id(tensor)).wait()

        return wait_collective

    def _gather(self, shard: torch.Tensor, ranks: int, name: str) -> _Pending:
        group = process_group_of(name)
        count = shard.shape[0]
        shape = (ranks * count, *shard.shape[1:])
        whole = self._buffers.gathered.take(ranks * shard.numel(), shard.dtype, shard.device).view(shape)
        if not exchanges(group, ranks):
            gathered = self._buffers.gathered.lent(whole)
            return _Pending(whole, [dist.all_gather_into_tensor(gathered, shard, group=group, async_op=True)])
        places = whole.chunk(ranks)
        works = _exchange(group, [shard] * ranks, places)
        places[dist.get_rank(group)].copy_(shard)
        return _Pending(whole, works)

    def _reduce_scatter(self, whole: torch.Tensor, kind: str, ranks: int, name: str) -> _Pending:
        assert kind == "sum"
        group = process_group_of(name)
        count = whole.shape[0] // ranks
        shape = (count, *whole.shape[1:])
        share = self._buffers.summed.take(whole.numel() // ranks, whole.dtype, whole.device).view(shape)
        if not exchanges(group, ranks):
            summed, given = self._buffers.summed.lent(share), self._buffers.flat.lent(whole)
            work = dist.reduce_scatter_tensor(summed, given, group=group, async_op=True)
            return _Pending(share, [work], read=whole)
        rank, parts = dist.get_rank(group), whole.chunk(ranks)
        more = self._buffers.flat.take(other_shares(ranks) * share.numel(), whole.dtype, whole.device)
        places = [share, *more.view(-1, *share.shape).unbind()]
        places.insert(rank, parts[rank])
        works = _exchange(group, parts, places)
        return _Pending(share, works, lambda: _sum_into(share, places))

    def _all_reduce(self, tensor: torch.Tensor, kind: str, name: str) -> _Pending:
        return self._all_reduce_in_place(tensor.clone(), kind, name)

    def _all_reduce_in_place(self, tensor: torch.Tensor, kind: str, name: str) -> _Pending:
        assert kind == "sum"
        group = process_group_of(name)
        summed = self._buffers.flat.lent(tensor)
        return _Pending(tensor, [dist.all_reduce(summed, group=group, async_op=True)])

    def _other(self, operator: Callable[..., torch.Tensor]) -> Callable[..., _Pending]:
        def begin(tensor: torch.Tensor, *args: Any) -> _Pending:
            sent = operator(tensor, *args)
            return _Pending(sent, [], lambda: _ignore(functional.wait_tensor(sent)))

        return begin


def exchanges(group: Any, ranks: int) -> bool:
    """Whether ranks exchange directly. Other backends overlap their own kernels better; a fake group plans for gloo, whose
    buffers alone are pooled."""
    return 1 < ranks <= DIRECT and dist.get_backend(group) in ("gloo", "fake")


def other_shares(ranks: int) -> int:
    """How many shares are received beside the one that becomes the sum, where ranks exchange directly."""
    return ranks - 2


def _exchange(group: Any, sent: Sequence[torch.Tensor], places: Sequence[torch.Tensor]) -> list[Any]:
    """Begin to send to each other rank what is for it, and to receive what is of it in its place."""
    others = [rank for rank in range(len(places)) if rank != dist.get_rank(group)]
    received = [dist.irecv(places[rank], group=group, group_src=rank) for rank in others]
    return received + [dist.isend(sent[rank], group=group, group_dst=rank) for rank in others]


def _sum_into(share: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """Sum in the order of ranks; `share` is one of the first two."""
    first, second, *rest = parts
    share.add_(second if share is first else first)
    for part in rest:
        share.add_(part)


def _ignore(_: object) -> None:
    return None
