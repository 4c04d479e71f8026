"""Values that are no plain tensors with values are refused by name, in one line; plain ones arrive as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bmgraph.errors import InputError
from bmgraph.ir.input_check import check_inputs
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.utils.torch_internals import FakeTensorMode

IDS = TensorSpec("ids", torch.int64, ("batch", 3), values=(0, 49))
X = TensorSpec("x", torch.float32, ("batch", 3))
SCALE = TensorSpec("scale", torch.float32, ())
IDS_23 = torch.arange(6).reshape(2, 3)
X_23 = torch.arange(6.0).reshape(2, 3)


def checked(spec: TensorSpec, value: object) -> torch.Tensor:
    return check_inputs((spec,), {}, {spec.name: value})[spec.name]


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.zeros(2, 3)


def freed() -> torch.Tensor:
    tensor = X_23.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("spec", "value", "message"),
    [
        (IDS, IDS_23.float(), "has dtype float32: expected int64"),
        (IDS, IDS_23.numpy().astype(">i8"), "has dtype >i8, whose bytes are in another order"),
        (X, X_23.numpy().astype(">f4"), "has dtype >f4, whose bytes are in another order"),
        (IDS, IDS_23.numpy().astype(object), "is an array of object: expected numbers, ids: i64[batch, 3]"),
        (IDS, IDS_23.numpy().astype(str), "is an array of <U21: expected numbers"),
        (X, X_23.numpy().astype(np.longdouble), "expected numbers"),
        (IDS, np.zeros((2, 3), "M8[s]"), "is an array of datetime64[s]"),
        (IDS, np.ma.masked_array(IDS_23.numpy(), IDS_23.numpy() > 3), "is a masked array"),
        (IDS, IDS_23.to_sparse(), "has layout sparse_coo: give a dense tensor"),
        (X, X_23.to_sparse(), "has layout sparse_coo: give a dense tensor"),
        (X, X_23.to_sparse_csr(), "has layout sparse_csr: give a dense tensor"),
        (X, torch.nested.nested_tensor([X_23[0], X_23[1]]), "is a nested tensor: give a padded one"),
        (X, torch.quantize_per_tensor(X_23, 0.1, 0, torch.qint8), "is a quantized tensor"),
        (X, X_23.to(torch.complex64), "has dtype complex64: expected float32"),
        (IDS, IDS_23.to("meta"), "has no values"),
        (X, X_23.to("meta"), "has no values"),
        (X, fake(), "has no values"),
        (X, freed(), "has no values"),
        (IDS, IDS_23.tolist(), "is a list: expected a tensor"),
        (IDS, np.int64(3), "is a int64: expected a tensor"),
        (IDS, None, "is a NoneType: expected a tensor"),
    ],
)  # fmt: skip
def test_what_is_no_plain_tensor_is_refused(spec: TensorSpec, value: Any, message: str) -> None:
    with pytest.raises(InputError) as told:
        checked(spec, value)
    assert message in str(told.value)
    assert str(told.value).startswith(f"input {spec.name!r} ")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        (X, X_23.clone().requires_grad_()),
        (X, X_23.clone().requires_grad_() * 1),
        (X, torch.nn.Parameter(X_23.clone())),
        (X, X_23.t().contiguous().t()),
        (X, X_23.numpy().T.copy().T),
        (X, np.broadcast_to(X_23.numpy(), (1, 2, 3))[0]),
        (X, X_23.repeat(1, 2)[:, 3:]),
    ],
)
def test_plain_tensors_arrive_with_their_values(spec: TensorSpec, value: Any) -> None:
    assert torch.equal(checked(spec, value), X_23)


def test_a_single_number_keeps_its_shape() -> None:
    assert checked(SCALE, np.array(2.0, np.float32)).shape == ()


def test_a_batch_is_a_dict() -> None:
    given: Any = [X_23]
    with pytest.raises(InputError, match=r"the batch is a list: expected a dict of tensors by name \(x\)"):
        check_inputs((X,), {}, given)
    wrong: Any = {3: X_23}
    with pytest.raises(InputError, match="unknown input 3"):
        check_inputs((X,), {}, wrong)
