"""Trace the joint graph: a program's training form, its loss and their backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from bmgraph.distributed.process_group import Ranks, SilentRanks
from bmgraph.errors import InputError
from bmgraph.ir.eval_form import set_device
from bmgraph.ir.program import Program, placeholders, tensor_nodes
from bmgraph.ir.shape_inference import fake_parameter, reset_values
from bmgraph.training.call_gradients import Value
from bmgraph.training.computation import checked_constants, loss_module, loss_text
from bmgraph.training.evaluation_graph import EvaluationSource
from bmgraph.training.flat_graph import flat_graph
from bmgraph.training.fp32_form import in_fp32
from bmgraph.training.gathered_outputs import Gathering, check_gather
from bmgraph.training.half_form import in_half
from bmgraph.training.joint_assembly import JointAssembly
from bmgraph.training.loss_forms import loss_forms
from bmgraph.training.loss_terms import Loss
from bmgraph.training.placement import Place, Update
from bmgraph.training.precision import FP32, SCALE, Precision, cast_gradients, scaled_loss
from bmgraph.training.recompute_weights import recompute_casts, recompute_weights
from bmgraph.training.row_axes import LossGraph, RowAxes, find_rows
from bmgraph.training.rows_before_head import Head, heads_of, only_selected, selecting_first, with_operands
from bmgraph.training.step_program import CONSTANT, WHOLE, StepProgram
from bmgraph.training.weight_digests import digests_of
from bmgraph.training.weighted_terms import WeightedTerms
from bmgraph.utils.stored_tensor import is_too_large, tensor_on
from bmgraph.utils.torch_internals import python_dispatcher


def trace_step(
    program: Program,
    loss: str | Loss,
    batch: str = WHOLE,
    accumulate: int = 1,
    precision: Precision = FP32,
    unreached: frozenset[str] = frozenset(),
    gather: tuple[str, ...] = (),
) -> StepProgram:
    """The step of a program: the summed loss, and its gradients with respect to all trained parameters.

    `loss` names an output of the program, or computes (sum, count) from outputs and inputs. Where no ranks share a batch
    (there is one rank, or with `batch` "rank" each has its own) nor micro-batches (`accumulate`) it may be any scalar, which
    counts as one item. Trained are the floating-point parameters that are not frozen and that the loss depends on
    (`unreached`: those that it is known not to). `gather`: outputs and inputs of which the loss reads the rows of all
    ranks. The step shares the storage of parameters and copies buffers. What trains of a half-precision program is copied in
    float32; a step that computes in half precision has that for masters.

    Raises InputError if the program cannot train, if its weights are on the `meta` device, if a pass has replaced what was
    to train whole, if `loss` is not a mean that ranks can share, or if no parameter would be trained.
    """
    _check_trains(program)
    if gather:
        check_gather(program, loss, gather, accumulate)
    ranks = Ranks.here()
    gathering = Gathering(gather if ranks.size > 1 else (), ranks)
    several = ranks.size > 1 or accumulate > 1
    shared = (ranks.size > 1 and batch == WHOLE) or accumulate > 1
    contiguous = in_fp32(_contiguous(program))
    forms = loss_forms(contiguous, loss, shared, several)
    call = None if isinstance(loss, str) else partial(_call_loss, loss, shared and not gather)
    split, terms, computation = forms.split, forms.terms, forms.computation
    shaped = split.clone()  # with the shapes that tracing removes
    read = list(tensor_nodes(split.graph))
    candidates = {name for name in read if _is_trainable(program, name)} - unreached
    in_precision = (
        partial(in_half, dtype=precision.compute, trained=candidates) if precision.is_half else None
    )
    if in_precision is not None:
        split = in_precision(split)
    evaluation = _evaluation(split, forms.means, call, gathering, in_precision)
    set_device(split.graph, split.device)
    given = {SCALE: torch.tensor(1.0, device=split.device)} if precision.is_scaled else {}
    assembly, reached, of_loss, rows = _assembled(split, call, read, candidates, given, gathering, shaped)
    if precision.is_half and len(reached) < len(candidates):  # what is no master stays as it is
        missed = unreached | (candidates - set(reached))
        return trace_step(program, loss, batch, accumulate, precision, missed, gather)
    if of_loss is not None:
        computation += loss_text(of_loss.module)
    constants = checked_constants(assembly.constants)
    graph = flat_graph(assembly.graph, [spec.name for spec in split.inputs], [*read, *given], constants)
    outline = _outline(program)
    outline.symbols = split.symbols
    shares = {} if terms is None else {name: split.buffers[name].clone() for name in terms.counts.shares}
    tensors = _tensors(contiguous, [name for name in read if name not in shares], constants) | shares | given
    masters = {name: tensors[name] for name in reached} if precision.is_half else {}
    tensors |= {name: split.parameters[name] for name in masters}
    places = {name: Place.whole(name, tensor) for name, tensor in tensors.items()}
    traced = StepProgram(
        graph,
        outline,
        tensors,
        places,
        {name: Update(places[name], places[name]) for name in reached},
        masters=masters,
        writes=program.writes,
        ranks=ranks,
        rows=rows
        or (find_rows(shaped if terms is None else terms.rows, of_loss) if several else RowAxes({})),
        gathered=gathering.names,
        digests={}
        if isinstance(ranks, SilentRanks)
        else digests_of(program, reached if ranks.size == 1 else ()),
        computation=computation,
        evaluation=evaluation,
        compute=precision.compute,
    )
    if terms is not None:
        traced.counts, traced.by_part = terms.counts, terms.by_part
    elif several and _counts_as_one(traced):
        traced.by_part = ("the loss, which is no mean over items",)
    _compute_again(traced, precision)
    return traced


def _compute_again(step: StepProgram, precision: Precision) -> None:
    """Compute casts and expressions of weights again in backward, instead of keeping them; in half precision cast gradients."""
    if precision.is_half:
        cast_gradients(step, precision)
        recompute_casts(step)
    recompute_weights(step)


def _evaluation(
    split: Program,
    means: WeightedTerms | None,
    call: Callable[..., Any] | None,
    gathering: Gathering,
    in_precision: Callable[[Program], Program] | None,
) -> EvaluationSource:
    """What an evaluation is traced from: each term of a loss by itself, or the loss as the step has it."""
    if means is None:
        return EvaluationSource.of(split, call, gathering)
    apart = means.apart if in_precision is None else in_precision(means.apart)
    return EvaluationSource.of(apart, None, gathering, means.counts)


def _assembled(
    split: Program,
    call: Callable[..., Any] | None,
    read: list[str],
    candidates: set[str],
    given: Mapping[str, torch.Tensor],
    gathering: Gathering,
    shaped: Program,
) -> tuple[JointAssembly, list[str], LossGraph | None, RowAxes | None]:
    """The joint graph, which returns loss, count, gradients and writes; whose gradients these are; the graph of a loss
    function `call`; and, where it reads gathered values, the rows. Without a `call`, the program returns loss and count.
    `given`: the loss scale, if there is one; `shaped`: the program with its shapes."""
    heads = [] if call is None or gathering.names else heads_of(split)
    mode = reset_values(split)
    mode.allow_non_fake_inputs = True  # a loss may read tensors of its own, such as weights of classes
    assembly = JointAssembly(mode)
    of_loss, rows, more_rows = None, None, gathering.new_size(mode)
    with mode, python_dispatcher():
        inputs = {
            name: assembly.place(name, node.meta["val"]) for name, node in placeholders(split.graph).items()
        }
        fakes = {
            name: fake_parameter(split.tensor(name), mode).requires_grad_(name in candidates) for name in read
        }
        fakes |= {name: fake_parameter(tensor, mode) for name, tensor in given.items()}
        tensors = {name: assembly.place(f"tensor_{index}", fakes[name]) for index, name in enumerate(fakes)}
        outputs = assembly.run(with_operands(split, heads), inputs.values(), tensors)
        own = len(outputs) - sum(len(head.operands) for head in heads)
        outputs, operands = outputs[:own], outputs[own:]
        outputs, writes = outputs[: -len(split.writes) or None], outputs[len(outputs) - len(split.writes) :]
        if call is not None:
            named = dict(zip((spec.name for spec in split.outputs), outputs))
            of_loss = _loss_graph(call, named, inputs, split, gathering, more_rows)
    if of_loss is not None and gathering.names:
        rows = _rows_to_gather(shaped, of_loss, gathering)  # not among fake tensors
    with mode, python_dispatcher():
        used = [] if of_loss is None else only_selected(of_loss, heads)
        if used and call is not None:
            given_heads = [each for head, each in zip(heads, _each(heads, operands)) if head in used]
            outputs = assembly.add(selecting_first(call, used), (named, inputs, given_heads), {})
        elif call is not None:
            given_to_loss = gathering.of(assembly, named), gathering.of(assembly, inputs)
            outputs = assembly.add(call, given_to_loss, {})
            if rows is not None and rows.whole:
                outputs = gathering.part(assembly, outputs)
        _check_sizes(inputs)
        total, count = outputs
        if not total.trains:
            raise InputError("the loss depends on no parameter that trains: unfreeze some, or add a delta")
        scaled = assembly.add(scaled_loss, (total, count, tensors[SCALE]), {}) if given else total
        gradients = dict(zip(tensors, assembly.finish(scaled, tensors.values())))
        reached = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        returned = (total, count, *reached.values(), *writes)
        assembly.graph.output(tuple(map(assembly.number, returned)))
    return assembly, list(reached), of_loss, rows


def _check_sizes(inputs: Mapping[str, Value]) -> None:
    """Raise InputError if tracing the loss has made a free size of an input a number."""
    for name, value in inputs.items():
        for axis, size in enumerate(value.fake.shape):
            if isinstance(size, torch.SymInt) and size.node.maybe_as_int() is not None:
                raise InputError(
                    f"the loss function fixes axis {axis} of {name!r}, which varies: it reads a size as a number of Python; write "
                    "x.shape[0] for len(x), and leave int(), range() and item() out"
                )


def _each(heads: Sequence[Head], operands: Sequence[Value]) -> list[list[Value]]:
    """The operands of each head."""
    left = iter(operands)
    return [[next(left) for _ in head.operands] for head in heads]


def _rows_to_gather(program: Program, loss: LossGraph, gathering: Gathering) -> RowAxes:
    """The rows of the inputs. Raises InputError if the loss does not add up over ranks."""
    rows = find_rows(program, loss)
    if not rows.axes:
        raise gathering.refusal(rows.reason)
    return rows


def _counts_as_one(step: StepProgram) -> bool:
    """Whether the loss is taken as it is, as one item."""
    loss, count = step.returned()[:2]
    return count.target is torch.ops.aten.ones_like.default and count.args[0] is loss


def _check_trains(program: Program) -> None:
    """Raise InputError if a program cannot train, has no weights, or lost what was to train whole."""
    if program.training:
        raise InputError(f"this program cannot train: {program.training}")
    if program.device.type == "meta":
        raise InputError("a program on the meta device has no weights to train: load them first")
    replaced = sorted(program.trained_whole - set(program.tensors()))
    if replaced:
        raise InputError(
            f"{replaced[0]} was to train whole (modules_to_save), but a later pass has replaced it, by codes for example: "
            "train before that pass, or exclude the module from it"
        )


def _tensors(
    program: Program, read: list[str], constants: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What a step reads, and what it does not read of the program: parameters as they are, copies of buffers, constants."""
    tensors = {name: program.tensor(name) for name in (*read, *_unread(program, read))}
    tensors |= {name: buffer.clone() for name, buffer in tensors.items() if name in program.buffers}
    return tensors | {f"{CONSTANT}{name}": tensor for name, tensor in constants.items()}


