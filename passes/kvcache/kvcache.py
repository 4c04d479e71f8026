"""The pass KVCache: its contract, and the signature of the program that it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from bmgraph.analysis.token_values import SEQUENCE_AXIS
from bmgraph.errors import PassError
from bmgraph.ir.cache_spec import CacheLayout, SlotNames
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.program import Program, output_node, placeholders
from bmgraph.ir.shape_inference import dims, propagate
from bmgraph.ir.symbolic_dim import SymbolicDim
from bmgraph.ir.tensor_spec import Range, TensorSpec
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import FINAL, Effect, ModelPass
from bmgraph.passes.kvcache.equivalence import MIN_PROMPT, cached_example, check_cached
from bmgraph.passes.kvcache.input_names import PAST, PAST_PREFIX, PRESENT_PREFIX, SCORED, SCORED_SIZE
from bmgraph.passes.kvcache.max_positions import max_positions
from bmgraph.passes.kvcache.prompt_prefix import Front, split_off_prompt
from bmgraph.passes.kvcache.rewrite import build_cached_graph
from bmgraph.passes.kvcache.row_mask import with_row_mask
from bmgraph.passes.kvcache.sequence_roles import SequenceRoles
from bmgraph.passes.kvcache.split_encoder import add_encoder
from bmgraph.passes.kvcache.teacher_forcing import with_decoder_ids
from bmgraph.verify.proof import Proof


@dataclass(frozen=True, repr=False)
class KVCache(ModelPass):
    """Add a KV cache to a decoder, so that one graph reads a prompt and then one token at a time.

    The program takes S >= 1 new tokens [B, S], the mask of all P + S positions, and for each attention `past_key_i` and
    `past_value_i` [B, heads, P, size], P >= 0, and `scored_positions` i64[K], those of the new tokens whose logits it returns, [B, K, V], beside
    `present_key_i` and `present_value_i` with the new positions appended. Rows may begin with padding (mask 0), which has
    no positions: they count from a row's first token, as Hugging Face's `generate` counts them, where a model that is called without
    position ids may count padding too. A batch without a cache starts with an empty one, and one without `scored_positions` scores all:
    but for padding in front it is then the model itself.

    What does not depend on the tokens, such as an encoder with the keys and values of cross-attention, becomes the graph
    `encoder` of the program (where the model makes its decoder's ids from labels, the ids become an input
    `decoder_input_ids`); its outputs are inputs `memory_i` of the decoder, which takes a mask of its own positions too: `decoder_mask`,
    where the model has none, so that rows of several lengths can run together. The keys and values of a soft prompt are computed
    once and stored as parameters `prompt_key_i` and `prompt_value_i`, which attention reads in front of the cache.

    The result is in eval form, without losses, and is compared with the program without a cache before it is returned. No
    pass can rewrite the model after this one, because the graph no longer computes whole sequences.

    Raises PassError where the model is not a decoder whose tokens interact in attention alone.
    """

    effect: ClassVar[Effect] = "intended"
    changes: ClassVar[frozenset[str]] = frozenset({"ranges", "training"})
    provides: ClassVar[frozenset[str]] = frozenset({"cached", FINAL})
    conflicts: ClassVar[frozenset[str]] = frozenset({"cached"})

    def run(self, program: Program, context: Context) -> Program:
        """Rebuild the graph with a cache."""
        uncached = with_decoder_ids(deployed(program))
        source, roles, front = split_off_prompt(uncached)
        others = [deployed(other) for other in program.entries() if other.entry != program.entry]
        cached = self._with_row_mask(uncached, source, roles, front, others)
        if cached is None:
            cached = self._whole(source, roles, front, others, own_mask=False)
        if cached.device.type != "meta":
            if not context.proves:
                check_cached(uncached, cached)
            cached.example = cached_example(cached, uncached.example)
        for core in roles.cores:
            where = str(core.node.meta.get("scope") or core.node.name)
            context.edited(where, "caches its keys and values")
        for name in _folded(program, cached):
            context.edited(name, "multiplied by its mask, for serving")
        return cached

    def _with_row_mask(
        self,
        uncached: Program,
        source: Program,
        roles: SequenceRoles,
        front: Front,
        others: Sequence[Program],
    ) -> Program | None:
        """The program of a decoder that gets a mask with its cache; None where it is to have none, or its positions cannot be shifted
        behind padding."""
        try:
            masked, found = with_row_mask(source, roles, str(self))
            if masked is source:
                return None
            cached = self._whole(masked, found, front, others, own_mask=True)
            if cached.device.type != "meta":
                check_cached(uncached, cached)
        except PassError:
            return None
        return cached

    def _whole(
        self, source: Program, roles: SequenceRoles, front: Front, others: Sequence[Program], own_mask: bool
    ) -> Program:
        """The program with its cache, its other graphs and its encoder."""
        cached = self._add_cache(source, roles, front, own_mask)
        for other in others:
            cached.add_graph(other.entry, other)
        add_encoder(cached, source, roles)
        return cached

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """Reading in pieces, token by token and behind padding must give the logits of reading the whole."""
        check_cached(with_decoder_ids(deployed(before)), after)

    def _add_cache(self, source: Program, roles: SequenceRoles, front: Front, own_mask: bool) -> Program:
        cached = source.clone()
        cached.graphs = {source.entry: build_cached_graph(source.graph, roles, str(self), front)}
        prompt_cache = front.parameters
        cached.parameters |= prompt_cache
        cached.frozen |= prompt_cache.keys()
        cached.training = "it has a KV cache"
        new = _sequence_name(source, roles)
        total = str(SymbolicDim.of(f"{PAST} + {new}"))
        cached.inputs = _inputs(source, cached, roles, total, own_mask)
        _order_placeholders(cached)
        limit = max_positions(source, roles)
        if limit is not None:
            limit = _room(limit, front.length)
        cached.ranges = {
            **source.ranges,
            new: Range(1, limit),
            PAST: Range(0, limit),
            total: Range(1, limit),
            SCORED_SIZE: Range(),
        }
        cached.symbols = {}
        _propagate(cached)
        names = [next(s.name for s, n in zip(source.outputs, _returned(source)) if n is roles.logits)]
        names += [PRESENT_PREFIX + name for name in roles.cached.values()]
        cached.outputs = tuple(
            TensorSpec(name, node.meta["val"].dtype, dims(cached, node.meta["val"]))
            for name, node in zip(names, _returned(cached))
        )
        cached.cache = replace(_layout(cached, roles, names[0]), own_mask=own_mask)
        return cached


def _layout(cached: Program, roles: SequenceRoles, logits: str) -> CacheLayout:
    """What the cached program's inputs and outputs are; `logits` is the name of the output that scores the next id."""
    names = {spec.name for spec in cached.inputs}
    masks, positions = (
        [name for node in nodes if (name := str(node.target)) in names]
        for nodes in (roles.masks, roles.position_inputs)
    )
    return CacheLayout(
        tokens=str(roles.tokens.target),
        logits=logits,
        slots=tuple(
            SlotNames(PAST_PREFIX + name, PRESENT_PREFIX + name, SEQUENCE_AXIS)
            for name in roles.cached.values()
        ),
        mask=next(iter(masks), None),
        positions=next(iter(positions), None),
        scored=SCORED,
        memories=tuple(roles.memories.values()),
    )


