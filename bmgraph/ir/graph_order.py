"""The order in which graphs of a program run: those that give inputs of others come first."""

from __future__ import annotations

from bmgraph.errors import VerificationError
from bmgraph.ir.program import Program


def running_order(program: Program) -> list[Program]:
    """The program at each of its graphs, those that give inputs of others before these.

    Raises VerificationError where graphs take each other's outputs in a circle.
    """
    left, ordered = program.entries(), list[Program]()
    while left:
        done = {entry.entry for entry in ordered}
        ready = [entry for entry in left if done.issuperset(feeder.entry for feeder in entry.feeders())]
        if not ready:
            raise VerificationError(
                f"the graphs {', '.join(entry.entry for entry in left)} take each other's outputs as inputs, by name: rename "
                "one of them"
            )
        ordered += ready
        left = [entry for entry in left if entry not in ready]
    return ordered


def graphs_beside(program: Program) -> list[Program]:
    """The program at each of its other graphs, in running order, except those that need the outputs of its entry."""
    found: list[Program] = []
    for entry in running_order(program):
        known = {item.entry for item in found}
        if entry.entry != program.entry and known.issuperset(item.entry for item in entry.feeders()):
            found.append(entry)
    return found
