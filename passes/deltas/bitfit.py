"""BitFit: train biases alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.site_filter import matches, resolve_patterns
from bmgraph.analysis.structure.sites import Linear, Part, Structure
from bmgraph.deltas.biases import biases_of
from bmgraph.deltas.bitfit import SHIFT, BitFitFamily
from bmgraph.deltas.family import Change
from bmgraph.errors import PassError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.passes.deltas.delta_pass import DeltaPass
from bmgraph.passes.deltas.site_choice import in_layers, unsupported


@dataclass(frozen=True, repr=False)
class BitFit(DeltaPass):
    """Train the biases that a model has, of linears, norms and convolutions, and freeze all else.

    add: linears without a bias get one too, which is zero at first. targets, exclude: patterns of the modules whose bias
    trains, by default all; roles: only biases of linears with these roles; layers, modules_to_save: as in `DeltaPass`. A new
    delta changes nothing, and merging is exact: biases that the model has are changed in place.

    Raises PassError where a pattern matches nothing, and for a model without biases. Source: Ben Zaken et al. 2022
    (arXiv:2106.10199).

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import BitFit
        >>> program = bg.capture(torch.nn.Linear(6, 4), (torch.randn(3, 6),))
        >>> tuned = bg.Pipeline([BitFit()]).run(program)
        >>> sorted(set(tuned.parameters) - tuned.frozen)
        ['bias']
    """

    family: ClassVar[type[BitFitFamily]] = BitFitFamily

    add: bool = False

    def new_change(self, program: Program, linear: Linear, stem: str, source: fx.Node | None) -> Change:
        """Zeros."""
        return Change({SHIFT: torch.zeros(linear.out_features)})

    def told(self, change: Change) -> str:
        """A bias."""
        return "a bias"

    def chosen(self, program: Program, structure: Structure, context: Context) -> dict[Part, str]:
        """The linears without a bias that get one."""
        if not self.add:
            return {}
        missing = {f"{item.path}.weight": item for item in structure.linears if item.bias is None}
        reasons = unsupported(program, structure)
        found = {}
        for site in self._kept(program, structure):
            item = missing.get(site)
            if item is not None and item.name in reasons:
                context.declined(item.name, reasons[item.name])
            elif item is not None:
                found[Part(item.name, ((0, item.out_features),))] = ""
        return found

    def biases(self, program: Program, structure: Structure, chosen: Sequence[Linear]) -> list[str]:
        """The biases of the model that are chosen. Raises PassError where nothing is."""
        kept = set(self._kept(program, structure))
        found = [name for name in biases_of(program) if _site(name) in kept]
        if not found and not chosen:
            raise PassError(
                "no bias is chosen, and none of a linear is missing"
                if self.add
                else "no bias of the model is chosen: BitFit(add=True) gives linears without one a bias that trains"
            )
        return found

    def _kept(self, program: Program, structure: Structure) -> list[str]:
        """The modules, as `<path>.weight`, of biases and linears that targets, roles, exclude and layers leave."""
        linears = {f"{item.path}.weight": item for item in structure.linears}
        sites = list(dict.fromkeys((*map(_site, biases_of(program)), *linears)))
        targets = resolve_patterns(self.targets or ("*",), sites, "targets")
        exclude = resolve_patterns(self.exclude, sites, "exclude")
        layers = in_layers(structure, self.layers) if self.layers else None
        roles = {site: item.role for site, item in linears.items()}
        for pattern in self.roles:
            if not any(fnmatchcase(role, pattern) for role in roles.values()):
                raise PassError(
                    f"roles={pattern!r} fits no role; known are {', '.join(sorted(set(roles.values())))}"
                )
        return [
            site
            for site in sites
            if matches(site, targets)
            and not matches(site, exclude)
            and (layers is None or (linears[site].name if site in linears else site) in layers)
            and (not self.roles or any(fnmatchcase(roles.get(site, ""), role) for role in self.roles))
        ]


def _site(bias: str) -> str:
    """The name of the weight beside a bias, as patterns name sites."""
    return f"{bias.rpartition('.')[0]}.weight".lstrip(".")
