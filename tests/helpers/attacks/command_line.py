"""Odd invocations of the command line on odd folders: each ends with exit code 0 or 2, and at most one clean line of error.

`attack(names, folder)` runs them, each in a forked process of its own, and gives what was wrong with each; "" if nothing.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.helpers.bundles import edit_json, sign, toy
from tests.helpers.hf_folders import SMALL, saved_folder

SECONDS = 120
"""How long an invocation may take."""

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
EVIL = "\x1b[2J\x1b]0;owned\x07\u202e[red]\u2028x"
"""A name that wipes the screen, sets the window's title and turns the text around, where it is printed as it is."""

SOURCE = """
import torch
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()), {"input": torch.randn(4, 8)}
def nothing():
    return None
def raising():
    raise RuntimeError("first line\\nsecond \\x1b[2J line [/red] [bold]")
def leaving():
    raise SystemExit("left")
def stopping():
    raise StopIteration
class Panic(BaseException):
    pass
def panicking():
    raise Panic("a panic")
def deep():
    return deep()
def greedy():
    return torch.empty(2**50)
def failing():
    class Failing(torch.nn.Module):
        def forward(self, x):
            raise KeyError("\\x1b[31m")
    return Failing(), {"x": torch.ones(2, 2)}
"""


@dataclass
class Ended:
    """How an invocation ended; `code` is below 0 for a signal."""

    code: int
    output: str
    error: str


@dataclass
class Invocation:
    """Arguments, and what else surrounds a process."""

    arguments: list[str]
    output: str = "a file"  # or a path to write the output to
    before: Callable[[], None] = lambda: None
    environment: dict[str, str] = field(default_factory=dict)
    code: int | None = None
    """The exit code that it must end with; 0 or 2 if None."""


class Place:
    """A folder for one invocation, and a bundle, a model's folder and a module to start from, made once."""

    def __init__(self, materials: Path, folder: Path) -> None:
        self.materials, self.folder = materials, folder
        (folder / "mine.py").write_text(SOURCE)

    def program(self, change: Callable[[Any], None] | None = None, name: str = "bundle") -> Path:
        """A saved program, with `change` made to its JSON and signed again."""
        folder = self.folder / name
        shutil.copytree(_made(self.materials / "program", _save_program), folder)
        if change is not None:
            for file in folder.glob("*.json"):
                if file.name != "manifest.json":
                    edit_json(file, change)
            sign(folder)
        return folder

    def model(self, **config: Any) -> Path:
        """A Hugging Face folder, with other values in its config."""
        folder = self.folder / "model"
        shutil.copytree(_made(self.materials / "model", _save_model), folder)
        if config:
            edit_json(folder / "config.json", lambda found: {**found, **config})
        return folder

    def few_words(self) -> Path:
        """A Hugging Face folder whose tokenizer has more words than its model."""
        return saved_folder(
            self.folder / "few", "LlamaForCausalLM", {**SMALL, "vocab_size": 5}, tokenizer=True
        )

    def file(self, name: str, data: bytes = b"") -> Path:
        """A file with some bytes."""
        (self.folder / name).write_bytes(data)
        return self.folder / name

    def device(self, name: str) -> Path:
        """A device of our own, which the system does not miss if it is replaced; a pipe where we may make none."""
        try:
            os.mknod(self.folder / name, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except OSError:
            return self.fifo(name)
        return self.folder / name

    def fifo(self, name: str) -> Path:
        """A pipe that nobody writes to."""
        os.mkfifo(self.folder / name)
        return self.folder / name


def _made(path: Path, make: Callable[[Path], object]) -> Path:
    if not path.exists():
        make(path)
    return path


def _save_program(path: Path) -> None:
    toy().save(str(path))


def _save_model(path: Path) -> None:
    saved_folder(path, "LlamaForCausalLM", SMALL, tokenizer=True)


def _renamed(new: str) -> Callable[[Any], Any]:
    """Rename the input of a program, wherever its JSON names it."""

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: change(item) for key, item in value.items()}
        if isinstance(value, list):
            return [change(item) for item in value]
        return new if value == "ids" else value

    return change


def _said(text: str) -> Callable[[Any], Any]:
    """Put a text wherever a program's JSON holds one that is printed and not checked: module paths, notes."""

    def change(value: Any) -> None:
        value.update(fixed=[text], training=text)
        for node in value["graphs"]["forward"]:
            if "scope" in node.get("meta", {}):
                node["meta"]["scope"] = text

    return change


def _cut(folder: Path, name: str) -> Path:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    return folder


