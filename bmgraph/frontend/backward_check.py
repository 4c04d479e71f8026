"""Compare one backward of a program's training form with the eager model's: what the program would train."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from bmgraph.frontend.eager_check import MODEL_ERRORS, Batch, tensor_leaves
from bmgraph.frontend.half_precision import half_dtype, in_fp32, widened
from bmgraph.frontend.no_dropout import NoDropout
from bmgraph.frontend.own_run import own_run
from bmgraph.frontend.proof_batches import Choices
from bmgraph.frontend.proof_share import WHOLE_PROOF, ProofShare
from bmgraph.ir.program import Program
from bmgraph.utils.collecting import is_large
from bmgraph.utils.user_frame import user_line
from bmgraph.verify.gradients import (
    Gradients,
    autograd_on,
    differences,
    distance,
    gradients_of,
    output_gradients,
)

BACKWARD_TOLERANCE = 1e-3
"""Largest error of a gradient, relative to its norm (L2)."""

MEMORY_LIMIT = 4 * 2**30
"""Largest estimated size, in bytes, of what the check holds: activations, and three times the compared gradients."""

SMALL = 256
"""Elements of an example on which the gradients of a model that is not large are compared whatever other batches there are: it
takes no time."""

SCALE = 2.0**10
"""Factor on the cotangents that shows a backward of the model's own that is not linear, such as clipping."""


def prove_backward(
    program: Program, model: nn.Module, batches: Sequence[Choices] = (), share: ProofShare = WHOLE_PROOF
) -> None:
    """Compare gradients of the program with eager's, and write the result into `program.training` or `program.backward`.

    Both run in training form without dropout, on the example, or on a batch of `batches` that is much smaller where that
    says as much (`_agree_on`); the model stays in the modes that its modules are in. The gradients are those of all
    floating-point outputs times random cotangents of norm 1, for every parameter that trains; under the memory limit only
    for the smallest parameters, which every layer has; here for those in this rank's `share`. Restores the buffers of the model and the state of the random
    generator, and leaves `.grad` alone.
    """
    hooked = _hidden_hook(model)
    if hooked:
        program.training = hooked
        return
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.is_floating_point()
    }
    chosen, why = _within_memory(program, trained)
    if not chosen:
        program.backward = why
        return
    small: Batch | None = None
    own = share.parameters(chosen)
    try:
        small = next(
            (
                batch
                for batch in _small_batches(program, batches)
                if own and _agree_on(batch, program, model, own)
            ),
            None,
        )
        if small is None and own:
            program.training = _mismatch(program, model, own)
    except torch.OutOfMemoryError:
        program.backward = "backward: not compared with the model's: out of memory; give a smaller example"
        return
    if not program.training:
        rows = "" if small is None else f", on {'x'.join(map(str, next(iter(small.values())).shape))}"
        program.backward = f"backward: equals the model's in {len(chosen)} of {len(trained)} parameters that train{why}{rows}"


def _hidden_hook(model: nn.Module) -> str:
    """Why hooks that `autograd.grad` does not run keep the program from training; empty if there are none."""
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            return (
                f"parameter {name!r} has a post-accumulate gradient hook, which a program does not run: remove it "
                "before capturing"
            )
    return ""


def _within_memory(
    program: Program, trained: Mapping[str, nn.Parameter]
) -> tuple[dict[str, nn.Parameter], str]:
    """The parameters whose gradients fit into the memory limit, smallest first, and a note on those left out."""
    if not trained:
        return {}, "backward: not compared with the model's: no parameter trains"
    free = MEMORY_LIMIT - _activation_bytes(program.graph)
    chosen: dict[str, nn.Parameter] = {}
    for name, parameter in sorted(trained.items(), key=lambda item: item[1].numel()):
        free -= 3 * parameter.numel() * max(4, parameter.element_size())
        if free < 0:
            break
        chosen[name] = parameter
    limit = f"the check may hold {MEMORY_LIMIT / 2**30:g} GiB"
    if not chosen:
        return {}, f"backward: not compared with the model's: {limit}; give a smaller example"
    return chosen, f" (the smallest ones: {limit})" if len(chosen) < len(trained) else ""


