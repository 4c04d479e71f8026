"""Rotate on every zoo architecture, against the eager model; hidden states stay as they are where norms stand between layers."""

from __future__ import annotations

import pytest
import torch

import bmgraph as bg
from bmgraph.errors import PassError
from bmgraph.passes import Rotate
from tests.helpers.captured import NAMES, batches, captured, distance, eager_outputs
from tests.helpers.zoo import BY_NAME

pytestmark = pytest.mark.slow

STAYS = {
    **dict.fromkeys(
        ("bert", "roberta", "distilbert", "albert", "electra", "mpnet", "deberta_v2", "gemma2", "olmo2", "bart", "marian"),
        "post-norm",
    ),
    "wav2vec2": "conv1d", "hubert": "conv1d",
}  # fmt: skip
"""Architectures whose hidden states cannot be rotated -> what the report says."""

NO_VALUES = ("mamba", "mamba2")
"""Architectures without attention."""

ELSEWHERE = ("falcon",)
"""Architectures that pick the one head of values by constant indices, which are not followed."""


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_eager_model(name: str) -> None:
    model, program = captured(name)
    if name == "albert":  # its one layer runs twice, so that its weights are used twice
        with pytest.raises(PassError, match=r"post-norm.*its weight is used 2 times"):
            bg.Pipeline([Rotate()]).run(program)
        return
    found = bg.Pipeline([Rotate()]).run(program)
    for batch in batches(BY_NAME[name]):
        outputs = found(**batch)
        with torch.no_grad():
            wanted = eager_outputs(model, batch, list(outputs))
        for key, value in outputs.items():
            assert distance(value, wanted[key]) < 1e-5, key
    record = found.history[-1]
    said = " ".join(edit.what for edit in record.declined)
    streams = [edit for edit in record.edits if "channels of the hidden state" in edit.what]
    assert (STAYS[name] in said) if name in STAYS else streams, said
    values = [edit for edit in record.edits if "values that it reads" in edit.what]
    attentions = 0 if name in (*NO_VALUES, *ELSEWHERE) else BY_NAME[name].expected.attentions
    assert len([edit for edit in values if edit.what.startswith("4 x 8")]) == attentions
    roles = found.structure().roles
    assert roles.items() >= program.structure().roles.items()