def _written(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder


def _without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def _small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def _ids(values: list[list[int]], name: str = "ids") -> bytes:
    from safetensors.torch import save

    return save({name: torch.tensor(values)})


Case = Callable[[Place], Invocation]


def _run(make: Callable[[Place], list[Any]], **options: Any) -> Case:
    return lambda place: Invocation([str(item) for item in make(place)], **options)


COMPILE = ["--out", "out", "--backend", "torch"]
LONG = "n" * 300

CASES: dict[str, Case] = {
    "run: a name of 300 letters": _run(lambda p: ["run", LONG], code=2),
    "run: a path of 300 folders": _run(lambda p: ["run", "a/" * 3000], code=2),
    "inspect: a name of 300 letters": _run(lambda p: ["inspect", LONG], code=2),
    "compile: a name of 300 letters": _run(lambda p: ["compile", LONG, *COMPILE], code=2),
    "compile: --out of 300 letters": _run(lambda p: ["compile", "mine:make", "--out", LONG], code=2),
    "run: a name with a null": _run(lambda p: ["run", "a\udc80\udcff"], code=2),
    "run: markup in a name": _run(lambda p: ["run", "[red]x[/blue][/]"], code=2),
    "run: a steering name": _run(lambda p: ["run", EVIL], code=2),
    "an unknown command": _run(lambda p: ["\x1b[2J"], code=2),
    "an unknown option": _run(lambda p: ["run", "--\x1b[2Jx"], code=2),
    "no argument": _run(lambda p: ["run"], code=2),
    "a number that is none": _run(lambda p: ["bench", "x", "--runs", "\x1b[31m"], code=2),
    "run: a file": _run(lambda p: ["run", p.file("file")], code=2),
    "run: a pipe": _run(lambda p: ["run", p.fifo("pipe")], code=2),
    "run: a device": _run(lambda p: ["run", "/dev/zero"], code=2),
    "run: a truncated bundle": _run(lambda p: ["run", _cut(p.program(), "manifest.json")], code=2),
    "run: truncated tensors": _run(lambda p: ["run", _cut(p.program(), "weights.safetensors")], code=2),
    "run: ids out of range": _run(
        lambda p: ["run", p.program(), "--inputs", p.file("x.safetensors", _ids([[99]]))], code=2
    ),
    "run: an unknown, steering input": _run(
        lambda p: ["run", p.program(), "--inputs", p.file("x.safetensors", _ids([[1]], EVIL.replace("\u2028", "")))], code=2
    ),
    "run: inputs from a pipe": _run(lambda p: ["run", p.program(), "--inputs", p.fifo("pipe")], code=2),
    "run: inputs that are noise": _run(
        lambda p: ["run", p.program(), "--inputs", p.file("x.safetensors", b"\xff" * 99)], code=2
    ),
    "run: --output to a device": _run(lambda p: ["run", p.program(), "--output", p.device("null")], code=2),
    "run: --output to a pipe": _run(lambda p: ["run", p.program(), "--output", p.fifo("pipe")], code=2),
    "run: --output to a folder": _run(lambda p: ["run", p.program(), "--output", p.folder], code=2),
    "run: --output to nowhere": _run(lambda p: ["run", p.program(), "--output", "no/where"], code=2),
    "run: --output to a full disk": _run(
        lambda p: ["run", p.program(), "--output", "large"], before=_small_files, code=2
    ),
    "run: a full output": _run(lambda p: ["run", p.program()], output="/dev/full", code=2),
    "run: an ASCII terminal": _run(lambda p: ["run", p.program(name="ä")], environment={"PYTHONIOENCODING": "ascii"}),
    "inspect: a steering name of an input": _run(lambda p: ["inspect", p.program(_renamed("a\x1b[2J"))], code=2),
    "inspect: steering scopes": _run(lambda p: ["inspect", "--text", p.program(_said("a\x1b[2J\x9b"))], code=2),
    "inspect: markup in scopes": _run(lambda p: ["inspect", "--text", p.program(_said("[/red][bold]"))], code=0),
    "inspect: lone surrogates in scopes": _run(lambda p: ["inspect", "--text", p.program(_said("\ud800\u202e"))], code=2),
    "bench: --out to a device": _run(lambda p: ["bench", p.program(), "--out", p.device("null")], code=2),
    "compile: --out to a folder of others": _run(lambda p: ["compile", "mine:make", "--out", p.folder], code=2),
    "compile: a function without a model": _run(lambda p: ["compile", "mine:nothing", *COMPILE], code=2),
    "compile: a function that raises": _run(lambda p: ["compile", "mine:raising", *COMPILE], code=2),
    "compile: a function that leaves": _run(lambda p: ["compile", "mine:leaving", *COMPILE], code=2),
    "compile: a function that panics": _run(lambda p: ["compile", "mine:panicking", *COMPILE], code=2),
    "compile: a function without an end": _run(lambda p: ["compile", "mine:deep", *COMPILE], code=2),
    "compile: a function that needs all memory": _run(lambda p: ["compile", "mine:greedy", *COMPILE], code=2),
    "compile: a forward that raises": _run(lambda p: ["compile", "mine:failing", *COMPILE], code=2),
    "compile: a module that is no name": _run(lambda p: ["compile", "..\x1b[2J:x", *COMPILE], code=2),
    "compile: a gguf file that is none": _run(lambda p: ["compile", p.file("x.gguf", b"GGUF\x03"), *COMPILE], code=2),
    "compile: passes that are none": _run(lambda p: ["compile", "mine:make", "--passes", "\x1b[2J{", *COMPILE], code=2),
    "compile: a folder without weights": _run(
        lambda p: ["compile", _without(p.model(), "model.safetensors"), *COMPILE], code=2
    ),
    "compile: a folder with half the weights": _run(
        lambda p: ["compile", _cut(p.model(), "model.safetensors"), *COMPILE], code=2
    ),
    "compile: a config that is deep": _run(
        lambda p: ["compile", _written(p.model(), "config.json", b"[" * 200_000), *COMPILE], code=2
    ),
    "compile: a config of another kind": _run(lambda p: ["compile", p.model(hidden_size="\x1b[2J"), *COMPILE], code=2),
    "compile: a config that names a steering class": _run(
        lambda p: ["compile", p.model(architectures=[EVIL]), *COMPILE], code=2
    ),
    "compile: a config that names no model": _run(
        lambda p: ["compile", p.model(architectures=["logging"]), *COMPILE], code=2
    ),
    "compile: a vocabulary below the tokenizer's": _run(lambda p: ["compile", p.model(vocab_size=5), *COMPILE], code=2),
    "compile: a tokenizer of more words than the model": _run(lambda p: ["compile", p.few_words(), *COMPILE]),
    "compile: a tokenizer that is noise": _run(
        lambda p: ["compile", _written(p.model(), "tokenizer.json", b"{\x00"), *COMPILE], code=2
    ),
    "compile: a full temporary folder": _run(
        lambda p: ["compile", "mine:make", "--out", "out"], before=_small_files, code=2
    ),
    "compile: calibration from a pipe": _run(
        lambda p: ["compile", p.model(), "--calibration", p.fifo("pipe"), *COMPILE], code=2
    ),
    "generate: a program": _run(lambda p: ["generate", p.program(), "x\udcff"], code=2),
}  # fmt: skip
"""Name of an invocation -> what it is made of. Functions of `mine` are those of `SOURCE`."""


def invoke(invocation: Invocation, cwd: Path) -> Ended:
    """Run the command line in a forked process, which has the imports of this one."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "output", Path(folder) / "error"]
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            code = 1
            try:
                code = _in_child(invocation, cwd, paths)
            finally:
                os._exit(code)  # whatever happened: the folders are the parent's to remove
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [
            path.read_text(encoding="utf-8", errors="replace") if path.exists() else "" for path in paths
        ]
    return Ended(code, *texts)


def _in_child(invocation: Invocation, cwd: Path, paths: list[Path]) -> int:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    places = [paths[0] if invocation.output == "a file" else Path(invocation.output), paths[1]]
    for number, path in enumerate(places, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    encoding = invocation.environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(  # noqa: SIM115
        2, "w", encoding=encoding, errors="backslashreplace", buffering=1, closefd=False
    )
    os.chdir(cwd)
    os.environ.update(invocation.environment)
    sys.argv = ["bmgraph", *invocation.arguments]
    invocation.before()
    code = 1
    try:
        from bmgraph.cli.main import main

        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def fault(invocation: Invocation, ended: Ended) -> str:
    """What is wrong with how an invocation ended; "" if nothing is."""
    lines = ended.error.splitlines()
    wrong = {
        f"exit code {ended.code}": ended.code not in ((0, 2) if invocation.code is None else (invocation.code,)),
        f"{len(lines)} lines of error": len(lines) != (ended.code == 2),
        "a traceback": "Traceback" in ended.error + ended.output,
        "control characters": STEERING.search(ended.error + ended.output) is not None,
    }  # fmt: skip
    found = ", ".join(what for what, is_so in wrong.items() if is_so)
    return f"{found}: {ended.error[-300:]!a}" if found else ""


def attack(names: list[str], folder: Path) -> dict[str, str]:
    """What was wrong with each invocation; "" where nothing was."""
    found = {}
    for index, name in enumerate(names):
        place = folder / f"{index}"
        place.mkdir(parents=True)
        invocation = CASES[name](Place(folder, place))
        found[name] = fault(invocation, invoke(invocation, place))
    return found
