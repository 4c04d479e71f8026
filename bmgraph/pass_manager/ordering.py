"""Checks the order of passes by their contracts, before any runs, and finds an order that holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import networkx as nx

from bmgraph.errors import OrderError
from bmgraph.pass_manager.pass_base import FINAL, FOR_ENGINES, STAGES, ModelPass, Pass, StepPass


def check_order(
    passes: Sequence[Pass],
    has: Iterable[str] = (),
    stages: Iterable[str] = STAGES,
    known: Callable[[], Iterable[type[Pass]]] = tuple,
    resources: Mapping[str, object] = MappingProxyType({}),
    added: Sequence[Pass] = (),
) -> None:
    """Raise OrderError unless every pass finds what it requires and nothing that it conflicts with.

    `has` is what the program already provides, `stages` are those of the backend, `known` gives the passes among which
    one that provides a missing requirement is looked for, `resources` what passes may read to say what they provide. The message names an order that holds, where there is one, without
    the passes that a backend has `added`.
    """
    check_passes(passes)
    for item in passes:
        if item.acts_on not in stages:
            raise OrderError(f"pass {item} is of the {item.acts_on} stage, which this backend does not have")
    problem = _problem(passes, frozenset(has))
    if problem is None:
        return
    mended = _mend(passes, frozenset(has))
    if mended is not None and _problem(mended, frozenset(has), resources) is None:
        asked = without(mended, added)
        if asked != without(passes, added):
            raise OrderError(f"{problem}; {offer(asked)}")
    raise OrderError(problem + _missing(passes, frozenset(has), known(), added))


def without(passes: Iterable[Pass], others: Sequence[Pass]) -> list[Pass]:
    """The passes that are none of the others: not those that a backend has added, or those alone. Equal ones are two."""
    return [item for item in passes if all(item is not other for other in others)]


def holds(passes: Sequence[Pass], has: Iterable[str]) -> bool:
    """Whether every pass finds what it requires and nothing that it conflicts with."""
    return _problem(passes, frozenset(has)) is None


def check_passes(passes: Iterable[object]) -> None:
    """Raise OrderError for anything that is not a pass of either stage."""
    for item in passes:
        if not isinstance(item, Pass):
            raise OrderError(f"{item!r} is not a pass: give instances, such as Quantize('int8')")
        if not isinstance(item, (ModelPass, StepPass)):
            raise OrderError(
                f"pass {item} is of no stage: derive {type(item).__name__} from ModelPass or StepPass"
            )


def offer(passes: Iterable[Pass]) -> str:
    """The part of an error that offers another order."""
    return f"try this order: passes={_listed(passes)}"


def _listed(passes: Iterable[Pass]) -> str:
    return f"[{', '.join(map(str, passes))}]"


def _problem(
    passes: Sequence[Pass], has: frozenset[str], resources: Mapping[str, object] | None = None
) -> str | None:
    """What is wrong with the first pass whose contract does not hold, also on `resources` if these are given; None where all hold."""
    present = set(has)
    for index, item in enumerate(passes):
        for later in passes[index + 1 :]:
            if STAGES.index(later.acts_on) < STAGES.index(item.acts_on):
                return f"pass {later} is of the {later.acts_on} stage and cannot follow {item}, of the {item.acts_on} stage"
        lacking = sorted(item.required - present)
        if lacking:
            return f"pass {item} requires {', '.join(lacking)}, which nothing before it provides"
        clashing = sorted(item.excluded & present)
        if clashing:
            return f"pass {item} cannot run on a program that is {', '.join(clashing)}"
        present |= item.provides if resources is None else item.provides_with(resources)
    return None


def _mend(passes: Sequence[Pass], has: frozenset[str]) -> list[Pass] | None:
    """The order nearest to the given one in which every contract holds; None where there is none."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(passes)))
    for first, one in enumerate(passes):
        for second, other in enumerate(passes):
            if first == second:
                continue
            earlier_stage = STAGES.index(one.acts_on) < STAGES.index(other.acts_on)
            if earlier_stage or one.provides & other.required or one.excluded & other.provides:
                graph.add_edge(first, second)
    if not nx.is_directed_acyclic_graph(graph):
        return None
    order = [passes[index] for index in nx.lexicographical_topological_sort(graph)]
    return order if _problem(order, has) is None else None


def _missing(
    passes: Sequence[Pass], has: frozenset[str], known: Iterable[type[Pass]], added: Sequence[Pass]
) -> str:
    """What the message adds where no order holds: the passes that provide what is missing, or to train first."""
    provided = has.union(*(item.provides for item in passes))
    wanted = {need for item in passes for need in item.required if need not in provided}
    helpers = sorted({kind.__name__ for kind in known if kind.provides & wanted})
    if helpers:
        return f"; put one of these before it: {', '.join(helpers)}"
    if wanted:
        return ""
    before = [item for item in passes if not item.provides & {FINAL, FOR_ENGINES}]
    final = without([item for item in passes if item.provides & {FINAL, FOR_ENGINES}], added)
    if final and any(item.acts_on == "step" for item in before) and _problem(before, has) is None:
        return f"; train first, {offer(without(before, added))}, then bg.compile(trainer.program(), passes={_listed(final)})"
    return "; no order of these passes is valid: leave one of them out"
