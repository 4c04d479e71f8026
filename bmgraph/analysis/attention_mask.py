"""Reads an attention mask (padding, causal or both) by evaluating its expression, however it is written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.attention import HIDDEN, visible
from bmgraph.ir.evaluation import COMPUTED, upstream, value_of
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import dims
from bmgraph.ir.symbolic_dim import is_name, size_of
from bmgraph.ir.tensor_spec import row_sizes
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of

aten = torch.ops.aten

SCORE_FILLS = frozenset({Kind.SCALING, Kind.MASKING, Kind.FILL})
"""Calls whose number is what is added to a score, where it hides a key."""

LENGTHS = (5, 8)
"""Sequence lengths at which the expression is evaluated."""

BATCH = 3
"""Batch size at which the expression is evaluated."""

MAX_LENGTH = 8192
"""Longest sequence evaluated. A constant, such as a window size, may matter only beyond its own value."""


@dataclass(frozen=True)
class Mask:
    """Meaning of a mask.

    `padding` names the input [batch, sequence] that hides keys where it is 0; None if there is none. `causal`: no query
    sees a later key.
    """

    padding: str | None
    causal: bool


def read_mask(program: Program, node: fx.Node | None) -> Mask | None:
    """Read a mask expression; None if it is more than padding and causality.

    The expression is evaluated at several lengths with random padding. Exactly one reading must agree with it on every
    query that sees at least one key. `node` None means no mask.
    """
    if node is None:
        return Mask(None, False)
    ancestors = list(upstream(node))
    sources = [item for item in ancestors if item.op == "placeholder" and _value_used(item, set(ancestors))]
    if len(sources) > 1 or any(
        item.op == "get_attr" and str(item.target) in program.parameters for item in ancestors
    ):
        return None
    padding = str(sources[0].target) if sources else None
    readings = [Mask(name, causal) for name in ({padding, None}) for causal in (False, True)]
    for batch in _batches(program, padding):
        try:
            seen = _seen(evaluate_on(program, node, batch))
        except (RuntimeError, IndexError, KeyError, ValueError):
            return None
        if seen is None:
            return None
        readings = [reading for reading in readings if _agrees(reading, seen, batch)]
    if len(readings) != 1 or readings[0].padding != padding:
        return None  # an input that hid no key here may hide one for other values
    return readings[0] if _holds_longer(program, node, readings[0].causal) else None


def hides_keys(
    program: Program, node: fx.Node, name: str, held: int = 0, negated: bool = False
) -> bool | None:
    """Whether an input [batch, sequence] hides keys where it holds a number, in a mask expression, whatever else hides some.

    `negated`: the expression is true where it hides. False where the expression does not read the input, or lets a query
    see keys there beside others. None if it cannot be evaluated.
    """
    source = next((item for item in upstream(node) if item.op == "placeholder" and item.target == name), None)
    if source is None or not _value_used(source, set(upstream(node))):
        return False
    for batch in _batches(program, name):
        try:
            mask = evaluate_on(program, node, batch)
        except (RuntimeError, IndexError, KeyError, ValueError):
            return None
        seen = visible(mask) ^ negated
        there = batch[name] == held
        if seen.dim() != 4 or seen.shape[-1] != there.shape[-1] or seen.shape[0] not in (1, len(there)):
            return None
        seen_there, seen_elsewhere = seen & there[:, None, None, :], seen & ~there[:, None, None, :]
        if bool((seen_there.any(-1) & seen_elsewhere.any(-1)).any()):
            return False
        if bool(seen_there.any()) and not bool(seen_elsewhere.any()):
            return False  # the others hide keys
    return True


def blind_value(program: Program, node: fx.Node | None, mask: Mask) -> float | None:
    """What the expression of a mask adds to all scores of a query that sees no key; `mask` is its reading.

    -inf, also for a mask of booleans: attention gives 0. A finite value: attention weights all keys by their scores plus
    that value, so by 1 / T for the least number of a dtype. None if it is not one and the same value.
    """
    if node is None or mask.padding is None:
        return -math.inf
    found: set[float] = set()
    for batch in _batches(program, mask.padding):
        padding = batch[mask.padding]
        padding[0] = 0
        padding[1, 0] = 0  # with causality the first query of this row sees no key
        try:
            added = evaluate_on(program, node, batch)
        except (RuntimeError, IndexError, KeyError, ValueError):
            return None
        if added.dtype == torch.bool:
            added = torch.zeros(added.shape).masked_fill(~added, -math.inf)
        rows, length = padding.shape
        added = added.reshape(*[1] * (4 - added.dim()), *added.shape)
        queries = length if mask.causal else added.shape[-2]
        added = added.expand(rows, added.shape[1], queries, length)
        found |= set(added[0].flatten().tolist())
        if mask.causal:
            found |= set(added[1, :, 0].flatten().tolist())
    return found.pop() if len(found) == 1 else None


def hides_padding_alone(program: Program, node: fx.Node, positions: int) -> bool:
    """Whether in a decoder's step for one new position, the last of `positions`, a mask expression hides the positions where the
    decoder's mask is 0, wherever these are, and no others: their order then means nothing to attention."""
    assert program.cache is not None
    cache = program.cache.spec(program)
    if cache.mask is None:
        return False
    sizes = cache.sizes_of_step(BATCH, positions - 1)
    batch = {
        spec.name: torch.ones((), dtype=spec.dtype).expand([size_of(dim, sizes) or 1 for dim in spec.shape])
        for spec in program.inputs
    }
    generator = torch.Generator().manual_seed(0)
    kept = torch.randint(0, 2, (BATCH, positions), generator=generator)
    kept[:, -1] = 1
    for padding in (kept, torch.ones_like(kept)):
        try:
            seen = _seen(evaluate_on(program, node, {**batch, cache.mask.name: padding.to(cache.mask.dtype)}))
        except (RuntimeError, IndexError, KeyError, ValueError):
            return False
        if (
            seen is None
            or seen.shape[1:] != (1, positions)
            or not bool((seen == (padding != 0)[:, None]).all())
        ):
            return False
    return True


