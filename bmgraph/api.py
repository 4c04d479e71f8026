"""What authors of passes, operators, deltas and backends import; these names stay when inner modules move.

docs/writing_passes.md and docs/extending.md have a complete example of each.

- a pass: `ModelPass`, `StepPass` (`Pass`: either), `Effect`, `FINAL`, `FOR_ENGINES`, `Context` (with `CALIBRATION`, the name of that
  resource, and `LayerPart`, a part of the graph in layer-wise calibration), `Proof`, what it is held to (`Measure`, `WeightsMoved`,
  `OutputsMoved`), and the errors it raises
- the program that it rewrites: `Program`, `Editor`, `NodeRole` (with `register_role`, for a role of your own), `TensorSpec`,
  `Range`, `InputKind`, `FORWARD`, `output_node`, `placeholders`, `tensor_nodes`
- sites: `find` and the `Structure` that it gives, `linears`, `products`, `weight_of`, `Weight`, `matches`, `check_patterns`
- values: `evaluate` (an expression of parameters), `Observed` (a run that shows the values of nodes)
- deltas: `deltas_of` and the `Delta` that it gives; a family of them: `DeltaFamily`, or `LinearFamily` for deltas on
  linears, with `Change`, `Part`, `Saved`, `DeltaCalls`, `delta_base`, `delta_input`, `delta_role`, `Edit`, `of_no_family`,
  `plain_saved`, `plain_loaded`; a pass that attaches one: `NewDelta`, `attach_all`, `backbone_of`, `freeze_backbone`,
  `check_backbone_frozen`, `with_changed_weights`, `module_tensors`, `train_whole`
- an operator: `Operator` with its `Traits` (`Kind`, `Dims`, `Lookup`, `Flops`), see `bmgraph.ops.outside`
- what a pass of the step stage rewrites: `StepProgram`; where its tensors live: `Place`, `Update`
- a backend: `Backend`, `Engine`, `Target`, `TORCH`, `Report`, `PassManager` (runs passes of later stages), `deployed` (the
  eval form, ready to lower), `exported_program` (for torch's exporters)
- an engine that is saved and loaded: `Bundle`, `Description`, `write_bundle`, `describe` and `read_description` (what every
  manifest says), `write_tensors`, `read_tensors`
"""

from __future__ import annotations

from bmgraph.analysis.interpreter import Observed, evaluate
from bmgraph.analysis.site_filter import check_patterns, matches
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.sites import Structure
from bmgraph.analysis.weight_sites import Weight, linears, products, weight_of
from bmgraph.backends.backend_base import Backend
from bmgraph.deltas.backbone import backbone_of, check_backbone_frozen, freeze_backbone
from bmgraph.deltas.changed_weights import with_changed_weights
from bmgraph.deltas.delta_calls import DeltaCalls, delta_base, delta_input
from bmgraph.deltas.family import Change, Delta, DeltaFamily, Part, Saved
from bmgraph.deltas.linear_family import LinearFamily, NewDelta, attach_all, of_no_family
from bmgraph.deltas.plain_format import plain_loaded, plain_saved
from bmgraph.deltas.registry import deltas_of
from bmgraph.deltas.whole_modules import module_tensors, train_whole
from bmgraph.errors import (
    BackendError,
    BmgraphError,
    BundleError,
    InputError,
    MisplacedError,
    OrderError,
    PassError,
    ResourceError,
    VerificationError,
)
from bmgraph.ir.editor import Editor
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.node_role import NodeRole, delta_role, register_role
from bmgraph.ir.pass_record import Edit
from bmgraph.ir.program import FORWARD, Program, output_node, placeholders, tensor_nodes
from bmgraph.ir.tensor_spec import Range, TensorSpec
from bmgraph.lowering.to_exported_program import deployed, exported_program
from bmgraph.ops.outside import Operator
from bmgraph.ops.trait_row import Dims, Flops, Kind, Lookup, Traits
from bmgraph.pass_manager.context import CALIBRATION, Context
from bmgraph.pass_manager.layer_calibration import LayerPart
from bmgraph.pass_manager.pass_base import FINAL, FOR_ENGINES, Effect, ModelPass, Pass, StepPass
from bmgraph.pass_manager.pass_manager import PassManager
from bmgraph.pass_manager.report import Report
from bmgraph.pass_manager.target import TORCH, Target
from bmgraph.runtime.engine_base import Engine
from bmgraph.runtime.manifest import Description, describe, read_description
from bmgraph.serialize.bundle import Bundle, write_bundle
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors
from bmgraph.training.placement import Place, Update
from bmgraph.training.step_program import StepProgram
from bmgraph.verify.measures import Measure, OutputsMoved, WeightsMoved
from bmgraph.verify.proof import Proof

__all__ = [
    "CALIBRATION",
    "FINAL",
    "FORWARD",
    "FOR_ENGINES",
    "TORCH",
    "Backend",
    "BackendError",
    "BmgraphError",
    "Bundle",
    "BundleError",
    "Change",
    "Context",
    "Delta",
    "DeltaCalls",
    "DeltaFamily",
    "Description",
    "Dims",
    "Edit",
    "Editor",
    "Effect",
    "Engine",
    "Flops",
    "InputError",
    "InputKind",
    "Kind",
    "LayerPart",
    "LinearFamily",
    "Lookup",
    "Measure",
    "MisplacedError",
    "ModelPass",
    "NewDelta",
    "NodeRole",
    "Observed",
    "Operator",
    "OrderError",
    "OutputsMoved",
    "Part",
    "Pass",
    "PassError",
    "PassManager",
    "Place",
    "Program",
    "Proof",
    "Range",
    "Report",
    "ResourceError",
    "Saved",
    "StepPass",
    "StepProgram",
    "Structure",
    "Target",
    "TensorSpec",
    "Traits",
    "Update",
    "VerificationError",
    "Weight",
    "WeightsMoved",
    "attach_all",
    "backbone_of",
    "check_backbone_frozen",
    "check_patterns",
    "delta_base",
    "delta_input",
    "delta_role",
    "deltas_of",
    "deployed",
    "describe",
    "evaluate",
    "exported_program",
    "find",
    "freeze_backbone",
    "linears",
    "matches",
    "module_tensors",
    "of_no_family",
    "output_node",
    "placeholders",
    "plain_loaded",
    "plain_saved",
    "products",
    "read_description",
    "read_tensors",
    "register_role",
    "tensor_nodes",
    "train_whole",
    "weight_of",
    "with_changed_weights",
    "write_bundle",
    "write_tensors",
]
