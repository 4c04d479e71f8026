"""A table over a vocabulary, split by rows over ranks: the embedding, the head and its cross-entropy without gathering it.

Each rank holds `rows` rows of the table, as a flat shard f[rows * D] padded with zeros at the end of the vocabulary. Hidden
states of all ranks are gathered instead of the table, and log-sum-exps are combined (Shoeybi et al. 2019, section 3).

Shapes: T tokens of this rank, which may differ between ranks; N tokens of all ranks, each padded to the largest T; D width.
Every operator is collective: all ranks of the group call it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from bmgraph.utils.torch_internals import process_group_of

CHUNK = 16
"""Rows of logits that are normalised together: they stay in the cache."""


@torch.library.custom_op("bmgraph::parallel_cross_entropy", mutates_args=())
def parallel_cross_entropy(
    hidden: torch.Tensor,
    shard: torch.Tensor,
    target: torch.Tensor,
    classes: int,
    ignored: int,
    ranks: int,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden f[T, D], shard f[rows * D], target i64[T] -> (loss f[], d hidden f[T, D], d table f[rows, D]).

    The loss is the cross-entropy of `hidden @ table.T`, summed over this rank's targets that are not `ignored`. The
    gradients are those of the sum over all ranks: of this rank's hidden states and of this rank's rows.
    """
    width = hidden.shape[1]
    table, first = _own_rows(shard, width, classes, ranks, group)
    counts = _counts(hidden.shape[0], ranks, group)
    states = _gathered(hidden, counts, 0.0, group)
    targets = _gathered(target, counts, ignored, group)
    valid = targets != ignored
    _check_range("target", targets[valid], classes)
    here = valid & (targets >= first) & (targets < first + table.shape[0])
    positions = here.nonzero().flatten()
    columns = targets[positions] - first
    logits = states @ table.T
    largest = _largest(logits, ranks, group)
    sums = torch.zeros(2, logits.shape[0], dtype=torch.float64, device=hidden.device)
    sums[1, positions] = (logits[positions, columns] - largest[positions]).double()
    for begin in range(0, logits.shape[0], CHUNK):
        some = logits[begin : begin + CHUNK].sub_(largest[begin : begin + CHUNK, None]).exp_()
        sums[0, begin : begin + CHUNK] = some.sum(1, dtype=torch.float64)
    if ranks > 1:
        dist.all_reduce(sums, group=process_group_of(group))
    losses = torch.where(valid, sums[0].log() - sums[1], 0.0).reshape(len(counts), -1)
    rank = dist.get_rank(process_group_of(group)) if ranks > 1 else 0
    scale = torch.where(valid, 1 / sums[0], 0.0).to(logits.dtype)
    logits.mul_(scale[:, None])
    logits[positions, columns] -= 1
    gradient = shard.new_empty(shard.shape[0] // width, width)
    torch.mm(logits.T, states, out=gradient[: table.shape[0]])
    gradient[table.shape[0] :] = 0  # padding
    own = _scattered(logits @ table, counts, rank, ranks, group)
    return losses[rank].sum().to(hidden.dtype), own, gradient


@parallel_cross_entropy.register_fake
def _(
    hidden: torch.Tensor,
    shard: torch.Tensor,
    target: torch.Tensor,
    classes: int,
    ignored: int,
    ranks: int,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = hidden.shape[1]
    return hidden.new_empty(()), torch.empty_like(hidden), shard.new_empty(shard.shape[0] // width, width)


@torch.library.custom_op("bmgraph::parallel_embedding", mutates_args=())
def parallel_embedding(
    shard: torch.Tensor, ids: torch.Tensor, width: int, classes: int, ranks: int, group: str
) -> torch.Tensor:
    """shard f[rows * D], ids i64[...] -> f[..., D]: the rows of the table; only those that are looked up are exchanged."""
    table, first = _own_rows(shard, width, classes, ranks, group)
    counts = _counts(ids.numel(), ranks, group)
    wanted = _gathered(ids.reshape(-1), counts, 0, group)
    _check_range("id", wanted, classes)
    here = ((wanted >= first) & (wanted < first + table.shape[0])).nonzero().flatten()
    found = shard.new_zeros(wanted.shape[0], width)
    found[here] = table[wanted[here] - first]
    rank = dist.get_rank(process_group_of(group)) if ranks > 1 else 0
    return _scattered(found, counts, rank, ranks, group).reshape(*ids.shape, width)


@parallel_embedding.register_fake
def _(
    shard: torch.Tensor, ids: torch.Tensor, width: int, classes: int, ranks: int, group: str
) -> torch.Tensor:
    return shard.new_empty(*ids.shape, width)


@torch.library.custom_op("bmgraph::parallel_embedding_rows", mutates_args=())
def parallel_embedding_rows(
    gradient: torch.Tensor, ids: torch.Tensor, rows: int, padding: int, ranks: int, group: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """gradient f[..., D] of looked-up rows, ids i64[...] -> (row i64[N], f[N, D]): what to add to which of this rank's rows.

    What belongs to rows of other ranks, or to the `padding` row, is zero in row 0.
    """
    width = gradient.shape[-1]
    counts = _counts(ids.numel(), ranks, group)
    wanted = _gathered(ids.reshape(-1), counts, 0, group)
    values = _gathered(gradient.reshape(-1, width), counts, 0.0, group)
    rank = dist.get_rank(process_group_of(group)) if ranks > 1 else 0
    local = wanted - rank * rows
    other = (local < 0) | (local >= rows) | (wanted == padding)
    return local.masked_fill(other, 0), values.masked_fill(other[:, None], 0.0)


@parallel_embedding_rows.register_fake
def _(
    gradient: torch.Tensor, ids: torch.Tensor, rows: int, padding: int, ranks: int, group: str
) -> tuple[torch.Tensor, torch.Tensor]:
    count = ranks * ids.numel()
    return ids.new_empty(count), gradient.new_empty(count, gradient.shape[-1])


COLLECTIVE = (
    torch.ops.bmgraph.parallel_cross_entropy.default,
    torch.ops.bmgraph.parallel_embedding.default,
    torch.ops.bmgraph.parallel_embedding_rows.default,
)
"""The operators in which all ranks take part."""


def _own_rows(
    shard: torch.Tensor, width: int, classes: int, ranks: int, group: str
) -> tuple[torch.Tensor, int]:
    """This rank's rows of the table that are no padding, and the number of the first one."""
    rows = shard.shape[0] // width
    first = rows * dist.get_rank(process_group_of(group)) if ranks > 1 else 0
    return shard.view(rows, width)[: max(0, min(rows, classes - first))], first


def _check_range(what: str, numbers: torch.Tensor, classes: int) -> None:
    """Raise IndexError on all ranks, which have the same numbers, if one is not of the vocabulary."""
    if numbers.numel():
        least, most = (int(number) for number in numbers.aminmax())
        if least < 0 or most >= classes:
            wrong = least if least < 0 else most
            raise IndexError(f"{what} {wrong} is out of bounds: the table has {classes} rows")


def _counts(count: int, ranks: int, group: str) -> list[int]:
    """The number of tokens of each rank."""
    if ranks == 1:
        return [count]
    found = torch.empty(ranks, dtype=torch.int64)
    mine = torch.tensor([count])
    device = _device(group)
    gathered = found.to(device)
    dist.all_gather_into_tensor(gathered, mine.to(device), group=process_group_of(group))
    counts: list[int] = gathered.tolist()
    return counts


def _device(group: str) -> torch.device:
    return torch.device("cuda" if dist.get_backend(process_group_of(group)) == "nccl" else "cpu")


def _gathered(own: torch.Tensor, counts: list[int], fill: float, group: str) -> torch.Tensor:
    """The rows [T, ...] of all ranks, each padded with `fill` to the largest number: [N, ...]."""
    most = max(counts)
    if len(counts) == 1:
        return own
    if own.shape[0] < most:
        own = torch.cat([own, own.new_full((most - own.shape[0], *own.shape[1:]), fill)])
    whole = own.new_empty(len(counts) * most, *own.shape[1:])
    dist.all_gather_into_tensor(whole, own.contiguous(), group=process_group_of(group))
    return whole


def _scattered(parts: torch.Tensor, counts: list[int], rank: int, ranks: int, group: str) -> torch.Tensor:
    """The sum over ranks of this rank's rows: [N, ...] -> [T, ...]."""
    if ranks == 1:
        return parts
    own = parts.new_empty(max(counts), *parts.shape[1:])
    dist.reduce_scatter_tensor(own, parts, group=process_group_of(group))
    return own[: counts[rank]]


def _largest(logits: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    """The largest logit of each token over all ranks."""
    least = torch.finfo(logits.dtype).min
    largest = logits.amax(1) if logits.shape[1] else logits.new_full((logits.shape[0],), least)
    if ranks > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=process_group_of(group))
    return largest