def _holds_longer(program: Program, node: fx.Node, causal: bool) -> bool:
    """Whether a reading also holds, without padding, just beyond every number and table size in the expression."""
    longest = _longest(program, node)
    for number in _numbers(program, node):
        length = number if longest is None else min(number, longest)
        if length > MAX_LENGTH:
            return False
        batch = next(batch for batch in _batches(program, None, (length,)))
        try:
            seen = _seen(evaluate_on(program, node, {k: v[:1] for k, v in batch.items()}))
        except (RuntimeError, IndexError, KeyError, ValueError):
            continue  # the model itself cannot run at this length
        if seen is None or not _agrees(Mask(None, causal), seen, batch):
            return False
    return True


def _longest(program: Program, node: fx.Node) -> int | None:
    """The longest sequence that the keys of a mask may have; None if there is no bound. The bounds of other sizes, such
    as the batch, say nothing about it."""
    keys = [str(dim) for dim in dims(program, node.meta["val"])[-1:] if is_name(dim)]
    bounds = [program.ranges[name].high for name in keys if name in program.ranges]
    return min((high for high in bounds if high is not None), default=None)


def _numbers(program: Program, node: fx.Node) -> list[int]:
    """Lengths just beyond the integers in an expression, and the sizes of the tables that it reads.

    What is multiplied or filled in to hide a key, such as -1e4 or the least number of a half-precision type, is a score
    and no length.
    """
    found: set[int] = set()

    def note(item: Any) -> Any:
        if isinstance(item, int | float) and abs(item) < 2**24:
            found.add(abs(int(item)) + 2)
        return item

    def note_unless_hiding(item: Any) -> Any:
        return item if _hides(item) else note(item)

    for item in upstream(node):
        if item.op == "get_attr":
            table = program.tensor(str(item.target))
            found.update(table.shape)
            if table.numel() == 1 and not (_hides(table.item()) and all(map(_takes_score, item.users))):
                note(table.item())
        else:
            fx.node.map_aggregate(
                (item.args, item.kwargs), note_unless_hiding if _takes_score(item) else note
            )
    return sorted(number for number in found if number > max(LENGTHS))