def _loss_graph(
    call: Callable[..., Any],
    outputs: Mapping[str, Value],
    inputs: Mapping[str, Value],
    program: Program,
    gathering: Gathering,
    more_rows: Any,
) -> LossGraph:
    """The graph of a loss function alone, on `more_rows` of what is gathered."""
    try:
        module = loss_module(call, gathering.fakes(outputs, more_rows), gathering.fakes(inputs, more_rows))
    except (RuntimeError, ValueError, IndexError) as error:
        if not gathering.names:
            raise
        raise gathering.refusal(f"it fails on more rows of these than of others ({error})") from error
    return LossGraph(module, len(outputs), program.symbols, frozenset(gathering.names))


def _outline(program: Program) -> Program:
    """The program without data: its tensors are on `meta`, its nodes keep the device that it runs on."""
    outline = program.clone()
    for tensors in (outline.parameters, outline.buffers):
        tensors.update({name: tensor_on(tensor, torch.device("meta")) for name, tensor in tensors.items()})
    outline.shared = {}
    return outline


def _contiguous(program: Program) -> Program:
    """The program with contiguous parameters, which have the strides of views of a flat tensor."""
    contiguous = program.clone()
    contiguous.parameters = {
        name: tensor if is_too_large(tensor) else tensor.detach().contiguous()
        for name, tensor in program.parameters.items()
    }
    return contiguous


def _is_trainable(program: Program, name: str) -> bool:
    return (
        name in program.parameters
        and name not in program.frozen
        and program.parameters[name].is_floating_point()
    )


def _unread(program: Program, read: list[str]) -> list[str]:
    """The program's tensors that the loss does not depend on."""
    return [name for name in program.tensors() if name not in set(read)]


def _call_loss(
    loss: Loss, shared: bool, outputs: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the user's loss and check that it returns (sum, count), two scalar tensors, or one where none is `shared`."""
    found: Any = loss(outputs, batch)
    is_scalar = isinstance(found, torch.Tensor) and found.dim() == 0
    if is_scalar and not shared:
        return found, torch.ones_like(found, dtype=torch.int64)
    is_pair = isinstance(found, tuple) and len(found) == 2
    if is_pair and all(isinstance(term, torch.Tensor) and term.dim() == 0 for term in found):
        return found[0], found[1]
    what = f"a tensor {list(found.shape)}" if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
    raise InputError(
        f"loss={getattr(loss, '__name__', loss)!r} returned {what}: return (sum, count), two scalar tensors"
        + (", because ranks and micro-batches cannot share a mean" if shared else ", or one scalar tensor")
    )
