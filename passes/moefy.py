"""MoEfy: the neurons of a feed-forward in groups, of which each token computes a few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers experts_linear)
from bmgraph.clusters import EMPTY, balanced_clusters
from bmgraph.context import CALIBRATION, Context
from bmgraph.editor import Editor
from bmgraph.errors import InputError, PassError
from bmgraph.modes import in_eval
from bmgraph.observe import evaluate
from bmgraph.parts import NEURONS, ROUTER
from bmgraph.pass_base import Effect, Pass
from bmgraph.program import Program
from bmgraph.routing import HELD_OUT, Router, Sample, held, train_router, untrained_router
from bmgraph.select import check_patterns, matches
from bmgraph.skeleton import ROUNDINGS
from bmgraph.splitting import is_splittable, pick, split_bias, split_inputs, split_outputs
from bmgraph.structure.linears import linear_name
from bmgraph.structure.neurons import Neurons, NotNeurons, neurons_of
from bmgraph.structure.sites import FeedForward

aten = torch.ops.aten
ours = torch.ops.bmgraph

ROUTERS = ("trained", "oracle", "random")

LEAST_ROWS = 2 * HELD_OUT
"""The fewest calibration tokens that a router is made from."""


@dataclass(frozen=True, repr=False)
class MoEfy(Pass):
    """Part the neurons of every feed-forward into `experts` groups of equal size, of which each token computes `active`.

    Neurons whose first weights (the gate's, where there is one) point the same way come together; weights keep their
    names and become [experts, out, in], their codes and scales as they were. A feed-forward whose neurons do not divide
    is filled up with neurons of zeros. With active == experts nothing changes but the order of sums.

    router: "trained", a small network that learns on the calibration batches how large each expert's output is;
    "random", the same untrained, as a control; "oracle", which computes all experts to choose the best: only for
    measuring. Routers do not train later (a choice has no gradient) and are marked frozen. include, exclude: globs over
    module paths of first linears. tokens: how many of the calibration batches' tokens a router is trained on; they are
    held in memory, f32[tokens, features] for each site.

    Raises PassError where there are more experts than neurons or no site is left, ResourceError without calibration.
    Source: Zhang et al. 2022 (MoEfication); the router after Szatkowski et al. 2024 (D2DMoE).

    Example:
        >>> from bmgraph.passes import MoEfy
        >>> MoEfy(experts=32, active=8, exclude=("*.layers.0.*",))
        moefy{experts=32,active=8,exclude=[*.layers.0.*]}
    """

    effect: ClassVar[Effect] = "approximate"
    provides: ClassVar[frozenset[str]] = frozenset({"moefied"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"moefied"})
    default_drift: ClassVar[float] = 1.0
    """What is left out depends on how few neurons the model uses for a token, which no option says: the bound stops only
    what is no better than no output at all. `max_drift` says what is good enough."""

    experts: int = 16
    active: int = 4
    router: str = "trained"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    tokens: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts < 2:
            raise InputError(f"experts={self.experts}: give at least 2")
        if not 1 <= self.active <= self.experts:
            raise InputError(f"active={self.active}: give 1 to {self.experts}, the number of experts")
        if self.router not in ROUTERS:
            raise InputError(f"router={self.router!r}: choose one of {', '.join(ROUTERS)}")
        if self.tokens < LEAST_ROWS:
            raise InputError(f"tokens={self.tokens}: give at least {LEAST_ROWS}")

    @property
    def resources(self) -> tuple[str, ...]:
        """The batches that routers learn from."""
        return () if self.router == "oracle" else (CALIBRATION,)

    def run(self, program: Program, context: Context) -> Program:
        """Part the feed-forwards of a program."""
        if program.device.type == "meta":
            raise PassError("neurons are grouped by their weights, and a program on the meta device has none")
        sites = self._choose(program, context)
        samples = {}
        if sites and self.router != "oracle":
            samples = _samples(program, context, sites, self.tokens)
        with program.edit(by=str(self)) as editor:
            for site in sites:
                router, told = self._router(site, samples.get(site.name))
                _part(editor, site, self.active, router)
                size = site.groups.shape[1]
                context.edited(
                    site.name, f"{self.experts} experts of {size} neurons, {self.active} active{told}"
                )
        return program

    def _choose(self, program: Program, context: Context) -> list[_Site]:
        found = program.structure().feedforwards
        names = [item.up.linear for item in found]
        check_patterns((*self.include, *self.exclude), names, "include or exclude")
        chosen = []
        for item in found:
            name = item.up.linear
            if not matches(name, self.include) or matches(name, self.exclude):
                continue
            if item.features < self.experts:
                raise PassError(
                    f"experts={self.experts}, but the feed-forward of {name} has {item.features} neurons: "
                    f"give at most {item.features}"
                )
            try:
                chosen.append(self._site(program, item))
            except NotNeurons as reason:
                context.declined(name, str(reason))
        return chosen

    def _site(self, program: Program, item: FeedForward) -> _Site:
        """The nodes of a feed-forward, with its neurons in groups; raises NotNeurons where it cannot be parted."""
        uses = neurons_of(program, item)
        linears = {node for use in uses for node in (*use.linears, use.down)}
        for node in linears:
            weight = node.args[1]
            assert isinstance(weight, fx.Node)
            if not is_splittable(weight, linears):
                raise NotNeurons(
                    f"the weight of {node.name} is read elsewhere, or made in a way that cannot be parted"
                )
        first = uses[0].entrances[0]
        rows = evaluate(program, first.node.args[1])[first.rows]  # type: ignore[arg-type]
        return _Site(item.up.linear, uses, balanced_clusters(rows, self.experts, self.seed))

    def _router(self, site: _Site, sample: Sample | None) -> tuple[Router | None, str]:
        """The router of a site, and what is told of it."""
        if sample is None:
            return None, ", chosen by an oracle that computes them all"
        x, scores = sample.rows()
        if len(x) < LEAST_ROWS:
            raise PassError(
                f"{site.name}: a router needs at least {LEAST_ROWS} calibration tokens, not {len(x)}"
            )
        kept = torch.arange(len(x)) % HELD_OUT == 0
        if self.router == "random":
            router = untrained_router(x, self.experts, self.seed)
        else:
            router = train_router(x[~kept], scores[~kept], self.seed)
        share, best = (
            held(scores[kept], guesses, self.active) for guesses in (router(x[kept]), scores[kept])
        )
        return router, f"; they hold {share:.0%} of what all give (squared norms), the best choice {best:.0%}"


@dataclass(frozen=True)
class _Site:
    """A feed-forward: the name of its first weight, its uses, and the neurons of each expert, i64[experts, size]."""

    name: str
    uses: Sequence[Neurons]
    groups: torch.Tensor


@dataclass(frozen=True)
class _Front:
    """One linear of all experts: its name, its weight [E, O, I] and bias [E, O], and for each of the gate and up that it
    makes the part of O."""

    site: str
    weight: fx.Node
    bias: fx.Node | None
    spans: tuple[tuple[int, int], ...]


def _samples(program: Program, context: Context, sites: Sequence[_Site], limit: int) -> dict[str, Sample]:
    """For each site, what entered it and the norm of what each expert gave, on calibration tokens."""
    samples = {site.name: Sample(limit) for site in sites}
    entering: dict[str, torch.Tensor] = {}
    readers: dict[str, list[tuple[_Site, Neurons, torch.Tensor]]] = {}
    for site in sites:
        matrix = evaluate(program, site.uses[0].down.args[1]).float()  # type: ignore[arg-type]
        columns = pick(matrix, site.groups, 1)
        gram = columns @ columns.transpose(1, 2)
        for use in site.uses:
            readers.setdefault(_entering_down(use).name, []).append((site, use, gram))
    sources = {in_eval(_entering(use)).name for site in sites for use in site.uses}

    def visit(name: str, value: torch.Tensor) -> None:
        if name in sources:
            entering[name] = value.reshape(-1, value.shape[-1]).float()
        for site, use, gram in readers.get(name, ()):
            groups = pick(value.reshape(-1, value.shape[-1]).float(), site.groups, 1)
            norms = ((groups.transpose(1, 2) @ gram) * groups.transpose(1, 2)).sum(-1).clamp(min=0).sqrt()
            samples[site.name].add(entering[in_eval(_entering(use)).name], norms.T)

    context.calibrate(program, {*sources, *readers}, visit)
    return samples


def _entering(use: Neurons) -> fx.Node:
    """What a feed-forward reads, before it is rounded."""
    node: Any = use.entrances[0].node.args[0]
    while node.target in ROUNDINGS:
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node


def _entering_down(use: Neurons) -> fx.Node:
    """What the last linear reads, in eval form."""
    node = use.down.args[0]
    assert isinstance(node, fx.Node)
    return in_eval(node)


def _part(editor: Editor, site: _Site, active: int, router: Router | None) -> None:
    """Rewrite all uses of one feed-forward."""
    first = site.uses[0]
    fronts = [_front(editor, site, linear) for linear in first.linears]
    last = split_inputs(editor, first.down.args[1], site.groups)  # type: ignore[arg-type]
    readers = _router_parameters(editor, site, router) if router is not None else ()
    for use in site.uses:
        call = partial(editor.call, like=use.down, site=site.name, part=ROUTER)
        if readers:
            hidden = call(aten.relu.default, call(aten.linear.default, _entering(use), *readers[:2]))
            scores = call(aten.linear.default, hidden, *readers[2:])
        else:
            scores = _true_scores(call, _through(editor, use, fronts, partial(_everywhere, call)), last)
        ids = call(getitem, call(aten.topk.default, scores, active), 1)

        def chosen(x: fx.Node, front: _Front, ids: fx.Node = ids, use: Neurons = use) -> fx.Node:
            return editor.call(
                ours.experts_linear.default,
                x,
                front.weight,
                ids,
                front.bias,
                like=use.down,
                site=front.site,
                part=NEURONS,
            )

        inside = _through(editor, use, fronts, chosen)
        down = _Front(linear_name(editor.program, use.down), last, None, ())
        finish = partial(editor.call, like=use.down, site=down.site, part=NEURONS)
        made = finish(aten.sum.dim_IntList, chosen(inside, down), [-2])
        if len(use.down.args) > 2:
            made = finish(aten.add.Tensor, made, use.down.args[2])
        editor.replace(use.down, made)


def _front(editor: Editor, site: _Site, linear: fx.Node) -> _Front:
    rows = [item.rows for item in site.uses[0].entrances if item.node is linear]
    index = torch.cat([pick(item, site.groups, 0, empty=EMPTY) for item in rows], 1)
    size = site.groups.shape[1]
    name = linear_name(editor.program, linear)
    bias = linear.args[2] if len(linear.args) > 2 else None
    return _Front(
        name,
        split_outputs(editor, linear.args[1], index),  # type: ignore[arg-type]
        split_bias(editor, f"{name}_bias", bias, index) if isinstance(bias, fx.Node) else None,
        tuple((place * size, place * size + size) for place in range(len(rows))),
    )


def _router_parameters(editor: Editor, site: _Site, router: Router) -> tuple[fx.Node, ...]:
    down = site.uses[0].down
    named = (
        ("_router_hidden", router.first), ("_router_hidden_bias", router.first_bias), ("_router", router.second),
        ("_router_bias", router.second_bias),
    )  # fmt: skip
    return tuple(
        editor.parameter(site.name + end, tensor.to(down.meta["val"].dtype), frozen=True, part=ROUTER)
        for end, tensor in named
    )


def _through(
    editor: Editor, use: Neurons, fronts: Sequence[_Front], product: Callable[[fx.Node, _Front], fx.Node]
) -> fx.Node:
    """What would enter `down` if `product(x, front)` stood for each linear in front."""
    values: dict[fx.Node, fx.Node] = {}
    for linear, front in zip(use.linears, fronts):
        made = product(linear.args[0], front)  # type: ignore[arg-type]
        spans = iter(front.spans)
        for item in use.entrances:
            if item.node is linear:
                start, stop = next(spans)
                values[item.value] = (
                    made
                    if item.value is linear
                    else editor.call(
                        aten.slice.Tensor, made, -1, start, stop, like=item.value, before=use.down
                    )
                )
    for node in use.between:
        assert callable(node.target)
        given: Any = fx.map_arg((node.args, node.kwargs), lambda old: values.get(old, old))
        values[node] = editor.call(node.target, *given[0], like=node, before=use.down, **given[1])
    last = use.down.args[0]
    assert isinstance(last, fx.Node)
    return values[last]


def _everywhere(call: Callable[..., fx.Node], x: fx.Node, front: _Front) -> fx.Node:
    """The product of x [T, I] with the weights of all experts: [T, E, O]."""
    made = _all_products(call, call(aten.unsqueeze.default, x, -2), front.weight)
    return made if front.bias is None else call(aten.add.Tensor, made, front.bias)


def _true_scores(call: Callable[..., fx.Node], inside: fx.Node, last: fx.Node) -> fx.Node:
    """The norm of what each expert gives, from what enters the last product of each [T, E, I]."""
    return call(aten.linalg_vector_norm.default, _all_products(call, inside, last), 2, [-1])


def _all_products(call: Callable[..., fx.Node], x: fx.Node, weight: fx.Node) -> fx.Node:
    """x [T, E or 1, I] @ weight [E, O, I] -> [T, E, O]."""
    rows = call(aten.unsqueeze.default, x, -2)
    return call(aten.squeeze.dim, call(aten.matmul.default, rows, call(aten.transpose.int, weight, 1, 2)), -2)
