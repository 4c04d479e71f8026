"""Deltas: serve several saved deltas in one program; each row of the batch selects one, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.structure.sites import Linear
from bmgraph.deltas.changed_weights import with_changed_weights
from bmgraph.deltas.low_rank import DeltaCalls, delta_input
from bmgraph.deltas.peft_format import Adapter, Change
from bmgraph.errors import InputError, PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.node_role import DELTA
from bmgraph.ir.program import FORWARD, Program
from bmgraph.ir.shape_inference import dim_text
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.adapter_matching import adapter_changes, is_backbone_of, load_adapter, match_adapter
from bmgraph.verify.proof import Proof

aten = torch.ops.aten

SLACK = 10
"""How much more than rounding a delta may differ from a changed weight: its sums have another order."""


@dataclass(frozen=True, repr=False)
class Deltas(ModelPass):
    """Attach several saved deltas: `Deltas(("trec", "spam"))` with `resources={"trec": "trec/", "spam": "spam/"}`.

    The program gets an input `delta: int64[batch]`: row i uses delta number `delta[i]`, counted from 1; 0 is none.
    Callers give names, `program(**batch, delta=["trec", None])`, one name for all rows, numbers, or leave it out (no
    delta).

    At each linear the n deltas are stacked: A [n + 1, in, r] and B [n + 1, r, out], with the scale multiplied into B, and
    zeros where a delta has a smaller rank or does not change this linear. Each row gathers its A and B, and two batched
    matmuls compute the change. All deltas are frozen.

    Raises what `LoadDelta` raises, and PassError for a linear whose input does not have one row per row of the batch.
    """

    effect: ClassVar[Effect] = "intended"
    provides: ClassVar[frozenset[str]] = frozenset({"delta-per-row"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"delta-per-row"})

    names: tuple[str, ...] = ()
    input: str = "delta"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names or len(set(self.names)) != len(self.names):
            raise InputError(
                f"names={self.names!r}: give the name of each delta once, Deltas(('one', 'other'))"
            )

    @property
    def resources(self) -> tuple[str, ...]:
        """The adapter folders, by the names of the deltas."""
        return self.names

    def fits(self, program: Program, context: Context) -> bool:
        """Whether all adapters were trained on the program."""
        return is_backbone_of(program, [load_adapter(context, name) for name in self.names])

    def run(self, program: Program, context: Context) -> Program:
        """Add the input, and the stacked deltas at each linear that an adapter changes."""
        changes: dict[Linear, dict[int, Change]] = {}
        for number, name in enumerate(self.names, 1):
            adapter = load_adapter(context, name)
            _check_low_rank(program, name, adapter)
            for module, linear in match_adapter(program, adapter).items():
                changes.setdefault(linear, {})[number] = adapter.changes[module]
        with program.edit(by=str(self)) as editor:
            nodes = {node.name: node for node in editor.graph.nodes}
            selector = _selector(editor, self.input, self.names)
            for linear, by_number in changes.items():
                site = linear.name
                a, b = _stack(by_number, len(self.names))
                uses = [nodes[use.node] for use in linear.uses if use.graph == FORWARD]
                _attach(editor, site, uses, selector, a, b)
                chosen = ", ".join(self.names[number - 1] for number in by_number)
                context.edited(site, f"rank {a.shape[2]}: {chosen}")
        return program

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """Rows that all choose one delta must be what that delta alone gives, and mixed rows what each of them gives."""
        proof.same(before, after, "rows that choose no delta are changed", SLACK, {self.input: 0})
        for number, name in enumerate(self.names, 1):
            changes = adapter_changes(before, load_adapter(context, name))
            expected = with_changed_weights(before, changes)
            what = f"rows that choose {name!r} are not what it gives"
            proof.same(expected, after, what, SLACK, {self.input: number})
        proof.same_rows(after, self.input, len(self.names) + 1, "a row depends on what others choose", SLACK)


def _check_low_rank(program: Program, name: str, adapter: Adapter) -> None:
    """Raise PassError for an adapter that changes more than low-rank factors, which no row can choose."""
    changed = [
        tensor
        for tensor, value in {**adapter.copies, **adapter.whole}.items()
        if tensor in adapter.whole or not _same(program, tensor, value)
    ]
    if changed:
        raise PassError(
            f"delta {name!r} in {adapter.path} changes {', '.join(changed[:3])} whole (modules_to_save), which a row cannot "
            "choose: load it alone with LoadDelta"
        )


def _same(program: Program, name: str, value: torch.Tensor) -> bool:
    found = program.tensors().get(program.ties.get(name, name))
    return found is not None and found.shape == value.shape and torch.equal(value.to(found), found)


def _selector(editor: Editor, name: str, names: tuple[str, ...]) -> fx.Node:
    """Add the input that selects a delta for each row; in the example the rows cycle through none and all deltas."""
    first = next(node for node in editor.graph.nodes if node.op == "placeholder")
    rows = first.meta["val"].shape[0]
    example = editor.program.example.get(str(first.target))
    count = 2 if example is None else len(example)
    selected = torch.arange(count, device=editor.program.device) % (len(names) + 1)
    return editor.input(name, selected, (rows,), names, InputKind.CHOICE)


def _stack(changes: Mapping[int, Change], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [count + 1, in, r] and B [count + 1, r, out] of one linear, padded with zeros; `changes` by number of the delta."""
    first = next(iter(changes.values()))
    rank = max(change.a.shape[0] for change in changes.values())
    a = torch.zeros(count + 1, first.a.shape[1], rank)
    b = torch.zeros(count + 1, rank, first.b.shape[0])
    for number, change in changes.items():
        r = change.a.shape[0]
        a[number, :, :r] = change.a.T
        b[number, :r] = change.b.T * change.scale
    return a, b


def _attach(
    editor: Editor, site: str, uses: Sequence[fx.Node], selector: fx.Node, a: torch.Tensor, b: torch.Tensor
) -> None:
    """Add the change of each row's delta to every use of a linear."""
    program = editor.program
    like = {"device": program.device, "dtype": uses[0].meta["val"].dtype}
    readers = [
        editor.parameter(editor.fresh(f"{site}_deltas_{letter}"), tensor.to(**like), frozen=True, part=DELTA)
        for letter, tensor in (("a", a), ("b", b))
    ]
    for reader in readers:
        reader.meta["site"] = site
    for linear in uses:
        _attach_one(editor, site, linear, selector, readers)


def _attach_one(
    editor: Editor, site: str, linear: fx.Node, selector: fx.Node, stacked: Sequence[fx.Node]
) -> None:
    x = delta_input(linear)
    sizes = x.meta["val"].shape
    rows, expected = (dim_text(editor.program, size) for size in (sizes[0], selector.meta["val"].shape[0]))
    if len(sizes) < 2 or rows != expected:
        raise PassError(
            f"{site} takes {rows} rows where the batch has {expected}: deltas cannot be selected per row there; merge "
            "one delta, or use deltas that do not change that linear"
        )
    call = DeltaCalls(editor, linear, site)
    per_row = [call(aten.index_select.default, tensor, 0, selector) for tensor in stacked]
    for _ in range(len(sizes) - 3):
        per_row = [call(aten.unsqueeze.default, tensor, 1) for tensor in per_row]
    if len(sizes) == 2:
        x = call(aten.unsqueeze.default, x, 1)
    change = call(aten.matmul.default, call(aten.matmul.default, x, per_row[0]), per_row[1])
    call.add(call(aten.squeeze.dim, change, 1) if len(sizes) == 2 else change)
