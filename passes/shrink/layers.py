"""Whole layers: which of them changes the hidden state least, and the program without them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from bmgraph.analysis.structure.layer_blocks import Block, NoBlock, layer_blocks
from bmgraph.errors import PassError
from bmgraph.ir.eval_form import in_eval
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.passes.shrink.unit_scores import RANDOM, TAYLOR, gradients, random_score
from bmgraph.utils.share import share_of


def remove_layers(program: Program, blocks: Sequence[Block], by: str) -> None:
    """Let what enters a layer take the place of what leaves it, in place."""
    with program.edit(by=by) as editor:
        for block in sorted(blocks, key=lambda item: -item.number):
            editor.replace(block.leaves, block.enters)


def numbered_layers(program: Program, numbers: Sequence[int]) -> list[Block]:
    """The layers of these numbers. Raises PassError for one that is not there or cannot be left out, and where none stays."""
    known = layer_blocks(program)
    said = f"layers=[{', '.join(map(str, numbers))}]"
    found = []
    for number in numbers:
        if number >= len(known):
            has = (
                f"the program's layers are 0 to {len(known) - 1}"
                if known
                else "the program has no repeated layers"
            )
            raise PassError(f"{said}: {has}")
        block = known[number]
        if isinstance(block, NoBlock):
            raise PassError(f"{said}: layer {number} ({block.path}) cannot be left out: {block.why}")
        found.append(block)
    left = Counter(block.stack for block in known if block.number not in numbers)
    for block in found:
        if not left[block.stack]:
            raise PassError(f"{said}: leaves no layer of the stack that {block.path} is in; leave one in")
    return found


def redundancy(program: Program, blocks: Sequence[Block], context: Context) -> list[float]:
    """One minus the mean cosine of what enters and what leaves each layer, over the positions of the calibration data: how much
    the layer turns the hidden state (Men et al. 2024, arXiv:2403.03853)."""
    sums: dict[int, float] = defaultdict(float)
    counts: Counter[int] = Counter()
    held: dict[str, torch.Tensor] = {}
    entered, left = defaultdict(list), defaultdict(list)
    for block in blocks:
        entered[in_eval(block.enters).name].append(block)
        left[in_eval(block.leaves).name].append(block)

    def visit(name: str, value: torch.Tensor) -> None:
        for block in left.get(name, []):
            before = held.pop(in_eval(block.enters).name)
            cosines = torch.nn.functional.cosine_similarity(before.double(), value.double(), -1)
            sums[block.number] += float((1 - cosines).sum())
            counts[block.number] += cosines.numel()
        if name in entered:
            held[name] = value

    context.calibrate(program, {*entered, *left}, visit)
    return [sums[block.number] / counts[block.number] for block in blocks]


def layer_scores(
    program: Program, blocks: Sequence[Block], score: str, seed: int, context: Context
) -> list[float]:
    """How much each layer is worth: by redundancy, or, by these scores, to first order in the loss, or at random."""
    if score == RANDOM:
        return [float(random_score(block.path, 1, seed)) for block in blocks]
    measure = _taylor if score == TAYLOR else redundancy
    return context.kept(f"{score} of layers", lambda: measure(program, blocks, context))


def _taylor(program: Program, blocks: Sequence[Block], context: Context) -> list[float]:
    """How much the loss changes without each layer, to first order."""
    names = {in_eval(node).name for block in blocks for node in (block.enters, block.leaves)}
    sums = [0.0] * len(blocks)
    for values in gradients(program, names, context):
        for place, block in enumerate(blocks):
            (before, _), (after, gradient) = (
                values[in_eval(node).name] for node in (block.enters, block.leaves)
            )
            change = (gradient * (before - after)).flatten(1).sum(1)
            sums[place] += float(change.abs().sum())
    return sums


def redundant_layers(
    program: Program, share: float, scope: str, wanted: Any, score: str, seed: int, context: Context
) -> tuple[list[Block], list[str]]:
    """The share of the layers that matter least, of each stack or of all together, and what to say of each; one of every stack
    stays. `wanted(path)`: whether a layer is asked for."""
    every = layer_blocks(program)
    if not every:
        raise PassError(f"layers={share}: the program has no repeated layers")
    known = [block for block in every if wanted(block.path)]
    for block in known:
        if isinstance(block, NoBlock):
            context.declined(block.path, block.why)
    blocks = [block for block in known if isinstance(block, Block)]
    sizes = Counter(block.stack for block in every)
    counts = {stack: share_of(share, size) for stack, size in sizes.items()}
    total = share_of(share, sizes.total()) if scope == "global" else sum(counts.values())
    if not blocks or not total:
        for block in blocks:
            context.declined(block.path, f"{share:g} of {sizes[block.stack]} layers rounds to zero")
        return [], []
    scores = layer_scores(program, blocks, score, seed, context)
    chosen: list[Block] = []
    said: list[str] = []
    left = Counter(sizes)
    for value, _, block in sorted(zip(scores, range(len(blocks)), blocks), key=lambda item: item[:2]):
        most = (
            sizes[block.stack] - 1 if scope == "global" else min(counts[block.stack], sizes[block.stack] - 1)
        )
        if sizes[block.stack] - left[block.stack] < most and len(chosen) < total:
            left[block.stack] -= 1
            chosen.append(block)
            said.append(_said(value, score))
    return chosen, said


def _said(value: float, score: str) -> str:
    if score == RANDOM:
        return "chosen at random"
    return (
        f"|gradient x change| {value:.3g}"
        if score == TAYLOR
        else f"cosine of what enters and leaves it {1 - value:.4f}"
    )
