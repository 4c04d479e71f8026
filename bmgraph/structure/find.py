"""Finding all sites of a program."""

from __future__ import annotations

from bmgraph.program import Program
from bmgraph.structure.attention import find_attentions
from bmgraph.structure.feedforward import find_feedforwards
from bmgraph.structure.linears import find_linears
from bmgraph.structure.others import find_embeddings, find_experts, find_layers, find_norms
from bmgraph.structure.sites import Attention, FeedForward, Structure


def find(program: Program) -> Structure:
    """The structure of a program in normal form; what passes put in front of weights or around activations is looked
    through, so that roles are the same before a pass and after it."""
    linears, sites = find_linears(program)
    attentions = find_attentions(program, sites)
    taken = {part[0] for item in attentions for part in (item.q, item.k, item.v)} | {
        item.o for item in attentions
    }
    feedforwards = find_feedforwards(program, sites, taken)
    return Structure(
        linears=linears,
        attentions=attentions,
        feedforwards=feedforwards,
        norms=find_norms(program),
        embeddings=find_embeddings(program),
        experts=find_experts(program),
        layers=find_layers(program, linears, attentions, feedforwards),
        roles=_roles(attentions, feedforwards),
    )


def _roles(
    attentions: tuple[Attention, ...], feedforwards: tuple[FeedForward, ...]
) -> dict[str, tuple[str, ...]]:
    roles: dict[str, dict[str, None]] = {}
    for item in attentions:
        for name, part in (("q", item.q), ("k", item.k), ("v", item.v)):
            roles.setdefault(part[0], {})[f"attention.{name}"] = None
        if item.o:
            roles.setdefault(item.o, {})["attention.o"] = None
    for feed in feedforwards:
        if feed.gate:
            roles.setdefault(feed.gate, {})["feedforward.gate"] = None
        roles.setdefault(feed.up, {})["feedforward.up"] = None
        roles.setdefault(feed.down, {})["feedforward.down"] = None
    return {site: tuple(names) for site, names in roles.items()}
