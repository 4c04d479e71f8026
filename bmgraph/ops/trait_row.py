"""What a row of the table of operators says: facts that analyses, checks, passes and lowering read about a call."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class Kind(Enum):
    """What a call does with the values that it is given: what is looked through, and what ends there."""

    UNKNOWN = auto()
    RESHAPE = auto()
    """All elements of the first argument in their order: reshaped, or copied."""
    LAYOUT = auto()
    """Elements of the first argument in another place, or with another sign."""
    CAST = auto()
    DROPOUT = auto()
    """The identity in eval form."""
    ROUNDING = auto()
    """The first argument, rounded to fewer bits."""
    SPLIT = auto()
    """Several parts of a tensor."""
    SELECTION = auto()
    """One part of a tensor, or one of several results."""
    JOIN = auto()
    """Several tensors, given in a list, as one."""
    NORM = auto()
    SOFTMAX = auto()
    ACTIVATION = auto()
    """An elementwise function of one tensor; torch's own are known by their tag `pointwise`."""
    SUM = auto()
    DIFFERENCE = auto()
    """The second argument minus the first."""
    SCALING = auto()
    QUOTIENT = auto()
    MASKING = auto()
    """Elements of one value where a condition holds, those of another elsewhere."""
    FILL = auto()
    """One number, given as an argument, in every element."""
    SIZE = auto()
    """A size of a tensor, as a number."""
    LINEAR = auto()
    """(x, weight[out, in], ...)"""
    EXPERTS = auto()
    """(x, weights[experts, out, in], ids, ...)"""
    BATCHED_PRODUCT = auto()
    """A product of two tensors as matrices, also of stacks of matrices."""
    PRODUCT = auto()
    """Another product of tensors."""
    CONVOLUTION = auto()
    """(x[N, C, ...], weight[out, in, ...], ...)"""
    ATTENTION = auto()
    """(q, k, v, mask, ...)"""
    EMBEDDING = auto()
    """(table, ids, ...)"""
    LOSS = auto()
    """(input, target, ...) with an argument `reduction`: a mean of terms if that is 1, their sum if 2."""


class Dims(Enum):
    """How the dimensions of operands and results belong together."""

    UNKNOWN = auto()
    ELEMENTWISE = auto()
    """Operands broadcast, and each element is computed from those in its place."""
    RANGE = auto()
    """Elementwise, with a statistic of the whole tensor."""
    BLOCKS = auto()
    """Elementwise, with a statistic of each block along the last dimension."""
    PER_CHANNEL = auto()
    """(x, scale, axis): elementwise, with one scale for each index of an axis."""
    WEIGHTED = auto()
    """(x, weights, ...): elementwise, with weights of an axis."""
    SIZES_ALONE = auto()
    """(x, ...) of the sizes of x, whose values are not read."""
    NEW = auto()
    """(x, sizes, ...): what is read of x is its dtype."""
    CREATED = auto()
    """No operands: the same value everywhere, or random ones."""
    PERMUTED = auto()
    """The dimensions of the first argument in another order."""
    EXPANDED = auto()
    """The first argument, repeated along dimensions of size 1."""
    MOVED = auto()
    """Elements of the operands in other places, which the sizes decide."""
    INSERTED = auto()
    """(x, source, ...): x with a part replaced by another tensor."""
    PADDED = auto()
    """(x, widths, ...)"""
    BANDED = auto()
    """What is kept depends on the place in the last two dimensions."""
    INDEX = auto()
    """(x, [indices or None, ...])"""
    GATHER = auto()
    """(x, dim, indices)"""
    INDEX_SELECT = auto()
    """(x, dim, indices of one dimension)"""
    SCATTER = auto()
    """(x, dim, indices, source)"""
    ONE_HOT = auto()
    ALONG = auto()
    """(x, dim, ...): needs all of one dimension, and keeps all."""
    ALONG_PARTS = auto()
    """(x, dim, ...): needs all of one dimension, for several results or for fewer elements."""
    SELECTED = auto()
    """(x, count, dim, ...): needs all of one dimension, and keeps a part of it."""
    NORMED = auto()
    """(x, sizes of the last dimensions, weight, ...): needs all of these, and keeps them."""
    PER_ITEM = auto()
    """(x[N, ...], ...): each item of dimension 0 alone."""
    BATCH = auto()
    """(x[N, C, ...], weight, bias, ...): statistics over all dimensions except C."""
    REDUCED = auto()
    """(x, dims, keepdim)"""
    VECTOR_NORM = auto()
    """(x, order, dims, keepdim)"""
    CLASS_LOSS = auto()
    """(scores[N, classes, ...], labels[N, ...], ...)"""
    ELEMENTWISE_LOSS = auto()
    """(input, target, ...) of one shape"""
    LINEAR = auto()
    """x[..., in], weight[out, in], bias[out] -> [..., out]"""
    MATMUL = auto()
    """a[..., m, k], b[..., k, n] -> [..., m, n]"""
    ADDED_MATMUL = auto()
    """added, a[..., m, k], b[..., k, n] -> [..., m, n]"""
    ATTENTION = auto()
    """q[..., s, d], k[..., t, d], v[..., t, e], mask[..., s, t] -> [..., s, e]"""
    EXPERTS = auto()
    """x[..., in] or x[..., K, in], and ids[..., K] -> [..., K, out]"""
    EMBEDDING = auto()
    """table[rows, features], ids[...] -> [..., features]"""


