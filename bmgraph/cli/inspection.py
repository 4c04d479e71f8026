"""What `bmgraph inspect --json` says of a program or an engine."""

from __future__ import annotations

from bmgraph.ir.program import Program
from bmgraph.runtime.engine_base import Engine


def inspection(loaded: Program | Engine) -> dict[str, object]:
    """Inputs and outputs in text; of a program its modules and the roles of its sites, of an engine its report."""
    found: dict[str, object] = {
        "kind": "program" if isinstance(loaded, Program) else "engine",
        "inputs": list(map(str, loaded.inputs)),
        "outputs": list(map(str, loaded.outputs)),
    }
    if not isinstance(loaded, Program):
        return {**found, "report": loaded.report.as_json()}
    structure = loaded.structure()
    return {
        **found,
        "fixed": list(loaded.fixed),
        "roles": dict(structure.roles),
        "layers": len(structure.layers),
        "modules": loaded.tree().as_json(),
    }
