"""What of a program is compared with its model: all of it, or, where weights are left in files, one layer of each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from bmgraph.analysis.structure.layer_lists import ShortList, cut_lists
from bmgraph.distributed.process_group import Ranks
from bmgraph.frontend.eager_check import MODEL_ERRORS
from bmgraph.frontend.own_run import own_run
from bmgraph.frontend.weights_folder import NOT_PROVEN, FolderWeights, placed_weights
from bmgraph.ir.program import Program
from bmgraph.utils.memory_budget import memory_budget
from bmgraph.utils.stored_tensor import in_memory

SHARE = 4
"""The weights of the part that is compared take at most one part in SHARE of what weights may take of this rank's memory."""


@contextmanager
def compared_part(
    program: Program, model: nn.Module, weights: FolderWeights | None
) -> Iterator[Program | None]:
    """Within it, the part of a program that is to be compared with the model, which is then the model of that part.

    A program whose weights are in files is cut short (`cut_lists`), and the lists of layers of the model with it; both get
    the values of what stays. None if that is too large, or the model does not run then. What was found of the part is noted
    in the program on exit, and what was not compared.
    """
    if weights is None or weights.fits:
        yield program
        return
    lists = _lists(model)
    part, cut = cut_lists(program, lists)
    if _bytes(part) > _limit(program, lists):
        yield None
        return
    own = weights.resident()
    with _cut_model(model, cut), placed_weights(model, own):
        own.put_weights(part)
        part.parameters = {name: in_memory(tensor) for name, tensor in part.parameters.items()}
        own.put_example(part)
        known, refused = part.unproven, _refused(model, part)
        yield None if refused else part
    weights.compared = not refused
    if refused:
        program.unproven = (*program.unproven, f"{NOT_PROVEN}: cut to its first layers, it raises {refused}")
        return
    program.training = part.training
    program.backward = f"{part.backward}, of the layers that are compared" if cut else part.backward
    program.unproven = (*program.unproven, *(line for line in part.unproven if line not in known))
    if cut:
        left = " and ".join(map(str, cut))
        program.unproven += (
            f"{NOT_PROVEN}: {left}, whose weights are left in files; they make the calls of earlier layers, which were "
            "compared",
        )


def _limit(program: Program, lists: Mapping[str, int]) -> float:
    """How many bytes the weights of the part may take; on several ranks no more than training takes, with two layers whole."""
    ranks = Ranks.here().size
    most = memory_budget() / (SHARE * ranks)
    if ranks == 1:
        return most
    layers = Counter[str]()
    for name, tensor in program.parameters.items():
        path = next((path for path in lists if name.startswith(f"{path}.")), "")
        number = name.removeprefix(f"{path}.").split(".")[0]
        layers[f"{path}.{number}" if path else name] += tensor.nbytes
    return min(most, _bytes(program) / ranks + 2 * max(layers.values(), default=0))


def _bytes(program: Program) -> int:
    return sum(tensor.nbytes for tensor in program.parameters.values())


def _refused(model: nn.Module, part: Program) -> str:
    """Why a model that was cut short does not run, in words; empty if it does."""
    try:
        with own_run(model):
            model(**part.example)
    except MODEL_ERRORS as error:
        first = (str(error).splitlines() or [""])[0]
        return f"{type(error).__name__}: {first[:200]}"
    return ""


def _lists(model: nn.Module) -> dict[str, int]:
    """The number of modules of each list of a model, by its path."""
    return {
        path: len(module)
        for path, module in model.named_modules()
        if type(module) in (nn.ModuleList, nn.Sequential) and path and len(module) > 1
    }


@contextmanager
def _cut_model(model: nn.Module, lists: tuple[ShortList, ...]) -> Iterator[None]:
    """Within it, a model's lists have only the modules that stay."""
    held = [(module, dict(module._modules)) for module in (model.get_submodule(one.path) for one in lists)]
    try:
        for (module, children), one in zip(held, lists):
            module._modules = dict(list(children.items())[: one.kept])
        yield
    finally:
        for module, children in held:
            module._modules = children
