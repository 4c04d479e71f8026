"""TorchEngine: inputs go to the device of the program (here `meta`, which every machine has)."""

from __future__ import annotations

import torch

import bmgraph as bg
from bmgraph.pass_manager.report import Report
from bmgraph.runtime.torch.engine import TorchEngine


def test_inputs_go_to_the_device_of_the_weights() -> None:
    program = bg.capture(torch.nn.Linear(4, 2), {"input": torch.randn(3, 4)}).to("meta")
    for runner in (program, TorchEngine(program, Report())):
        output = runner(input=torch.randn(5, 4))["output"]
        assert output.device.type == "meta"
        assert output.shape == (5, 2)