class Lookup(Enum):
    """Which argument holds indices, and of what."""

    NONE = auto()
    ROWS = auto()
    """(table, ids): rows of the table."""
    AXIS = auto()
    """(x, axis, indices): read along an axis."""
    WRITTEN_AXIS = auto()
    """(x, axis, indices, ...): written along an axis."""
    LIST = auto()
    """(x, [indices or None, ...]): one for each axis, which may count from the end."""
    EXPERTS = auto()
    """(x, weights, ids): items of axis 0 of the weights."""


class Flops(Enum):
    """How floating-point operations are counted."""

    NONE = auto()
    PRODUCT = auto()
    """Two for each output and each element along the last axis of the first factor."""
    EXPERTS = auto()
    """Two for each output and each element along the last axis of the weights."""
    ATTENTION = auto()
    CONVOLUTION = auto()
    """Two for each output and each weight of its channel."""


@dataclass(frozen=True)
class Traits:
    """The row of one operator; the defaults claim nothing.

    `kind`, `dims`, `lookup`, `flops`: see there. `factors`: places of the two factors of a product. `spatial`: the number of
    dimensions behind the channels, where that of items (`Dims.PER_ITEM`) may be left out. `traced`: it only moves elements,
    and goes on moving the others alike where some are gone. `keeps_values`: the result holds every element of the first
    argument, and no other value. `linear`: linear in the first argument, if the others are constants. `homogeneous`: elementwise,
    and a positive factor of the first argument is one of the result. `adds`: the results of
    parts add up to that of the whole. `whole`: whole numbers give whole numbers. `not_negative`: places of the arguments
    without negative values that make the result one, () for "always", None for unknown. `lowers`: it may make a value
    smaller than it was, as a subtraction does. `depends_on_count`: silent elements that are left out change the result.
    `ranks`: how many of the first argument's values, in their order, its indices tell apart, where no argument `k` says so:
    all if -1, none if 0; equal ones are in no defined order. `relu_like`: about x for large x, about 0 for very negative x.
    `train`, `drop`: names of the arguments that say "in training" and the probability of dropout. `step`: of a rounding, the
    name of the argument that is its step, and `codes` that of the one whose dtype its codes have; `levels`: the number of steps in the range of all values (`Dims.RANGE`), or up to
    the largest magnitude of a block (`Dims.BLOCKS`). `writes`: names of the arguments that running it writes, although its
    schema does not say so.
    """

    kind: Kind = Kind.UNKNOWN
    dims: Dims = Dims.UNKNOWN
    lookup: Lookup = Lookup.NONE
    flops: Flops = Flops.NONE
    factors: tuple[int, int] = (0, 1)
    spatial: int = 0
    traced: bool = False
    keeps_values: bool = False
    linear: bool = False
    homogeneous: bool = False
    adds: bool = False
    whole: bool = False
    not_negative: tuple[int, ...] | None = None
    lowers: bool = False
    depends_on_count: bool = False
    ranks: int = 0
    relu_like: bool = False
    train: str = ""
    drop: str = ""
    step: str = ""
    codes: str = ""
    levels: int = 0
    precise: bool = False
    writes: tuple[str, ...] = ()


UNKNOWN = Traits()
"""The row of an operator that has none."""
