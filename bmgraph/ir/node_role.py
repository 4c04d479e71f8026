"""Roles of nodes that passes added to the model, kept under the metadata key `part`."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import fx

from bmgraph.errors import InputError, PassError

KEY = "part"
"""The key of a node's metadata that holds its role."""


class NodeRole(StrEnum):
    """What a node that capture or a pass added is for. Its text is what files and printed programs say.

    A role may be refined behind a dot, such as `delta.scaled_residual`; other packages add names by `register_role`.
    """

    WEIGHT = "weight"
    """The weight of a site where it is not a parameter alone: a range, a product with a mask, codes times scales."""
    MASK = "mask"
    """Zeros in the place of pruned weights."""
    CODES = "codes"
    """Quantized values of a weight."""
    SCALE = "scale"
    """The step of codes."""
    STEP = "step"
    """The step of codes that are made anew of a weight which trains; it may train itself."""
    ZERO_POINT = "zero_point"
    """The code of zero."""
    ACTIVATION = "activation"
    """What rounds the input of a site."""
    CHANNELS = "channels"
    """Numbers of the channels that are copied."""
    SHIFT = "shift"
    """What is subtracted from copies."""
    COPIES = "copies"
    """Channels beside their copies."""
    SMOOTHING = "smoothing"
    """What scales the channels that a site reads; its weight is scaled the other way."""
    ROTATION = "rotation"
    """What multiplies values of the hidden state by a matrix."""
    CLAMP = "clamp"
    """What bounds a value so that its scale can be small."""
    BIAS = "bias"
    """The bias of a site that a pass changed or moved."""
    GATES = "gates"
    """What scales neurons or heads by trained gates."""
    LAYER_GATES = "layer gates"
    """What goes from what leaves a layer to what enters it as the layer's trained gate closes."""
    KEPT = "kept"
    """What picks the features that are left."""
    PLACES = "places"
    """Numbers of places in a value that has become smaller."""
    PROJECTION = "projection"
    """A teacher's features in the space of the student's."""
    CACHE = "cache"
    """What reads and appends to a KV cache."""
    DELTA = "delta"
    """Nodes of a low-rank delta; the last of them adds it. Those of another family have the role `delta.<family>`."""
    PROMPT = "prompt"
    """Nodes that put trained positions in front of an input's own."""
    PREFIX = "prefix"
    """Nodes that put trained keys and values, and positions for them, in front of those of attentions."""
    NEURONS = "neurons"
    """Products with the weights of selected experts that were split from the neurons of one feed-forward."""
    ROUTER = "router"
    """Nodes that select experts."""


DELTA, PROMPT, NEURONS, ROUTER = NodeRole.DELTA, NodeRole.PROMPT, NodeRole.NEURONS, NodeRole.ROUTER

TOTAL = ".total"
"""End of the role of the node that ends a delta of another family: `delta.<family>.total`."""

INPUT = "_input"
"""End of the name of a role of nodes that change the input of a linear: `delta.<family>_input`."""

_REGISTERED: dict[str, str] = {}
"""Roles of other packages -> what they mean."""


def register_role(name: str, meaning: str) -> str:
    """Let passes give nodes a role that the library does not have; returns the name, which `part=` takes from then on.

    Call it in the module that uses the role. Raises InputError for a name that is no lower-case identifier, that the
    library has, or that stands for something else already.
    """
    if not name.isidentifier() or name != name.lower():
        raise InputError(f"the role {name!r} is not a lower-case identifier: choose another name")
    known = name if name in list(NodeRole) else _REGISTERED.get(name, meaning)
    if known != meaning:
        raise InputError(
            f"the role {name!r} is taken{'' if known == name else f' ({known})'}: choose another name"
        )
    _REGISTERED[name] = meaning
    return name


def known_role(text: str) -> str:
    """The role of a text, a NodeRole where the library has it.

    Raises PassError for a role that nobody has registered: what nothing knows, nothing would read.
    """
    if text.partition(".")[0] not in (*NodeRole, *_REGISTERED):
        raise PassError(
            f"{text!r} is no role of a node: use one of {', '.join(sorted({*NodeRole, *_REGISTERED}))}, or let "
            "bmgraph.api.register_role know it"
        )
    return role_in_file(text)


def role_in_file(text: str) -> str:
    """The role of a text in a file: a NodeRole where the library has it, else as it is.

    A role that is not known here marks nodes that compute what they compute; only who registered it reads more into them.
    """
    return NodeRole(text) if text in list(NodeRole) else text


def has_role(node: fx.Node, role: str) -> bool:
    """Whether a node has a role."""
    return node.meta.get(KEY) == role


def delta_role(family: str) -> str:
    """The role of the nodes of a delta, by the name of its family; the entry point of the family makes it known.

    Raises InputError for a name that is no lower-case identifier, or that ends the roles of all families.
    """
    if not family.isidentifier() or family != family.lower() or f".{family}" == TOTAL:
        raise InputError(
            f"{family!r} is no name of a family of deltas: choose another lower-case identifier than {TOTAL[1:]!r}"
        )
    return f"{DELTA}.{family}"


SOFT_TOKENS = delta_role("soft_tokens")
"""The role of nodes that look up trained embeddings of ids below 0."""


def role_of(node: fx.Node) -> str:
    """The role of a node, the same for the node that ends a delta; "" for a node of the model."""
    return str(node.meta.get(KEY) or "").removesuffix(TOTAL)


def is_delta(node: fx.Node) -> bool:
    """Whether a node belongs to a delta, of whatever family."""
    role = role_of(node)
    return role == DELTA or role.startswith(f"{DELTA}.")


def changes_input(node: fx.Node) -> bool:
    """Whether a node ends a delta on the input of a linear, instead of on its output."""
    return ends_delta(node) and role_of(node).endswith(INPUT)


def ends_delta(node: fx.Node) -> bool:
    """Whether a node ends a delta: its value is that of its first argument, as the delta changes it."""
    part = str(node.meta.get(KEY) or "")
    if not (node.args and isinstance(node.args[0], fx.Node)):
        return False
    if part == DELTA:
        return node.target is torch.ops.aten.add.Tensor
    return part.startswith(f"{DELTA}.") and part.endswith(TOTAL)