def _room(limit: int, prompt: int) -> int:
    """The positions that a soft prompt leaves; raises PassError where they are too few to cache any."""
    if limit - prompt < MIN_PROMPT:
        taken = f", of which a soft prompt takes {prompt}" if prompt else ""
        raise PassError(
            f"the model has rows for {limit} positions{taken}: a KV cache needs {MIN_PROMPT} that tokens can take; generate "
            "without a cache, or use a model with more positions"
        )
    return limit - prompt


def _folded(program: Program, served: Program) -> list[str]:
    """The parameters whose values a mask was folded into."""
    return [
        name
        for name, tensor in program.parameters.items()
        if served.parameters.get(name, tensor) is not tensor
    ]


def _inputs(
    source: Program, cached: Program, roles: SequenceRoles, total: str, own_mask: bool
) -> tuple[TensorSpec, ...]:
    """The inputs of the cached program: the tokens, what is left of the others, encoder outputs, the cache.

    `total` names the size of all positions, which is that of the masks. A mask that came with the cache is the last one: where a batch
    leaves it out, the others tell its size.
    """
    masks = {str(node.target) for node in roles.masks}
    kept = set(placeholders(cached.graph))
    inputs = [
        replace(spec, shape=(spec.shape[0], total)) if spec.name in masks else spec
        for spec in source.inputs
        if spec.name in kept
    ]
    inputs.sort(key=lambda spec: spec.name != roles.tokens.target)
    memories = [
        TensorSpec(name, node.meta["val"].dtype, dims(source, node.meta["val"]), kind=InputKind.MEMORY)
        for node, name in roles.memories.items()
    ]
    rows = inputs[0].shape[0]
    pasts = [
        TensorSpec(
            PAST_PREFIX + name,
            node.meta["val"].dtype,
            (rows, _size(node, 1), PAST, _size(node, 3)),
            kind=InputKind.CACHE,
        )
        for node, name in roles.cached.items()
    ]
    scored = TensorSpec(SCORED, torch.int64, (SCORED_SIZE,), kind=InputKind.SCORED)
    added = [spec for spec in inputs if own_mask and spec.name in masks]
    inputs = [spec for spec in inputs if spec not in added]
    return (*inputs, *memories, *pasts, scored, *added)


def _order_placeholders(program: Program) -> None:
    """Put the placeholders in the order of the inputs: a module of the graph takes them by position."""
    nodes = placeholders(program.graph)
    first = next(node for node in program.graph.nodes if node.op == "call_function")
    for spec in program.inputs:
        first.prepend(nodes[spec.name])


def _returned(program: Program) -> Any:
    return output_node(program.graph).args[0]


def _sequence_name(program: Program, roles: SequenceRoles) -> str:
    """The name of the dimension of the tokens' sequence."""
    spec = next(spec for spec in program.inputs if spec.name == roles.tokens.target)
    return str(spec.shape[1])


def _size(node: fx.Node, axis: int) -> int:
    return int(node.meta["val"].shape[axis])


def _propagate(program: Program) -> None:
    """Infer the shapes of the new graph; a conflict means that roles were assigned wrongly."""
    try:
        propagate(program, everything=True)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        failed = next(
            (node for node in program.graph.nodes if "val" not in node.meta and node.op != "output"), None
        )
        where = (failed.meta.get("scope") or failed.name) if failed is not None else "the model"
        raise PassError(
            f"in {where} shapes do not fit with a KV cache: values of positions and of tokens are combined in a way that is "
            f"not supported ({message[:200]})"
        ) from error
