"""KVCache: a decoder keeps the keys and values of the positions that it has seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bmgraph.errors import PassError
from bmgraph.ir.cache_spec import BATCH, PAST, PAST_PREFIX, PRESENT_PREFIX
from bmgraph.ir.program import FORWARD, Program, placeholders
from bmgraph.ir.shape_inference import dims, propagate
from bmgraph.ir.tensor_spec import Range, TensorSpec
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import FINAL, Effect, Pass
from bmgraph.passes.kvcache.equivalence import check_cached, halves
from bmgraph.passes.kvcache.max_positions import longest
from bmgraph.passes.kvcache.prompt_prefix import PREFIX, length_of, take_prefix
from bmgraph.passes.kvcache.rewrite import attach
from bmgraph.passes.kvcache.sequence_roles import Sides
from bmgraph.passes.kvcache.split_encoder import encoder_of


@dataclass(frozen=True, repr=False)
class KVCache(Pass):
    """Give a decoder a cache of keys and values, so that one graph reads a prompt and then one token at a time.

    The program takes S >= 1 new tokens [B, S], the mask of all P + S positions, and for each attention `past_key_i` and
    `past_value_i` [B, heads, P, size], P >= 0; it gives the logits of the last position [B, 1, V], and `present_key_i` and
    `present_value_i` with the new positions appended. Rows may begin with padding (mask 0). What has nothing to do with
    the tokens, an encoder up to the keys and values of cross attention, becomes `program.encoder`, whose outputs
    `memory_i` the decoder takes. The keys and values of a soft prompt are computed once and stand in front of the cache,
    as parameters `prompt_key_i` and `prompt_value_i`. A program in eval form comes out, without losses. What it computes
    is held against the program without a cache before it is given out. No pass can rewrite the model after it: what
    others read and measure, whole sequences of an encoder and a decoder, is not there any more.

    Raises PassError where the model is no decoder whose tokens meet in attention alone.
    """

    effect: ClassVar[Effect] = "intended"
    provides: ClassVar[frozenset[str]] = frozenset({"cached", FINAL})
    conflicts: ClassVar[frozenset[str]] = frozenset({"cached"})

    def run(self, program: Program, context: Context) -> Program:
        """Build the graph again, with the cache."""
        served = deployed(program)
        whole, sides, prefix = take_prefix(served)
        cached = self._attach(whole, sides, prefix)
        cached.encoder = encoder_of(whole, sides)
        if cached.device.type != "meta":
            check_cached(served, cached)
            cached.example = halves(cached, served.example)
        for core in sides.cores:
            where = str(core.node.meta.get("scope") or core.node.name)
            context.edited(where, "keeps its keys and values")
        return cached

    def _attach(self, whole: Program, sides: Sides, prefix: Mapping[str, torch.Tensor]) -> Program:
        cached = whole.clone()
        cached.graphs = {FORWARD: attach(whole.graph, sides, str(self), prefix)}
        kept = {PREFIX + name: value for name, value in prefix.items()}
        cached.parameters |= kept
        cached.frozen |= kept.keys()
        cached.training = "it has a cache of keys and values"
        new = _name(whole, sides)
        total = f"{PAST} + {new}"
        heads = {
            name: TensorSpec(
                PAST_PREFIX + name, node.meta["val"].dtype, (BATCH, _size(node, 1), PAST, _size(node, 3))
            )
            for node, name in sides.cached.items()
        }
        masks = {str(node.target) for node in sides.masks}
        first = str(sides.tokens.target)
        left = set(placeholders(cached.graph))
        given = sorted((s for s in whole.inputs if s.name in left), key=lambda spec: spec.name != first)
        memories = [
            TensorSpec(name, node.meta["val"].dtype, dims(whole, node.meta["val"]))
            for node, name in sides.memories.items()
        ]
        cached.inputs = (
            *(
                TensorSpec(spec.name, spec.dtype, (spec.shape[0], total)) if spec.name in masks else spec
                for spec in given
            ),
            *memories,
            *heads.values(),
        )
        names = [next(s.name for s, n in zip(whole.outputs, _returned(whole)) if n is sides.logits)]
        names += [PRESENT_PREFIX + name for name in sides.cached.values()]
        limit = longest(whole, sides)
        if limit is not None:
            limit -= length_of(prefix)
        cached.ranges = {**whole.ranges, new: Range(1, limit), PAST: Range(0, limit), total: Range(1, limit)}
        cached.symbols = {}
        _propagate(cached)
        cached.outputs = tuple(
            TensorSpec(name, node.meta["val"].dtype, dims(cached, node.meta["val"]))
            for name, node in zip(names, _returned(cached))
        )
        return cached


def _returned(program: Program) -> Any:
    return next(iter(reversed(program.graph.nodes))).args[0]


def _name(program: Program, sides: Sides) -> str:
    """The name of the tokens' sequence."""
    spec = next(spec for spec in program.inputs if spec.name == sides.tokens.target)
    return str(spec.shape[1])


def _size(node: Any, axis: int) -> int:
    return int(node.meta["val"].shape[axis])


def _propagate(program: Program) -> None:
    """The shapes of the new graph; where sides were told apart wrongly they do not fit."""
    try:
        propagate(program, everything=True)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        failed = next(
            (node for node in program.graph.nodes if "val" not in node.meta and node.op != "output"), None
        )
        where = (failed.meta.get("scope") or failed.name) if failed is not None else "the model"
        raise PassError(f"in {where} positions cannot be told from tokens: {first[:200]}") from error
