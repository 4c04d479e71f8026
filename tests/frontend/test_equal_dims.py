"""Equal dimensions become one symbol and stay dynamic, within the bounds that the model sets."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

import bmgraph as bg
from bmgraph.errors import InputError
from bmgraph.frontend import capture
from bmgraph.frontend.equal_dims import name_equal_dims, with_suggested_bounds

LONGEST = 30
ASKED = "Constraints violated!\nSuggested fixes:\n  size_7 = Dim('size_7', min=3, max=30)\n  size_2 = 2\n"


class Places(nn.Module):
    """A label per token, and a position table sliced to the input length, as in encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.table, self.head = nn.Embedding(20, 8), nn.Embedding(LONGEST, 8), nn.Linear(8, 5)
        self.register_buffer("places", torch.arange(LONGEST)[None])

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """ids, labels i64[B, S] -> loss f[], logits f[B, S, 5]."""
        logits = self.head(self.embed(ids) + self.table(self.places[:, : ids.shape[1]]))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_a_table_of_positions_leaves_batch_and_length_free_beside_labels() -> None:
    torch.manual_seed(0)
    ids, labels = torch.randint(0, 20, (3, LONGEST)), torch.randint(0, 5, (3, LONGEST))
    model = Places()
    program = bg.capture(model, {"ids": ids[:, :7], "labels": labels[:, :7]})
    assert program.fixed == ()
    assert [spec.shape for spec in program.inputs] == [("batch", "sequence")] * 2
    for rows, length in ((2, 4), (1, LONGEST)):
        batch = {"ids": ids[:rows, :length], "labels": labels[:rows, :length]}
        assert torch.allclose(program(**batch)["loss"], model(**batch)["loss"], atol=1e-6)
    longer = torch.zeros(3, LONGEST + 1, dtype=torch.int64)
    with pytest.raises(InputError, match=rf"has sequence {LONGEST + 1} .* takes 1 to {LONGEST}"):
        program(ids=longer, labels=longer)


def test_equal_sizes_are_one() -> None:
    shapes = name_equal_dims({"x": torch.zeros(2, 7), "labels": torch.zeros(7)})
    assert shapes["x"][1] is shapes["labels"][0]
    assert shapes["x"][0] is Dim.AUTO
    assert name_equal_dims({"x": torch.zeros(2, 7)}) == {}


def test_bounds_are_those_asked_for() -> None:
    shapes = name_equal_dims({"x": torch.zeros(2, 7), "labels": torch.zeros(7)})
    bounded = with_suggested_bounds(shapes, ASKED)
    assert (bounded["x"][1].min, bounded["x"][1].max) == (3, LONGEST)
    assert bounded["x"][0] is Dim.AUTO


@pytest.mark.parametrize("message", ["", "the model does not export", "size_9 = Dim('size_9', max=4)"])
def test_nothing_is_tried_again_where_no_bounds_are_asked_for(message: str) -> None:
    assert with_suggested_bounds(name_equal_dims({"x": torch.zeros(7, 7)}), message) == {}


def test_bounds_that_are_there_are_not_tried_again() -> None:
    bounded = with_suggested_bounds(name_equal_dims({"x": torch.zeros(7, 7)}), ASKED)
    assert with_suggested_bounds(bounded, ASKED) == {}


def test_a_flattened_loss_is_exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    exports = []
    export = capture._run_export
    monkeypatch.setattr(capture, "_run_export", lambda *given: exports.append(given) or export(*given))
    ids = torch.arange(10).reshape(2, 5)
    program = bg.capture(Places(), {"ids": ids, "labels": ids % 5})
    assert len(exports) == 1
    assert [spec.shape for spec in program.inputs] == [("batch", "sequence")] * 2
    assert program.ranges["sequence"].high == LONGEST