def _takes_score(node: fx.Node) -> bool:
    """Whether a call takes a number as a score to fill in, or as a factor."""
    value = node.meta.get("val")
    return (
        traits_of(node).kind in SCORE_FILLS and isinstance(value, torch.Tensor) and value.is_floating_point()
    )


def _hides(value: Any) -> bool:
    return isinstance(value, int | float) and value <= HIDDEN


def _value_used(source: fx.Node, within: set[fx.Node]) -> bool:
    """Whether an expression reads the values of an input, not only its sizes."""
    return any(user in within and user.target is not aten.sym_size.int for user in source.users)


def _batches(
    program: Program, padding: str | None, lengths: tuple[int, ...] = LENGTHS
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches at several lengths: padding is random (first position real), then ragged, then absent."""
    generator, rows = torch.Generator().manual_seed(0), row_sizes(program.inputs)
    for length in lengths:
        sizes = {
            name: BATCH if name in rows else length
            for name in {str(d) for s in program.inputs for d in s.shape if is_name(d)}
        }
        for kind in ("random", "ragged", "none"):
            batch = {}
            for spec in program.inputs:
                shape = [size_of(dim, sizes) or length for dim in spec.shape]
                value = torch.ones(shape, dtype=spec.dtype)
                if spec.name == padding and len(shape) == 2:
                    if kind == "random":
                        value = torch.randint(0, 2, shape, generator=generator).to(spec.dtype)
                        value[:, 0] = 1
                    elif kind == "ragged":
                        lengths_kept = torch.tensor([shape[1] - row for row in range(shape[0])]).clamp(min=1)
                        value = (torch.arange(shape[1])[None] < lengths_kept[:, None]).to(spec.dtype)
                batch[spec.name] = value
            yield batch


def evaluate_on(program: Program, node: fx.Node, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The value of the expression on one batch."""

    def leaf(item: fx.Node) -> Any:
        if item.op == "placeholder":
            return batch[str(item.target)]
        return program.tensor(str(item.target)).cpu() if item.op == "get_attr" else COMPUTED

    with torch.no_grad():
        result = value_of(node, leaf)
    assert isinstance(result, torch.Tensor)
    return result


def _seen(mask: torch.Tensor) -> torch.Tensor | None:
    """Which keys each query sees, bool[B or 1, queries or 1, keys]; None if heads differ or scores are biased."""
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((seen | (mask <= HIDDEN)).all()):
        return None
    while seen.dim() < 4:
        seen = seen.unsqueeze(0)
    if seen.dim() != 4 or not bool((seen == seen[:, :1]).all()):
        return None
    return seen[:, 0]


def _agrees(reading: Mask, seen: torch.Tensor, batch: dict[str, torch.Tensor]) -> bool:
    """Whether a reading predicts which keys are visible, for every query that sees at least one."""
    queries, keys = seen.shape[-2:]
    expected = torch.ones(seen.shape[0], max(queries, 1), keys, dtype=torch.bool)
    if reading.causal:
        if queries != keys:
            return False
        expected = expected & torch.ones(keys, keys, dtype=torch.bool).tril()
    if reading.padding is not None:
        padding = batch[reading.padding] != 0
        if padding.dim() != 2 or padding.shape[-1] != keys:
            return False
        expected = expected & padding[:, None, :]
    expected = expected.expand(
        torch.maximum(*(torch.tensor(item.shape) for item in (expected, seen))).tolist()
    )
    sees_any = expected.any(-1, keepdim=True)
    return bool(((expected == seen) | ~sees_any).all())
