"""The tables of deltas of which each row of a batch gathers its own: found in a program, and described apart from it, so that an
engine can put other deltas into their entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from bmgraph.analysis.weight_sites import site_path, weight_of
from bmgraph.deltas.delta_calls import changed_linear
from bmgraph.deltas.linear_family import LinearFamily
from bmgraph.deltas.registry import families
from bmgraph.errors import BundleError
from bmgraph.ir.computation import Computation
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.node_role import ends_delta, is_delta, role_of
from bmgraph.ir.program import Program, tensor_nodes
from bmgraph.ops.trait_row import Dims, Kind
from bmgraph.ops.traits import traits_of
from bmgraph.utils.digest import digest


@dataclass(frozen=True)
class RowTable:
    """One table [deltas + 1, ...]: the parameter that holds it, and whose tensors `key` its entries are.

    `modules`: paths of the modules whose deltas it takes; none where a pass has replaced their linear.
    """

    name: str
    family: str
    key: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class RowTables:
    """All tables of a program. `input` chooses among the entries; `names` are those of the entries 1, 2, ..., "" for a free one.

    `alike`: digests of tensors and values of options, by "family.key", that all their deltas have alike. `broadcasts`: whether one
    choice may stand for all rows. `backbone`, `computation`: of the model that deltas must have been trained on.
    """

    input: str
    names: tuple[str, ...]
    tables: tuple[RowTable, ...]
    alike: Mapping[str, str] = field(default_factory=dict)
    broadcasts: bool = False
    backbone: str = ""
    computation: Computation = field(default_factory=Computation)

    def as_json(self) -> dict[str, Any]:
        """As values of JSON, without the computation."""
        return {
            "input": self.input,
            "names": list(self.names),
            "tables": [[item.name, item.family, item.key, list(item.modules)] for item in self.tables],
            "alike": dict(self.alike),
            "broadcasts": self.broadcasts,
            "backbone": self.backbone,
        }

    @staticmethod
    def from_json(data: Any, computation: Computation) -> RowTables:
        """The inverse of `as_json`; raises BundleError for other data."""
        try:
            tables = tuple(
                RowTable(_text(name), _text(family), _text(key), tuple(map(_text, modules)))
                for name, family, key, modules in data["tables"]
            )
            return RowTables(
                _text(data["input"]), tuple(map(_text, data["names"])), tables,
                {_text(key): _text(value) for key, value in data["alike"].items()}, data["broadcasts"] is True,
                _text(data["backbone"]), computation,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"the manifest does not describe the engine's deltas: {error}") from error


def find_row_tables(program: Program) -> RowTables | None:
    """The tables of which rows of a program choose; None without any."""
    entries = program.entries()
    choices = {spec.name: spec for entry in entries for spec in entry.inputs if spec.kind is InputKind.CHOICE}
    known = {
        role: family for family in families() if isinstance(family, LinearFamily) for role in family.roles
    }
    in_front = {role: family for family in families() for role in family.table_keys}
    found: dict[str, RowTable] = {}
    alike: dict[str, str] = {}
    broadcasts, chosen_by = True, ""
    for entry in entries:
        for gather in entry.graph.nodes:
            if (
                gather.op == "placeholder" and gather.target in choices
            ):  # one that sizes are read of is no choice alone
                broadcasts = broadcasts and all(_gathers(user, choices) for user in gather.users)
            if not _gathers(gather, choices):
                continue
            reader = gather.args[0]
            front, family = in_front.get(role_of(reader)), known.get(role_of(gather))
            if front is not None:
                chosen_by, broadcasts = str(gather.args[2].target), False
                key, place = front.table_keys[role_of(reader)], str(gather.meta.get("site"))
                found[str(reader.target)] = RowTable(str(reader.target), front.name, key, (place,))
            if family is None:
                continue
            chosen_by = str(gather.args[2].target)
            nodes = _until_total(gather)
            broadcasts = broadcasts and all(map(_broadcasts, nodes))
            name, site = str(reader.target), str(gather.meta.get("site"))
            key = _key(family, site, name)
            found[name] = RowTable(name, family.name, key, _modules(program, site, gather, nodes))
            options = family.options_of_rows(nodes)
            alike |= {f"{family.name}.{option}": str(value) for option, value in options.items()}
    if not found:
        return None
    alike |= _alike_tensors(program, {item.family for item in found.values()})
    count = min(len(program.tensor(name)) for name in found) - 1
    names = choices[chosen_by].names
    return RowTables(
        chosen_by, (*names, *[""] * (count - len(names))), tuple(found.values()), alike, broadcasts,
        program.fingerprint, program.computation,
    )  # fmt: skip


def _gathers(node: fx.Node, choices: Mapping[str, Any]) -> bool:
    """Whether a node gathers the entries of a table that rows choose."""
    if node.op != "call_function" or traits_of(node).dims is not Dims.INDEX_SELECT:
        return False
    table, index = node.args[0], node.args[2]
    tabled = isinstance(table, fx.Node) and table.op == "get_attr"
    return tabled and isinstance(index, fx.Node) and index.op == "placeholder" and index.target in choices


def _until_total(gather: fx.Node) -> list[fx.Node]:
    """The calls of a delta that depend on what was gathered, up to its total."""
    found: dict[fx.Node, None] = {}
    waiting = list(gather.users)
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found[node] = None
        if is_delta(node) and not ends_delta(node):
            waiting += node.users
    return list(found)


def _broadcasts(node: fx.Node) -> bool:
    """Whether a call treats one row of what was gathered as it treats the same row many times."""
    row = traits_of(node)
    if row.dims in (Dims.ELEMENTWISE, Dims.MATMUL) or row.kind is Kind.CAST:
        return True
    inserted = row.kind in (Kind.LAYOUT, Kind.RESHAPE) and len(node.args) == 2
    return inserted and type(node.args[1]) is int and node.args[1] != 0


def _key(family: LinearFamily, site: str, name: str) -> str:
    """The key of a table, which ends its name; a name that was taken has a number behind it."""
    end = name.removeprefix(f"{site}_deltas_")
    start = end.rpartition("_")[0]
    return start if end not in family.keys and start in family.keys else end


def _modules(program: Program, site: str, gather: fx.Node, nodes: list[fx.Node]) -> tuple[str, ...]:
    """The paths of the modules whose linear a delta changes; none where the linear is not that of the model any more."""
    total = next((node for node in nodes if ends_delta(node)), None)
    if total is None:
        return ()
    linear = changed_linear(total)
    weight = weight_of(program, linear) if traits_of(linear).kind is Kind.LINEAR else None
    if weight is None or weight.site != site:
        return ()
    paths = [site_path(site), *(site_path(alias) for alias, name in program.ties.items() if name == site)]
    own = [path for path in paths if path == gather.meta.get("scope")]
    return tuple(own if len(paths) > 1 and own else paths)


def _alike_tensors(program: Program, names: set[str]) -> dict[str, str]:
    """Digests of the tensors that all deltas of a family have, by "family.key"."""
    found: dict[str, str] = {}
    for family in families():
        for key in family.alike if isinstance(family, LinearFamily) and family.name in names else ():
            for entry in program.entries():
                for name in tensor_nodes(entry.graph):
                    if name.startswith(f"{family.name}_deltas_{key}"):
                        found[f"{family.name}.{key}"] = digest(program.tensor(name))
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, found {str(value)[:80]!r}")
    return value
