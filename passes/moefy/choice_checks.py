"""Which options of `MoEfy` fit each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bmgraph.errors import InputError
from bmgraph.passes.moefy.active_experts import AUTO, check_average
from bmgraph.passes.moefy.coactivation import PARTITIONERS
from bmgraph.passes.moefy.grouping import COACTIVATION, SPLITS
from bmgraph.passes.moefy.neuron_statistics import LABELS
from bmgraph.passes.moefy.router import MIN_TOKENS, ORACLE, ROUTERS, TRAINED

if TYPE_CHECKING:
    from bmgraph.passes.moefy.moefy import MoEfy


def check_choices(given: MoEfy) -> None:
    """Raise InputError for an option that is not known, out of its range, or does not fit another."""
    if given.experts < 2:
        raise InputError(f"experts={given.experts}: give at least 2")
    for name, known in (("router", ROUTERS), ("split", SPLITS), ("labels", LABELS)):
        if getattr(given, name) not in known:
            raise InputError(f"{name}={getattr(given, name)!r}: choose one of {', '.join(known)}")
    _check_active(given)
    if given.threshold is not None:
        if not 0 < given.threshold < 1:
            raise InputError(
                f"threshold={given.threshold:g}: give a share of the best score, between 0 and 1"
            )
        if given.router not in (TRAINED, ORACLE):
            raise InputError(
                f"threshold= compares what experts are worth, and router={given.router!r} does not say it: take {TRAINED!r}"
            )
    if given.partitioner is not None:
        if given.partitioner not in PARTITIONERS:
            raise InputError(f"partitioner={given.partitioner!r}: choose one of {', '.join(PARTITIONERS)}")
        if given.split != COACTIVATION:
            raise InputError(
                f"partitioner= divides a graph of co-activation: give split={COACTIVATION!r} with it"
            )
    if given.tokens < MIN_TOKENS:
        raise InputError(f"tokens={given.tokens}: give at least {MIN_TOKENS}")


def _check_active(given: MoEfy) -> None:
    counts: list[int] = []
    if isinstance(given.active, str):
        if given.active != AUTO:
            raise InputError(f"active={given.active!r}: give a number of experts, or {AUTO!r}")
        if given.average is None:
            raise InputError(
                f"active={AUTO!r}: give average=, the mean number of active experts over all layers"
            )
    elif given.average is not None:
        raise InputError(f"average={given.average:g} is a budget to spend: give active={AUTO!r} with it")
    else:
        counts = [given.active] if isinstance(given.active, int) else [count for _, count in given.active]
    for count in counts:
        if not 1 <= count <= given.experts:
            raise InputError(f"active={count}: give 1 to {given.experts}, the number of experts")
    most = min(counts, default=given.experts) - 1
    if not 0 <= given.shared <= most:
        raise InputError(
            f"shared={given.shared}: give 0 to {most}, fewer than the experts that are active, so that tokens choose the rest"
        )
    if given.average is not None:
        check_average(given.average, given.experts, given.shared)
