"""Exchanges the weights of a plan (TensorRT's refit): which they are, and what a program must be whose weights they become."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bmgraph.errors import BackendError, InputError
from bmgraph.ir.printer import program_text
from bmgraph.ir.program import Program
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.utils.digest import content_digest
from bmgraph.utils.stored_tensor import in_memory

ANEW = "compile it anew"


@dataclass(frozen=True)
class Held:
    """How a plan holds a weight: as the constant of this name, `turned` if rows and columns changed places; `digest` is the weight's."""

    constant: str
    turned: bool
    digest: str


@dataclass(frozen=True)
class RefitForm:
    """What the plan of a program computes, without its weights. `text`: a sha256 of its graph in eval form; `weights`: those that the plan
    holds as constants of their own; `fixed`: digests of those that it holds in another form, so that they stay what they are."""

    text: str
    weights: dict[str, Held]
    fixed: dict[str, str]

    @staticmethod
    def of(served: Program, constants: Mapping[str, str]) -> RefitForm:
        """The form of a deployed program, given the digests of the constants, by name, of the model that it was lowered to."""
        named: dict[str, list[str]] = {}
        for name, digest in constants.items():
            named.setdefault(digest, []).append(name)
        digests, found = {}, {}
        for name, tensor in _tensors(served).items():
            digests[name] = content_digest(tensor)
            held = _held(name, tensor, digests[name], named)
            if held is not None:
                found[name] = held
        claims = Counter(held.constant for held in found.values())
        weights = {name: held for name, held in found.items() if claims[held.constant] == 1}
        fixed = {name: digest for name, digest in digests.items() if name not in weights}
        return RefitForm(_digest(served), weights, fixed)

    @staticmethod
    def from_json(data: Any) -> RefitForm:
        """Decode what `as_json` returned; raises KeyError, TypeError or AttributeError if it is not valid."""
        weights = {
            str(name): Held(str(held["constant"]), bool(held["turned"]), str(held["digest"]))
            for name, held in data["weights"].items()
        }
        fixed = {str(name): str(digest) for name, digest in data["fixed"].items()}
        return RefitForm(str(data["text"]), weights, fixed)

    def as_json(self) -> dict[str, object]:
        """As plain strings and dicts."""
        return asdict(self)

    def exchanged(self, program: Program) -> tuple[dict[str, torch.Tensor], RefitForm]:
        """The constants that a program gives to a plan of this form, and the form that the plan then has.

        Raises InputError for a program that computes something else, and for a weight that the plan cannot take.
        """
        if program.device.type == "meta":
            raise InputError("a program on the meta device has no weights: load them first")
        served = deployed(program)
        if _digest(served) != self.text:
            raise InputError(
                "refit: the program does not compute what the engine was built from, or with other sizes: give the same model, captured on "
                f"the same example, after the same passes (and KVCache() where the engine generates), or {ANEW}"
            )
        tensors = _tensors(served)
        digests = {name: content_digest(tensor) for name, tensor in tensors.items()}
        changed = [name for name, value in self.fixed.items() if digests.get(name) != value]
        if changed:
            raise InputError(
                f"refit: {changed[0]} changed, and the engine holds it in another form, which cannot be exchanged: {ANEW}"
            )
        values = {}
        for name, held in self.weights.items():
            value = in_memory(tensors[name]).detach()
            values[held.constant] = (value.T if held.turned else value).contiguous()
        weights = {name: replace(held, digest=digests[name]) for name, held in self.weights.items()}
        return values, replace(self, weights=weights)


def _held(name: str, tensor: torch.Tensor, digest: str, named: Mapping[str, list[str]]) -> Held | None:
    """How a plan holds a weight, given the names of constants by digest; None where that is not certain."""
    same = named.get(digest, [])
    if name in same:
        return Held(name, False, digest)
    if len(same) == 1:
        return Held(same[0], False, digest)
    turned = (
        [] if same or tensor.dim() != 2 else named.get(content_digest(in_memory(tensor).T.contiguous()), [])
    )
    return Held(turned[0], True, digest) if len(turned) == 1 else None


def set_weights(trt: Any, refitter: Any, values: Mapping[str, torch.Tensor], changed: set[str]) -> str:
    """Give a `Refitter` all constants and let it write them; returns what failed, empty if nothing did.

    A constant that the plan does not let go, which it may have computed others from, is left out unless it is one of `changed`.
    """
    known = set(refitter.get_all_weights())
    stuck = sorted(changed - known)
    if stuck:
        return f"{stuck[0]} is not among the weights that the plan exchanges"
    for name in sorted(known & values.keys()):
        wanted, value = refitter.get_weights_prototype(name), values[name]
        if wanted.size != value.numel():
            return f"{name} has {value.numel()} values, and the plan {wanted.size}"
        if not refitter.set_named_weights(name, trt.Weights(wanted.dtype, value.data_ptr(), value.numel())):
            return f"{name} is refused"
    missing = refitter.get_missing_weights()
    if missing:
        return f"{missing[0]} is missing"
    return "" if refitter.refit_cuda_engine() else "the weights were not written"


def changed_weights(before: RefitForm, after: RefitForm) -> set[str]:
    """The names of the constants that differ."""
    return {held.constant for name, held in after.weights.items() if before.weights[name] != held}


def check_refit_form(form: RefitForm | None) -> RefitForm:
    """The form; raises BackendError where an engine has none."""
    if form is None:
        raise BackendError(
            "the weights of this engine are fixed: compile with TensorRT(refit=True), on a machine with the GPU"
        )
    return form


def _tensors(program: Program) -> dict[str, torch.Tensor]:
    return {**program.parameters, **program.buffers}


def _digest(program: Program) -> str:
    return hashlib.sha256(program_text(program).encode()).hexdigest()
