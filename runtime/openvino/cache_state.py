"""The KV cache of a decoder as OpenVINO's own state, to which its CPU plugin appends within attention, without copying it.

B rows, P cached positions, S new ones. The plugin fuses `ReadValue, Gather of rows, Concat, attention, Assign` into one kernel;
where attention has another form, these stay calls of their own, and what they compute is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bmgraph.ir.cache_spec import CacheLayout, SlotNames
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.openvino.library import import_openvino

ROWS = "bmgraph.rows"
"""The name of the input i32[B] that says which row of the cache each row goes on with: its own, but in a beam search."""


def unfit_slot(model: Any, cache: CacheLayout) -> str:
    """Why a slot of the cache cannot become a variable that grows; "" where all can."""
    for slot in cache.slots:
        shape = model.input(slot.past).get_partial_shape()
        if not shape[slot.axis].is_dynamic:
            return f"{slot.past!r} has room for {shape[slot.axis].get_length()} positions"
        if any(shape[axis].is_dynamic for axis in range(1, len(shape)) if axis != slot.axis):
            return f"{slot.past!r} has other dynamic sizes than rows and positions"
    return ""


def keep_in_state(model: Any, cache: CacheLayout) -> None:
    """Let a converted model keep its cache, in place: the inputs and outputs of its slots become variables that are empty at first,
    and it takes `ROWS`."""
    openvino = import_openvino()
    ops: Any = openvino.opset13
    parameters = {name: item for item in model.get_parameters() for name in item.output(0).get_names()}
    results = {name: item for item in model.get_results() for name in item.input_value(0).get_names()}
    rows = ops.parameter([-1], openvino.Type.i32)
    rows.output(0).set_names({ROWS})
    count = ops.gather(ops.shape_of(parameters[cache.tokens]), _number([0]), _number(0))
    for slot in cache.slots:
        past, present = parameters[slot.past], results[slot.present]
        variable = _variable(slot, past)
        read = ops.read_value(_empty(ops, slot, past, count), variable)
        picked = ops.gather(read, rows, _number(0))
        for target in past.output(0).get_target_inputs():
            sizes = target.get_node().get_type_name() == "ShapeOf"
            target.replace_source_output((read if sizes else picked).output(0))
        model.add_variables([variable])
        model.add_sinks([ops.assign(_node(ops, present.input_value(0)), variable)])
        model.remove_result(present)
        model.remove_parameter(past)
    model.add_parameters([rows])
    model.validate_nodes_and_infer_types()


def _number(value: int | list[int]) -> Any:
    ops: Any = import_openvino().opset13
    return ops.constant(np.array(value, np.int64))


def _node(ops: Any, value: Any) -> Any:
    """A node whose only output is a value."""
    node = value.get_node()
    return node if node.get_output_size() == 1 else ops.concat([value], 0)


def _variable(slot: SlotNames, past: Any) -> Any:
    util: Any = import_openvino().op.util
    info = util.VariableInfo()
    info.variable_id = slot.past
    info.data_shape = past.get_partial_shape()
    info.data_type = past.get_element_type()
    return util.Variable(info)


def _empty(ops: Any, slot: SlotNames, past: Any, count: Any) -> Any:
    """A slot of `count` rows without positions: with it the plugin knows that there is nothing to read at first."""
    shape = past.get_partial_shape()
    sizes = [_number([0 if axis == slot.axis else shape[axis].get_length()]) for axis in range(1, len(shape))]
    zero = ops.constant(np.zeros((), past.get_element_type().to_dtype()))
    return ops.broadcast(zero, ops.concat([count, *sizes], 0))


def unknown_sizes(model: Any) -> str:
    """Why OpenVINO would not know how to group the codes of a cache in 8 bits, of a model that keeps its state; "" where it would.

    It groups them by the size of a head of the keys and values that are appended.
    """
    for sink in model.get_sinks():
        for value in sink.input_value(0).get_node().input_values():
            shape = value.get_partial_shape()
            if shape.rank.is_static and shape[len(shape) - 1].is_dynamic:
                return f"what {sink.get_variable_id()!r} is appended has heads of a size that the model does not fix"
    return ""


def appended_apart(runtime: Any) -> int:
    """How many tensors of the state OpenVINO appends to outside of attention, by its graph of what is executed."""
    return sum(
        _layer_type(node.input_value(0).get_node()) != "ScaledDotProductAttention"
        for node in runtime.get_ops()
        if _layer_type(node) == "MemoryOutput"
    )


def _layer_type(node: Any) -> str:
    return str(node.get_rt_info()["layerType"].astype(str))


def load_state(request: Any, slots: Sequence[SlotNames], feeds: Mapping[str, Array]) -> None:
    """Let a request go on with the cache in `feeds`."""
    if not feeds[slots[0].past].shape[slots[0].axis]:
        request.reset_state()
        return
    for state in request.query_state():
        write_tensor(state, feeds[state.name])


def state_values(request: Any) -> dict[str, Array]:
    """Copies of what a request holds, by the names of the inputs that they were."""
    return {state.name: read_tensor(state).copy() for state in request.query_state()}


def read_tensor(state: Any) -> Array:
    """What a tensor of the state of a request holds, until it is written."""
    found: Array = state.state.data
    return found


def write_tensor(state: Any, value: Array) -> None:
    """Let a tensor of the state of a request hold a copy of a value, of any sizes."""
    state.state = import_openvino().Tensor(np.ascontiguousarray(value))
