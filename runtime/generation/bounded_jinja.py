"""Jinja templates of strangers: sandboxed, and bounded in what they spend.

A chat template comes with a model, from whoever made it. Jinja's sandbox keeps it from Python; it does not keep it from running
for ever, or from making a text that fills the memory. Here every turn of a loop, every call of a macro and every character that is
put together is counted, and what makes texts longer than its operands is either checked first or not there.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bmgraph.errors import InputError

LONGEST_TEMPLATE = 128 * 1024
"""Characters of a template. The longest in use have some 20,000."""

BUDGET = 4_000_000
"""What one text may spend: characters, and TURN for each turn of a loop or call of a macro."""

TURN = 40

LONGEST_RANGE = 10_000

FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int", "items", "last", "length",
    "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round", "safe", "select", "selectattr", "sort",
    "string", "title", "trim", "unique", "upper",
)  # fmt: skip
"""Jinja's own filters that give no more than they are given; `indent`, `join`, `replace` and `tojson` are ours."""

METHODS = (
    "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "isnumeric", "isspace", "join", "lower",
    "lstrip", "removeprefix", "removesuffix", "replace", "rfind", "rsplit", "rstrip", "split", "splitlines", "startswith",
    "strip", "title", "upper",
)  # fmt: skip
"""Methods of texts that templates may call."""

FAULTS = (
    TemplateError,
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
    MemoryError,
)
"""What a template may raise: its own errors, and those of Python on values that it does not take."""


class BoundedTemplate:
    """A template that is compiled once; raises InputError if it is too long or not valid.

    Example:
        >>> BoundedTemplate("{% for m in messages %}<{{ m.role }}>{% endfor %}").render({"messages": [{"role": "user"}]})
        '<user>'
    """

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST_TEMPLATE:
            raise InputError(
                f"the template has {len(text):,} characters: at most {LONGEST_TEMPLATE:,} are read"
            )
        self._environment = _Sandbox()
        try:
            tree = self._environment.parse(text)
            _count_spending(tree, self._environment)
            self._template = self._environment.from_string(tree)
        except FAULTS as error:
            raise InputError(f"the template is not valid: {_first_line(error)}") from error

    def render(self, values: Mapping[str, Any]) -> str:
        """The text for some values. Raises InputError if the template refuses them, fails, or spends more than BUDGET."""
        self._environment.begin()
        try:
            return self._template.render(values)
        except FAULTS as error:
            raise InputError(f"the template does not take this: {_first_line(error)}") from error


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation], optimized=False,
            finalize=self._written, cache_size=0,
        )  # fmt: skip
        self._spent = 0
        own = {
            "indent": self._indented,
            "join": self._joined_filter,
            "replace": self._replaced,
            "tojson": self._as_json,
        }
        self.filters = {name: self.filters[name] for name in FILTERS} | own
        self.globals = {
            "namespace": self.globals["namespace"],
            "dict": dict,
            "range": _range,
            "raise_exception": _refuse,
            "strftime_now": _now,
        }

    def begin(self) -> None:
        """Nothing is spent yet."""
        self._spent = 0

    def spend(self, count: int) -> str:
        """Count what is spent; raises SecurityError past BUDGET."""
        self._spent += count
        if self._spent > BUDGET:
            raise SecurityError("it repeats or makes too much")
        return ""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Of texts the METHODS, of numbers nothing."""
        if isinstance(obj, str):
            return attr in METHODS
        return not isinstance(obj, (int, float, bytes)) and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The operators by which values grow."""
        if operator == "**" or (operator == "%" and not isinstance(left, (int, float))):
            raise SecurityError(f"{operator} of these is not allowed")
        sizes = [len(item) for item in (left, right) if hasattr(item, "__len__")]
        if operator == "*" and sizes:
            raise SecurityError("only numbers are multiplied")
        self.spend(sum(sizes) + 1)
        found = super().call_binop(context, operator, left, right)
        if isinstance(found, int) and abs(found) >= 2**63:
            raise SecurityError("a number is too large")
        return found

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls of methods by which texts grow."""
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            return self._replaced(owner, *args, **kwargs)
        if isinstance(owner, str) and name == "join":
            return self._joined_filter(args[0], owner)
        return super().call(context, obj, *args, **kwargs)  # type: ignore[misc]

    def _written(self, value: Any) -> Any:
        """What an expression writes."""
        text = value if isinstance(value, str) else str(value)
        self.spend(len(text))
        return text

    def concatenated(self, *items: Any) -> str:
        """The texts of values one after the other."""
        texts = [str(item) for item in items]
        self.spend(sum(map(len, texts)))
        return "".join(texts)

    def _joined_filter(self, items: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
        found = items if attribute is None else (self.getitem(item, attribute) for item in items)
        texts: list[str] = []
        for item in found:
            texts.append(str(item))
            self.spend(len(texts[-1]) + len(d))
        return d.join(texts)

    def _replaced(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        given = str(text)
        self.spend(len(given) + given.count(old) * len(new))
        return given.replace(old, new, -1 if count is None else count)

    def _indented(self, text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
        prefix = " " * min(max(int(width), 0), 64)
        lines = text.splitlines()
        self.spend(len(text) + len(lines) * len(prefix))
        return "\n".join(
            prefix + line if (index or first) and (line or blank) else line
            for index, line in enumerate(lines)
        )

    def _as_json(self, value: Any, indent: int | None = None, **options: Any) -> str:
        width = None if indent is None else min(max(int(indent), 0), 16)
        text = json.dumps(
            value,
            indent=width,
            ensure_ascii=bool(options.get("ensure_ascii")),
            sort_keys=bool(options.get("sort_keys")),
        )
        self.spend(len(text))
        return text


class _Generation(Extension):
    """`{% generation %}`, by which some templates mark what an assistant says: its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _count_spending(tree: nodes.Template, environment: Environment) -> None:
    """Let each turn of a loop and each call of a macro be counted, with the text that stands in it, and concatenations."""
    for kind in (nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock):
        for node in tree.find_all(kind):
            literal = sum(len(item.data) for item in node.find_all(nodes.TemplateData))
            call = _call("spend", [nodes.Const(TURN + literal)])
            node.body.insert(0, nodes.ExprStmt(call))  # type: ignore[attr-defined]
    for parent in list(_walk(tree)):
        for name, value in parent.iter_fields():
            if isinstance(value, list):
                setattr(parent, name, list(map(_counted, value)))
            else:
                setattr(parent, name, _counted(value))
    tree.set_environment(environment)
    tree.set_lineno(1)


def _walk(node: nodes.Node) -> Iterator[nodes.Node]:
    """All below a node, and the node itself."""
    for child in node.iter_child_nodes():
        yield from _walk(child)
    yield node


def _counted(value: Any) -> Any:
    return _call("concatenated", value.nodes) if isinstance(value, nodes.Concat) else value


def _call(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
    """A call of a method of the sandbox, by no name that a template could change."""
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


def _range(*args: int) -> range:
    found = range(*args)
    if len(found) > LONGEST_RANGE:
        raise SecurityError(f"a range has at most {LONGEST_RANGE:,} numbers")
    return found


def _refuse(message: str) -> NoReturn:
    raise TemplateError(str(message)[:500])


def _now(form: str) -> str:
    if len(form) > 100:
        raise SecurityError("the format of a time is too long")
    return datetime.datetime.now().strftime(form)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
