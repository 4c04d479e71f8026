"""Prefix: train keys and values in front of those of attentions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from bmgraph.analysis.site_filter import matches, resolve_patterns
from bmgraph.deltas.backbone import check_backbone_frozen, freeze_backbone
from bmgraph.deltas.prefix import PrefixFamily, default_sites, prefix_parameter, prefixes_of
from bmgraph.deltas.prefix_proof import check_prefix
from bmgraph.deltas.prefix_sites import PrefixSite, add_prefix, prefix_sites
from bmgraph.deltas.whole_modules import module_tensors
from bmgraph.errors import InputError, PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import delta_role
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.deltas.delta_pass import let_train
from bmgraph.verify.proof import Proof

aten = torch.ops.aten

PEFT_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "num_virtual_tokens": "tokens",
        "prefix_projection": "projection",
        "encoder_hidden_size": "hidden",
        "init_weights": "init",
    }
)
"""What PEFT calls the options."""


@dataclass(frozen=True, repr=False)
class Prefix(ModelPass):
    """Train `tokens` keys and values in front of those of each attention's text, and freeze everything else.

    The prefix has the positions 0 to tokens - 1 and the text those behind it, as with a KV cache; masks are extended with ones. Keys
    [tokens, H, D] and values [tokens, H, E] are parameters; or, with projection, made of one embedding [tokens, d] by a hidden layer of
    `hidden` neurons (0: d) with tanh and a linear for each attention, which is left out of what is saved: a folder of deltas has what is
    computed, a checkpoint of the trainer all of it.

    targets: attentions by globs over their paths; by default all that read their own sequence, in an encoder-decoder those of the
    decoder. Attentions that read another sequence (cross attention), that are over a fixed number of positions, or whose scores get a bias
    made of tokens, are declined. init: "normal" (values of standard deviation 1, as PEFT) or "zero". modules_to_save: modules that
    train whole beside the prefix.

    Raises PassError where no attention takes a prefix. Source: Li & Liang 2021 (arXiv:2101.00190).

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import Prefix
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 8), layer)
        >>> program = bg.capture(model, (torch.randint(0, 9, (2, 6)),))
        >>> tuned = bg.Pipeline([Prefix(tokens=3)]).run(program)
        >>> sorted(set(tuned.parameters) - tuned.frozen)
        ['1.self_attn.prefix_key', '1.self_attn.prefix_value']
    """

    effect: ClassVar[Effect] = "intended"
    changes: ClassVar[frozenset[str]] = frozenset({"frozen", "ranges"})
    provides: ClassVar[frozenset[str]] = frozenset({"prefixed"})  # no "delta", which `Merge` folds
    conflicts: ClassVar[frozenset[str]] = frozenset({"prefixed", "prompted"})
    other_names: ClassVar[Mapping[str, str]] = PEFT_NAMES

    tokens: int = 20
    projection: bool = False
    hidden: int = 0
    seed: int = field(default=0, kw_only=True)
    init: Literal["normal", "zero"] = field(default="normal", kw_only=True)
    targets: tuple[str, ...] = field(default=(), kw_only=True)
    modules_to_save: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1:
            raise InputError(f"tokens={self.tokens}: give a number of at least 1")
        if self.hidden < 0:
            raise InputError(
                f"hidden={self.hidden}: give a number of neurons, or 0 for as many as keys have features"
            )
        if self.hidden and not self.projection:
            raise InputError(
                f"hidden={self.hidden} is of the network that projection=True makes keys and values with"
            )

    def run(self, program: Program, context: Context) -> Program:
        """Put the prefix in front of the chosen attentions."""
        let_train(program, module_tensors(program, self.modules_to_save, "modules_to_save"), context)
        if prefixes_of(program):
            raise PassError("the program has a prefix already")
        sites = self._chosen(program, context)
        values = _Values(self, program, sites)
        add_prefix(program, sites, self.tokens, values.make, by=str(self))
        for site in sites:
            context.edited(site.path, f"{self.tokens} keys and values in front, in {site.heads} heads")
        freeze_backbone(program)
        return program

    def _chosen(self, program: Program, context: Context) -> list[PrefixSite]:
        sites, refused, _ = prefix_sites(program)
        if self.targets:
            paths = [*(site.path for site in sites), *(item.path for item in refused)]
            patterns = resolve_patterns(self.targets, paths, "targets")
            refused = [item for item in refused if matches(item.path, patterns)]
            chosen = [site for site in sites if matches(site.path, patterns)]
        else:
            default = default_sites(program)
            chosen = [site for site in sites if site.path in default]
        for item in refused:
            context.declined(item.path, item.why)
        if not chosen:
            why = f": {refused[0].path}: {refused[0].why}" if refused else ", since it has none over tokens"
            raise PassError(f"no attention of the model takes a prefix{why}")
        return chosen

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """What attentions give must be what they give in the program with as many tokens in front, whose keys and values are replaced."""
        check_backbone_frozen(after)
        check_prefix(before, after, proof)


class _Values:
    """Makes the keys and values of a prefix, as parameters or by the network that all share."""

    def __init__(self, options: Prefix, program: Program, sites: Sequence[PrefixSite]) -> None:
        self._options, self._program = options, program
        self._features = sites[0].heads * sites[0].sizes[0]
        self._generator = torch.Generator().manual_seed(options.seed)
        self._hidden: fx.Node | None = None

    def make(self, editor: Editor, site: PrefixSite, which: str, before: fx.Node) -> fx.Node:
        """The node of the keys or values [1, H, n, D]."""
        kept, count = (site.keys if which == "key" else site.values), self._options.tokens
        size = site.sizes[which == "value"]
        if not self._options.projection:
            value = self._normal((1, site.heads, count, size), kept, self._options.init == "zero")
            return prefix_parameter(editor, site, f"prefix_{which}", value)

        def call(target: Any, *args: Any) -> fx.Node:
            made = editor.call(target, *args, like=before, part=ROLE)
            made.meta["site"] = site.site
            return made

        hidden = self._hidden_layer(editor, site, call)
        width = int(hidden.meta["val"].shape[1])
        zero = self._options.init == "zero"
        shape = (site.heads * size, width)
        weight = self._uniform(shape, width, kept, zero)
        bias = self._uniform(shape[:1], width, kept, zero)
        read = [
            prefix_parameter(editor, site, f"prefix_{which}_{end}", value)
            for end, value in (("weight", weight), ("bias", bias))
        ]
        flat = call(aten.linear.default, hidden, *read)
        return call(
            aten.unsqueeze.default,
            call(
                aten.permute.default, call(aten.reshape.default, flat, [count, site.heads, size]), [1, 0, 2]
            ),
            0,
        )

    def _hidden_layer(self, editor: Editor, site: PrefixSite, call: Any) -> fx.Node:
        """tanh of a linear of the embedding, made in front of the first attention that reads it."""
        if self._hidden is None:
            width, hidden = self._features, self._options.hidden or self._features
            values = (
                ("prefix_embedding", self._normal((self._options.tokens, width), site.keys, False)),
                ("prefix_hidden_weight", self._uniform((hidden, width), width, site.keys, False)),
                ("prefix_hidden_bias", self._uniform((hidden,), width, site.keys, False)),
            )
            read = []
            for name, value in values:
                node = editor.parameter(editor.fresh(name), value, like=site.keys, part=ROLE)
                node.meta["site"] = site.site
                read.append(node)
            self._hidden = call(aten.tanh.default, call(aten.linear.default, *read))
        return self._hidden

    def _normal(self, shape: tuple[int, ...], like: fx.Node, zero: bool) -> torch.Tensor:
        return self._placed(
            torch.zeros(shape) if zero else torch.randn(shape, generator=self._generator), like
        )

    def _uniform(self, shape: tuple[int, ...], inputs: int, like: fx.Node, zero: bool) -> torch.Tensor:
        """As torch starts linears."""
        numbers = (2 * torch.rand(shape, generator=self._generator) - 1) / math.sqrt(inputs)
        return self._placed(torch.zeros(shape) if zero else numbers, like)

    def _placed(self, value: torch.Tensor, like: fx.Node) -> torch.Tensor:
        return value.to(device=self._program.device, dtype=like.meta["val"].dtype)


ROLE = delta_role(PrefixFamily.name)
