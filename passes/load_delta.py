"""LoadDelta: attach a delta that was saved to disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import ClassVar

from bmgraph.deltas.backbone import check_backbone_frozen, freeze_backbone
from bmgraph.deltas.linear_family import LinearFamily
from bmgraph.deltas.lr_ratio import check_lr_ratio, set_lr_ratio
from bmgraph.deltas.peft_format import read_adapter
from bmgraph.errors import BundleError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.adapter_matching import check_backbone, is_backbone_of, load_adapter, with_adapter
from bmgraph.verify.proof import Proof


@dataclass(frozen=True, repr=False)
class LoadDelta(ModelPass):
    """Attach a delta that `save_delta` or PEFT wrote: `LoadDelta("trec")` with `resources={"trec": "trec/"}`.

    The delta is of any known family, and stays trainable; everything else is frozen. Modules that were trained whole beside
    it (PEFT's `modules_to_save`) get their values, and train on. The backbone may have been quantized or pruned since the
    delta was saved. lr_ratio: as in LoRA, for one that trains on. Where other versions captured the backbone, a difference in what it computes is a warning.

    Raises ResourceError where the folder is not given, BundleError where it was altered or is not an adapter,
    MisplacedError where the fingerprint, what the model computes, a module or a shape belongs to another backbone.
    """

    effect: ClassVar[Effect] = "intended"
    changes: ClassVar[frozenset[str]] = frozenset({"frozen", "ranges"})
    provides: ClassVar[frozenset[str]] = frozenset({"delta"})

    delta: str = "delta"
    lr_ratio: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lr_ratio(self.lr_ratio)

    @property
    def resources(self) -> tuple[str, ...]:
        """The adapter folder."""
        return (self.delta,)

    def provides_with(self, resources: Mapping[str, object]) -> frozenset[str]:
        """A delta that `Merge` may fold, unless the folder holds one of a family that changes no weight."""
        path = resources.get(self.delta)
        try:
            adapter = read_adapter(Path(path)) if isinstance(path, (str, PathLike)) else None
        except BundleError:
            return self.provides
        parts = [] if adapter is None else [part for part in adapter.parts if not part.empty]
        folds = any(isinstance(part.family, LinearFamily) and part.family.folds for part in parts)
        return self.provides if folds or not parts else frozenset()

    def fits(self, program: Program, context: Context) -> bool:
        """Whether the adapter was trained on the program."""
        return is_backbone_of(program, [load_adapter(context, self.delta)])

    def run(self, program: Program, context: Context) -> Program:
        """Let the family of the adapter put it on the program, and that of whole modules what was trained beside it."""
        adapter = load_adapter(context, self.delta)
        check_backbone(program, adapter)
        known, whole = set(program.parameters), program.trained_whole
        for part in adapter.parts:
            for edit in part.family.attach(program, part, by=str(self)):
                context.edited(edit.site, f"{edit.what}, of {self.delta!r}", edit.tensors)
        freeze_backbone(program)
        set_lr_ratio(program, known, whole, self.lr_ratio)
        return program

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """It must compute what the families make of the program by other means, such as changed weights."""
        check_backbone_frozen(after)
        adapter = load_adapter(context, self.delta)
        expected, what = with_adapter(before, adapter), f"it does not compute {self.delta!r}"
        if any(part.family.takes_positions for part in adapter.parts if not part.empty):
            proof.same_values(expected, after, lambda batch: batch, lambda outputs: outputs, what, slack=10)
        else:
            proof.same(expected, after, what, slack=10)
