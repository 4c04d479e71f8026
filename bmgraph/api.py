"""What authors of passes, operators, deltas and backends import; these names stay when inner modules move.

- a pass: `ModelPass`, `StepPass` (`Pass`: either), `Effect`, `FINAL`, `Context`, `Proof`, what it is held to (`Measure`, `WeightsMoved`, `OutputsMoved`), and the errors it raises
- the program that it rewrites: `Program`, `Editor`, `NodeRole` (with `register_role`, for a role of your own), `TensorSpec`, `InputKind`, `FORWARD`, `output_node`, `placeholders`, `tensor_nodes`
- sites: `find` and the `Structure` that it gives, `linears`, `products`, `weight_of`, `Weight`, `matches`, `check_patterns`
- values: `evaluate` (an expression of parameters), `Observed` (a run that shows the values of nodes)
- deltas: `Delta`, `deltas_of`
- an operator: `Operator` with its `Traits` (`Kind`, `Dims`, `Lookup`, `Flops`), see `bmgraph.ops.outside`
- what a pass of the step stage rewrites: `StepProgram`
- a backend: `Backend`, `Engine`, `Target`, `TORCH`, `Report`, `deployed` (the eval form, ready to lower), `exported_program` (for torch's exporters)
"""

from __future__ import annotations

from bmgraph.analysis.interpreter import Observed, evaluate
from bmgraph.analysis.site_filter import check_patterns, matches
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.sites import Structure
from bmgraph.analysis.weight_sites import Weight, linears, products, weight_of
from bmgraph.backends.backend_base import Backend
from bmgraph.deltas.low_rank import Delta, deltas_of
from bmgraph.errors import (
    BackendError,
    BmgraphError,
    InputError,
    MisplacedError,
    OrderError,
    PassError,
    ResourceError,
    VerificationError,
)
from bmgraph.ir.editor import Editor
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.node_role import NodeRole, register_role
from bmgraph.ir.program import FORWARD, Program, output_node, placeholders, tensor_nodes
from bmgraph.ir.tensor_spec import Range, TensorSpec
from bmgraph.lowering.to_exported_program import deployed, exported_program
from bmgraph.ops.outside import Operator
from bmgraph.ops.trait_row import Dims, Flops, Kind, Lookup, Traits
from bmgraph.pass_manager.context import CALIBRATION, Context
from bmgraph.pass_manager.pass_base import FINAL, Effect, ModelPass, Pass, StepPass
from bmgraph.pass_manager.report import Report
from bmgraph.pass_manager.target import TORCH, Target
from bmgraph.runtime.engine_base import Engine
from bmgraph.training.step_program import StepProgram
from bmgraph.verify.measures import Measure, OutputsMoved, WeightsMoved
from bmgraph.verify.proof import Proof

__all__ = [
    "CALIBRATION",
    "FINAL",
    "FORWARD",
    "TORCH",
    "Backend",
    "BackendError",
    "BmgraphError",
    "Context",
    "Delta",
    "Dims",
    "Editor",
    "Effect",
    "Engine",
    "Flops",
    "InputError",
    "InputKind",
    "Kind",
    "Lookup",
    "Measure",
    "MisplacedError",
    "ModelPass",
    "NodeRole",
    "Observed",
    "Operator",
    "OrderError",
    "OutputsMoved",
    "Pass",
    "PassError",
    "Program",
    "Proof",
    "Range",
    "Report",
    "ResourceError",
    "StepPass",
    "StepProgram",
    "Structure",
    "Target",
    "TensorSpec",
    "Traits",
    "VerificationError",
    "Weight",
    "WeightsMoved",
    "check_patterns",
    "deltas_of",
    "deployed",
    "evaluate",
    "exported_program",
    "find",
    "linears",
    "matches",
    "output_node",
    "placeholders",
    "products",
    "register_role",
    "tensor_nodes",
    "weight_of",
]
