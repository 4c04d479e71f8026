"""What a scheme stores in the place of a weight: codes and scales, and how a graph makes the weight of them again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.weight_sites import Weight
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import NodeRole
from bmgraph.pass_manager.target import Target
from bmgraph.passes.quantize.code_grid import Encoded
from bmgraph.passes.quantize.mse import ScaleRule


@dataclass(frozen=True)
class WeightFormat(ABC):
    """A format of codes. Weights are f[out, in], or f[in, out] with `axis` = 1; those of experts f[E, out, in].

    `granularity`: what one scale covers, as in `Target.weight_scales`. `activation_modes`: how the input of a product may be
    rounded beside such codes; `preferred_modes`: these, best first, or none for the order of the target; `input_codes`: the codes of inputs
    with a static scale, None for those of the target. `site_drift`, `drift`, `weight_bound`: default bounds on the output of a site, on outputs
    of the model, and on a weight (relative L2).
    """

    granularity: ClassVar[str]
    activation_modes: ClassVar[tuple[str, ...]]
    preferred_modes: ClassVar[tuple[str, ...]] = ()
    input_codes: ClassVar[torch.dtype | None] = None

    @property
    @abstractmethod
    def site_drift(self) -> float:
        """The bound on the output of a site."""

    @property
    @abstractmethod
    def drift(self) -> float:
        """The bound on outputs of the model."""

    @property
    @abstractmethod
    def weight_bound(self) -> float:
        """The bound on a weight."""

    @property
    def input_block(self) -> int | None:
        """How many values of an input share a scale where inputs are rounded by blocks; None where they are not."""
        return None

    @abstractmethod
    def takes_experts(self, target: Target) -> bool:
        """Whether a target multiplies by such codes of experts."""

    @abstractmethod
    def encode(self, weight: torch.Tensor, axis: int, rule: ScaleRule | None = None) -> Encoded:
        """Codes and scales of a weight whose outputs lie along `axis`, every code the nearest one. Meta gives meta.

        `rule` chooses scales; without, the largest values fill them.
        """

    @abstractmethod
    def decode(self, stored: Encoded, shape: torch.Size, axis: int) -> torch.Tensor:
        """The weight, of `shape`, that codes and scales stand for."""

    @abstractmethod
    def call(self, editor: Editor, readers: tuple[fx.Node, ...], weight: Weight, like: fx.Node) -> fx.Node:
        """Add the node that makes the weight of the nodes that read its codes, its scales and, where there are some, its zero points."""

    @abstractmethod
    def simulate(self, editor: Editor, weight: Weight, step: fx.Node, like: fx.Node) -> fx.Node:
        """Add the node that makes the weight, rounded to the nearest codes at the steps that `step` reads, while it trains.

        Steps have the shape of scales. `bmgraph.lowering.store_codes` makes codes of it.
        """

    def place(self, editor: Editor, weight: Weight, stored: Encoded, like: fx.Node, name: str) -> fx.Node:
        """Add codes, scales and zero points as the parameters `name`_codes, `name`_scale and `name`_zero, and the node that stands for
        the weight."""
        node = weight.node
        readers = [
            editor.parameter(f"{name}_codes", stored.codes, like=node, part=NodeRole.CODES),
            editor.parameter(f"{name}_scale", stored.scale, like=node, frozen=True, part=NodeRole.SCALE),
        ]
        if stored.zero is not None:
            zero = editor.parameter(f"{name}_zero", stored.zero, like=node, part=NodeRole.ZERO_POINT)
            readers.append(zero)
        return self.call(editor, tuple(readers), weight, like)