def _activation_bytes(graph: fx.Graph) -> int:
    """The size of all values that a graph computes on its example; views are not counted."""
    total = 0
    for node in graph.nodes:
        if node.op != "call_function" or _is_view(node):
            continue
        values = node.meta.get("val")
        for value in values if isinstance(values, (list, tuple)) else (values,):
            if isinstance(value, torch.Tensor):
                count = 1
                for size in value.shape:
                    count *= _hint(size)
                total += count * value.element_size()
    return total


def _is_view(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return bool(returns) and returns[0].alias_info is not None


def _hint(size: Any) -> int:
    """The size in the example; 1 if it depends on data."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    hint = size.node.hint
    return 1 if hint is None else int(hint)


def _small_batches(program: Program, batches: Sequence[Choices]) -> list[Batch]:
    """The batches of other sizes with less than half of the elements of an example that is not small itself."""
    if _elements(program.example) < SMALL and not is_large(program.parameters.values()):
        return []
    least = _elements(program.example) / 2
    return [batch for choices in batches[:1] for batch in choices if _elements(batch) < least]


def _elements(batch: Batch) -> int:
    return sum(value.numel() for value in batch.values())


def _agree_on(batch: Batch, program: Program, model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> bool:
    """Whether the gradients agree on a batch that shows as much of the backward as the example would.

    It does not where forward has a backward of its own (functions, hooks), which may do something else on other values, where
    a parameter has no gradient (its rows may all be ignored, or an expert unused), or where a gradient is not finite.
    """
    seen = _Seen()
    try:
        with own_run(model):
            expected = _eager_gradients(batch, model, chosen, seen)
            spread = _rounding(batch, model, chosen, expected)
        if seen.functions or seen.others or _has_hooks(model):
            return False
        if not all(name in expected and _is_telling(expected[name]) for name in chosen):
            return False
        found = output_gradients(program, batch, list(chosen))
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS:  # the model takes no such batch
        return False
    return not differences(found, expected, list(chosen), _tolerance(model, batch), spread)


def _is_telling(gradient: torch.Tensor) -> bool:
    norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    return math.isfinite(norm) and norm > 0


def _tolerance(model: nn.Module, batch: Batch) -> float:
    dtype = half_dtype(model, batch)
    return max(BACKWARD_TOLERANCE, 4 * torch.finfo(dtype).eps if dtype else 0.0)


def _mismatch(program: Program, model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> str:
    """How the program's gradients differ from eager's; empty if they do not."""
    seen = _Seen()
    try:
        expected = _eager_gradients(program.example, model, chosen, seen)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return (
            f"the model's own backward cannot be compared: {str(error).splitlines()[0][:200]}"
            + seen.places()
            + "; checkpoint with use_reentrant=False, and keep tensors that backward needs from writes in place"
        )
    if seen.not_linear:
        return f"the model's backward of {seen.not_linear!r} is not linear, such as one that clips{seen.places()}"
    found = output_gradients(program, program.example, list(chosen))
    spread = _rounding(program.example, model, chosen, expected)
    wrong = differences(found, expected, list(chosen), _tolerance(model, program.example), spread)
    if not wrong:
        return ""
    _locate(program.example, model, seen)
    worst = max(wrong, key=lambda name: wrong[name])
    return (
        f"its backward differs from eager's in {len(wrong)} of {len(chosen)} parameters, most in {worst!r} "
        f"(by {wrong[worst]:.2g} of its gradient's norm){seen.places()}; write such gradients with detach(), for "
        "example x + (torch.round(x) - x).detach()"
    )


@dataclass
class _Seen:
    """What has a backward of its own in the eager model: custom functions, hooks, regions without autograd."""

    functions: dict[str, str] = field(default_factory=dict)
    """By name of a `torch.autograd.Function`: its line in the model, if known."""
    others: dict[str, str] = field(default_factory=dict)
    """By what was seen: its line in the model."""
    not_linear: str = ""
    """A parameter whose gradient does not grow with the cotangents."""

    def places(self) -> str:
        """What was seen and where, as a part of a sentence; empty if nothing was."""
        named = {f"torch.autograd.Function {name}": line for name, line in self.functions.items()}
        parts = [f"{what} at {line}" if line else what for what, line in {**named, **self.others}.items()]
        return f": forward has {', '.join(parts)}" if parts else ""


class _Spy(TorchFunctionMode):
    """Notes hooks that forward registers, and calls in inference mode."""

    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.register_hook:
            self._note("a gradient hook")
        elif torch.is_inference_mode_enabled():
            self._note("an inference_mode region")
        return func(*args, **(kwargs or {}))

    def _note(self, what: str) -> None:
        if what not in self._seen.others:
            self._seen.others[what] = user_line("".join(traceback.format_stack()))


def _eager_gradients(
    inputs: Mapping[str, torch.Tensor],
    model: nn.Module,
    chosen: Mapping[str, nn.Parameter],
    seen: _Seen,
) -> Gradients:
    """The eager gradients of the chosen parameters, by name."""
    with autograd_on(model), NoDropout():
        with _Spy(seen):
            outputs = tensor_leaves(model(**inputs))
        seen.functions.update(dict.fromkeys(_custom_functions(outputs), ""))
        own = bool(seen.functions) or "a gradient hook" in seen.others or _has_hooks(model)
        gradients = gradients_of(outputs, chosen, 1.0, retain=own)
        if own:
            larger = gradients_of(outputs, chosen, SCALE)
            scaled = {name: gradient * SCALE for name, gradient in gradients.items()}
            wrong = differences(larger, scaled, list(chosen), BACKWARD_TOLERANCE, {})
            seen.not_linear = next(iter(wrong), "")
    return gradients


def _has_hooks(model: nn.Module) -> bool:
    """Whether gradient hooks are attached to parameters or modules."""
    tensors = any(getattr(parameter, "_backward_hooks", None) for parameter in model.parameters())
    return tensors or any(module._backward_hooks or module._backward_pre_hooks for module in model.modules())


def _rounding(
    inputs: Mapping[str, torch.Tensor],
    model: nn.Module,
    chosen: Mapping[str, nn.Parameter],
    expected: Gradients,
) -> dict[str, float]:
    """For a model in half precision, the distance of each gradient to the one in fp32; nothing for other models."""
    if half_dtype(model, inputs) is None:
        return {}
    try:
        with in_fp32(model):
            exact = _eager_gradients(widened(inputs), model, chosen, _Seen())
    except RuntimeError:  # forward casts to its own dtype: only the dtype says how far it rounds
        return {}
    return {
        name: distance(gradient.float(), exact[name]) for name, gradient in expected.items() if name in exact
    }


def _locate(inputs: Mapping[str, torch.Tensor], model: nn.Module, seen: _Seen) -> None:
    """Find the lines of the model that call custom functions: anomaly mode keeps them."""
    if not seen.functions:
        return
    before = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    with autograd_on(model), NoDropout():
        torch.autograd.set_detect_anomaly(True, check_nan=False)
        try:
            seen.functions.update(_custom_functions(tensor_leaves(model(**inputs))))
        finally:
            torch.autograd.set_detect_anomaly(*before)


def _custom_functions(outputs: Sequence[torch.Tensor]) -> dict[str, str]:
    """The `torch.autograd.Function`s in the history of outputs, by name, with their lines under anomaly mode."""
    found: dict[str, str] = {}
    stack: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    known = set(stack)
    while stack:
        node = stack.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            line = user_line("".join(node.metadata.get("traceback_", ())))
            found.setdefault(type(node).__name__.removesuffix("Backward"), line)
        for source, _ in node.next_functions:
            if source is not None and source not in known:
                known.add(source)
                stack.append(source)
    return found
