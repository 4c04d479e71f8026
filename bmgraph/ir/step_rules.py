"""What the training of a program does beside its steps, as data that passes leave in `Program.step_rules`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Self

from bmgraph.errors import BundleError


@dataclass(frozen=True)
class StepRule(ABC):
    """One thing that happens at steps; the trainer does it (`bmgraph.runtime.training.step_rules`)."""

    kind: ClassVar[str]
    """Its name in files."""

    @property
    @abstractmethod
    def written(self) -> tuple[str, ...]:
        """The buffers that it changes."""

    @property
    @abstractmethod
    def read(self) -> tuple[str, ...]:
        """All tensors that it names."""

    @abstractmethod
    def among(self, names: Collection[str]) -> Self | None:
        """The rule for those of its tensors that a program still has; None if there are none."""

    def as_json(self) -> dict[str, Any]:
        """Its fields as values of JSON, with its kind."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class MaskSchedule(StepRule):
    """Masks that let fewer weights through as training goes on, by the magnitudes that these have then.

    masks: pairs (bool buffer, parameter that it masks). After step t the share of zeros is
    sparsity + (initial - sparsity) (1 - (t - begin) / (end - begin))^3, at steps begin, begin + every, ..., and end; it never falls
    (Zhu and Gupta 2017, arXiv:1710.01878). pattern: "unstructured" by `scope`, or "N:M", of which N falls from M on. transposed:
    of the masks, those of weights [in, out].
    """

    kind: ClassVar[str] = "masks"

    masks: tuple[tuple[str, str], ...]
    pattern: str
    scope: str
    sparsity: float
    initial: float
    begin: int
    end: int
    every: int
    transposed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (0 <= self.initial < self.sparsity < 1 and 0 <= self.begin < self.end and self.every >= 1):
            raise BundleError(f"{self} is no schedule: expected initial below sparsity, and begin before end")

    @property
    def written(self) -> tuple[str, ...]:
        """The masks."""
        return tuple(mask for mask, _ in self.masks)

    @property
    def read(self) -> tuple[str, ...]:
        """The masks and the weights."""
        return tuple(name for pair in self.masks for name in pair)

    def among(self, names: Collection[str]) -> MaskSchedule | None:
        """The schedule of the masks that are left with their weights."""
        left = tuple(pair for pair in self.masks if set(pair) <= set(names))
        return replace(self, masks=left) if left else None

    def is_due(self, step: int) -> bool:
        """Whether masks change after this many steps."""
        return self.begin <= step <= self.end and ((step - self.begin) % self.every == 0 or step == self.end)

    def share(self, step: int) -> float:
        """The share of zeros after this many steps, from begin to end."""
        left = 1 - (step - self.begin) / (self.end - self.begin)
        return self.sparsity + (self.initial - self.sparsity) * left**3


@dataclass(frozen=True)
class GateTarget(StepRule):
    """Gates that a Lagrangian drives to a share of closed ones, in steps from 0 to `warmup` of training.

    gates: pairs (buffer of noise, parameter log alpha), both f[units], of one kind of units. In a step the noise is logistic, the same
    on all ranks; it is zero between steps. What the loss of the step gets is l1 (s - t) + l2 (s - t)^2, with s the expected share of
    closed gates and t the target; the multipliers l1 and l2 ascend by its gradient times `rate`, and
    l1 starts at 0 again where it pushes past the target (it would close more for as long as it took to get there). Sources: Louizos et al. 2018
    (arXiv:1712.01312), Xia et al. 2022 (arXiv:2204.00408).
    """

    kind: ClassVar[str] = "gates"

    gates: tuple[tuple[str, str], ...]
    target: float
    warmup: int
    rate: float

    def __post_init__(self) -> None:
        if not (0 < self.target < 1 and self.warmup >= 0 and 0 < self.rate < 1e6):
            raise BundleError(f"{self} is no target of gates: expected a share above 0 and below 1")

    @property
    def written(self) -> tuple[str, ...]:
        """The noise."""
        return tuple(noise for noise, _ in self.gates)

    @property
    def read(self) -> tuple[str, ...]:
        """The noise and the parameters."""
        return tuple(name for pair in self.gates for name in pair)

    def among(self, names: Collection[str]) -> GateTarget | None:
        """The target for the gates that are left."""
        left = tuple(pair for pair in self.gates if set(pair) <= set(names))
        return replace(self, gates=left) if left else None

    def share(self, step: int) -> float:
        """The target in the step that comes after so many."""
        return self.target * min(1.0, (step + 1) / max(self.warmup, 1))


KINDS: dict[str, type[StepRule]] = {kind.kind: kind for kind in (MaskSchedule, GateTarget)}
"""Kind in files -> class."""


def read_rules(data: Any, names: Collection[str], buffers: Collection[str]) -> tuple[StepRule, ...]:
    """The rules in a file, of a program with these tensors. Raises BundleError for what is none, for an unknown tensor, and for a
    rule that would write into what is no buffer."""
    if not isinstance(data, list):
        raise BundleError("the file has step rules that are no list")
    return tuple(_rule(item, names, buffers) for item in data)


def _rule(data: Any, names: Collection[str], buffers: Collection[str]) -> StepRule:
    kind = KINDS.get(str(data.get("kind"))) if isinstance(data, dict) else None
    said = str(data)[:200]
    if kind is None:
        raise BundleError(f"the file has the step rule {said}, of no kind that is known: {', '.join(KINDS)}")
    types = {field.name: str(field.type) for field in fields(kind)}
    if set(data) != {"kind", *types} or not all(_is_of(data[name], kind) for name, kind in types.items()):
        raise BundleError(f"the file has the step rule {said}, whose fields are not those of {kind.__name__}")
    rule = kind(**{name: _as_tuples(data[name]) for name in types})
    missing = next((name for name in rule.read if name not in names), None)
    missing = missing or next((name for name in rule.written if name not in buffers), None)
    if missing is not None:
        raise BundleError(
            f"the file has a step rule for {missing[:80]!r}, which is no such tensor of the program"
        )
    return rule


def _is_of(value: Any, annotation: str) -> bool:
    """Whether a value of JSON is of a field's type: a number, a text, texts, or pairs of texts."""
    if annotation == "float":
        return type(value) in (int, float)
    if annotation in ("int", "str"):
        return type(value).__name__ == annotation
    pairs = annotation.startswith("tuple[tuple")
    return isinstance(value, list) and all(
        isinstance(item, list) and len(item) == 2 and all(isinstance(one, str) for one in item)
        if pairs
        else isinstance(item, str)
        for item in value
    )


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
