"""Data classes that describe a model: its sites, named by their parameters, and its layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Use:
    """One call of a site: the name of the graph and the name of the node in it."""

    graph: str
    node: str


@dataclass(frozen=True)
class Linear:
    """A product with a weight.

    `name`: the weight's parameter. `tensors`: all parameters and buffers that weight and bias are computed from.
    `wrapped`: the weight is an expression (dequantized, masked, ...), not the parameter itself. `transposed`: the weight
    is stored as [in, out]. `role`: its role in the model ("attention.q", "attention.qkv", "feedforward.up", "embedding"
    for a tied head, ...), else "linear".
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
    """Some outputs of a linear: the rows of its weight [out, in] in `runs`, ranges (start, stop)."""

    linear: str
    runs: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Number of outputs."""
        return sum(stop - start for start, stop in self.runs)


@dataclass(frozen=True)
class FeedForward:
    """down(activation(up(x))), or with a gate down(activation(gate(x)) * up(x)).

    `activation`: name of the operator ("gelu", "relu", ...), "composed" if it consists of several operators.
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
        """Number of neurons: the hidden width."""
        return self.up.size


@dataclass(frozen=True)
class Experts:
    """Feed-forwards (mixture of experts) of which a router chooses some for each token.

    `up`, `gate` and `down`: names of parameters [experts, ...]; `gate` equals `up` where both are fused. `split`: a pass
    split the neurons of one feed-forward into these experts; they keep its roles.
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
    """Softmax attention.

    `q`, `k`, `v`: outputs of linears, None without a projection. `o`: name of the linear after it. `causal`: no query
    sees a later key; None if the mask cannot be read. `cross`: keys and queries come from different values. `uses`: the
    nodes that compute it (scaled_dot_product_attention, or the last product of a decomposed one).
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
        """Whether q and k are outputs of one linear."""
        return self.q is not None and self.k is not None and self.q.linear == self.k.linear


@dataclass(frozen=True)
class Embedding:
    """An embedding table [rows, features]."""

    name: str
    path: str
    rows: int
    features: int
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Norm:
    """A normalization.

    `kind`: its operator ("layer_norm", "rms_norm", ...). `name`: its weight's parameter, or the module path if it has none.
    """

    name: str
    path: str
    kind: str
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Layer:
    """One of several equal layers.

    `sites`: names of its linears, norms and experts in order; `times`: how often it runs; `runs`: the uses of its sites each
    time.
    """

    path: str
    sites: tuple[str, ...]
    times: int = 1
    runs: tuple[tuple[Use, ...], ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Stack:
    """Consecutive layers of equal structure."""

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
    """Name of a site -> its role. Passes do not change roles."""
    members: dict[str, str] = field(default_factory=dict)
    """Other parameter of a site (bias, codes, scale, mask, ...) -> the name of the site."""

    def role(self, name: str) -> str:
        """The role of a parameter ("attention.q", "feedforward.down", "norm", "embedding", ...); "" if it has none."""
        return self.roles.get(self.members.get(name, name), "")

    def linear(self, name: str) -> Linear:
        """The linear whose weight is the parameter `name`. Raises KeyError if there is none."""
        return self._linears[name]

    @cached_property
    def _linears(self) -> dict[str, Linear]:
        return {linear.name: linear for linear in self.linears}

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of all stacks."""
        return tuple(layer for stack in self.stacks for layer in stack.layers)
