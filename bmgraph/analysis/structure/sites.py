"""What a model is made of: the sites that passes work on, found in the dataflow and named by their parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Use:
    """One call: `graph` is the graph's name, `node` the name of the node in it."""

    graph: str
    node: str


@dataclass(frozen=True)
class Linear:
    """A product with a weight.

    `name` is the weight's parameter. `tensors` are all parameters that its weight and bias are made of; `wrapped`:
    whether the weight is an expression (dequantised, masked, ...) rather than the parameter itself; `transposed`:
    whether it is stored [in, out]. `role` is its part in the model ("attention.q", "attention.qkv",
    "feedforward.up", "embedding" for a tied head, ...), "linear" where it plays none.
    """

    name: str
    path: str
    uses: tuple[Use, ...]
    in_features: int
    out_features: int
    bias: str | None
    tensors: tuple[str, ...]
    wrapped: bool = False
    transposed: bool = False
    role: str = "linear"


@dataclass(frozen=True)
class Part:
    """Outputs of a linear: the rows of its weight [out, in] in `runs` of (start, stop)."""

    linear: str
    runs: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """How many outputs these are."""
        return sum(stop - start for start, stop in self.runs)


@dataclass(frozen=True)
class FeedForward:
    """up, activation, down; with a gate: activation(gate) * up, then down.

    `activation` is the operator between ("gelu", "relu", ...), "composed" where it is written out in several.
    """

    path: str
    up: Part
    down: str
    gate: Part | None
    activation: str
    uses: tuple[Use, ...]

    @property
    def gated(self) -> bool:
        """Whether it has a gate."""
        return self.gate is not None

    @property
    def features(self) -> int:
        """The width in the middle."""
        return self.up.size


@dataclass(frozen=True)
class Experts:
    """Feed-forwards of which each token takes some: `up`, `gate` and `down` are 3-D parameters [experts, ...];
    gate and up may be the same one, fused.

    `split`: whether a pass made them of the neurons of one feed-forward, whose roles they keep.
    """

    path: str
    count: int
    up: str
    down: str
    gate: str | None
    activation: str
    uses: tuple[Use, ...]
    split: bool = False


@dataclass(frozen=True)
class Attention:
    """Softmax attention. q, k, v: outputs of linears (None where there is no projection), `o` the linear after it.

    `causal` is None where its mask could not be read; `cross`: keys come from elsewhere than queries; `uses` are the
    nodes that compute it (scaled_dot_product_attention, or the last product of a written-out one).
    """

    path: str
    q: Part | None
    k: Part | None
    v: Part | None
    o: str | None
    heads: int
    kv_heads: int
    head_size: int
    causal: bool | None
    cross: bool
    uses: tuple[Use, ...]

    @property
    def fused(self) -> bool:
        """Whether q, k and v are outputs of one linear."""
        return self.q is not None and self.k is not None and self.q.linear == self.k.linear


@dataclass(frozen=True)
class Embedding:
    """A table whose rows are looked up."""

    name: str
    path: str
    rows: int
    features: int
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Norm:
    """A normalisation; `kind` is its operator ("layer_norm", "rms_norm", ...), `name` its weight's parameter, or the
    module path where it has none."""

    name: str
    path: str
    kind: str
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Layer:
    """One of several equal layers: the names of its linears, norms and experts, in order; `times` it is run."""

    path: str
    sites: tuple[str, ...]
    times: int = 1


@dataclass(frozen=True)
class Stack:
    """Equal layers, one after the other."""

    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Structure:
    """All sites of a program, in the order of their first use."""

    linears: tuple[Linear, ...]
    attentions: tuple[Attention, ...]
    feedforwards: tuple[FeedForward, ...]
    experts: tuple[Experts, ...]
    embeddings: tuple[Embedding, ...]
    norms: tuple[Norm, ...]
    stacks: tuple[Stack, ...]
    roles: dict[str, str] = field(default_factory=dict)
    """The name of a site -> its role; the same before a pass and after it."""
    members: dict[str, str] = field(default_factory=dict)
    """Biases, codes, scales, masks: other parameters that a site is made of -> the name of the site."""

    def role(self, name: str) -> str:
        """The role of a parameter: "attention.q", "feedforward.down", "norm", "embedding", ...; "" for none."""
        return self.roles.get(self.members.get(name, name), "")

    def linear(self, name: str) -> Linear:
        """The linear whose weight is that parameter. Raises KeyError where there is none."""
        return self._linears[name]

    @cached_property
    def _linears(self) -> dict[str, Linear]:
        return {linear.name: linear for linear in self.linears}

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of all stacks."""
        return tuple(layer for stack in self.stacks for layer in stack.layers)
