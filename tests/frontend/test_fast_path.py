"""`nn.TransformerEncoder` with padding in the example: torch's fast path does not stand in the way."""

from __future__ import annotations

import torch
from torch import nn

import bmgraph as bg
from bmgraph.verify.metrics import relative_error


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask == 0))  # type: ignore[no-any-return]


def test_padding_in_the_example() -> None:
    model, mask = Encoder().eval(), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = {"x": torch.randn(2, 4, 8), "mask": mask}
    program = bg.capture(model, batch)
    assert torch.backends.mha.get_fastpath_enabled()
    assert not program.training
    with torch.no_grad():
        real = model(**batch)[mask != 0]
    assert relative_error(program(**batch)["output"][mask != 0], real) < 1e-5
