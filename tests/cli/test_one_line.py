"""Whatever goes wrong in a command is one clean line and exit code 2; output files are written whole, over files alone."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from bmgraph.cli.console import CleanConsole, clean, one_line
from bmgraph.cli.one_line import Debug, exit_code_of
from bmgraph.cli.output_file import check_output_folder, write_output
from bmgraph.errors import InputError
from tests.helpers.attacks import command_line
from tests.helpers.attacks.command_line import CASES, EVIL, STEERING, Invocation, Place, fault, invoke
from tests.helpers.paths import ROOT

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

TRIED = (
    "run: a name of 300 letters",
    "run: markup in a name",
    "run: a steering name",
    "an unknown command",
    "no argument",
    "run: ids out of range",
    "run: --output to a device",
    "run: --output to a pipe",
    "run: --output to a full disk",
    "run: a full output",
    "run: an ASCII terminal",
    "inspect: steering scopes",
    "inspect: markup in scopes",
    "inspect: lone surrogates in scopes",
    "compile: a function that raises",
    "compile: a function that leaves",
    "compile: a function that panics",
    "compile: calibration from a pipe",
)
"""Those of the attacks that were not held and take less than a second; benchmarks/attacks.py tries all."""


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("materials")


@forks
@pytest.mark.parametrize("name", TRIED)
def test_odd_invocations_end_in_one_line(name: str, materials: Path, tmp_path: Path) -> None:
    invocation = CASES[name](Place(materials, tmp_path))
    assert fault(invocation, invoke(invocation, tmp_path)) == ""


@forks
def test_the_attack_sees_what_is_wrong(tmp_path: Path) -> None:
    wrong = Invocation(["passes"], before=lambda: print("\x1b[2J", file=sys.stderr, flush=True))
    assert fault(wrong, invoke(wrong, tmp_path)).startswith("1 lines of error, control characters")
    assert len(command_line.CASES) >= 40


@forks
def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    place = Place(tmp_path, tmp_path)
    assert place.folder.is_dir()
    for arguments, environment in ((["--debug"], {}), ([], {"BMGRAPH_DEBUG": "1"})):
        asked = Invocation([*arguments, "compile", "mine:raising", "--out", "out"], environment=environment)
        ended = invoke(asked, tmp_path)
        assert ended.code == 2
        assert "Traceback" in ended.error
        assert "in raising" in ended.error
        assert not STEERING.search(ended.error)


def test_an_interrupt_is_130_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, signal\ndef make():\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts behind\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "bmgraph", "compile", "mine:make", "--out", "out"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "")


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "bmgraph", "passes"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=300, check=False
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def printed(*items: object, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    CleanConsole(file=stream, width=200, force_terminal=False).print(*items)
    stream.seek(0)
    return stream.read()


def test_nothing_that_is_printed_steers_a_terminal() -> None:
    table = Table(EVIL, title=EVIL)
    table.add_row(Text(EVIL))
    for item in (EVIL, Text(EVIL), table, {EVIL: EVIL}):
        assert not STEERING.search(printed(item)), item
    assert printed("[red]x[/blue] :smile:") == "[red]x[/blue] :smile:\n"
    assert printed("é\ud800", encoding="ascii") == "\\xe9\\ud800\n"
    assert clean("tab\tand\nlines, é, 字, 👩‍🚀") == "tab\tand\nlines, é, 字, 👩‍🚀"
    assert clean(clean(EVIL)) == clean(EVIL)
    assert one_line("a\n\tb \r\n c") == "a b c"
    assert len(one_line("x" * 10**6)) < 2100


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(28, "No space left on device", "/tmp/x"),
            "/tmp/x: No space left on device: free some space",
        ),
        (PermissionError(13, "Permission denied", b"/etc/x"), "/etc/x: Permission denied"),
        (MemoryError(), "there is not enough memory"),
        (RuntimeError("one\ntwo"), "RuntimeError: one two (to see where: bmgraph --debug"),
        (GeneratorExit(), "GeneratorExit (to see where"),
        (InputError("as it is [/x]"), "as it is [/x]"),
    ],
)
def test_an_error_of_any_kind_is_told(
    error: BaseException, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    assert exit_code_of(command, Debug()) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {message}")
    assert len(told.splitlines()) == 1


def test_an_output_replaces_files_alone_and_whole(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("before")
    file.chmod(0o640)
    link.symlink_to(file)

    def after(path: Path) -> None:
        path.write_text("after")

    (tmp_path / ".file-bmgraph-abcdefgh").mkdir()  # as a killed writer leaves it
    write_output(link, after)
    assert not (tmp_path / ".file-bmgraph-abcdefgh").exists()
    assert (file.read_text(), file.stat().st_mode & 0o777, link.is_symlink()) == ("after", 0o640, True)

    def full(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"cannot be written: No space left on device; nothing was changed"):
        write_output(file, full)
    assert file.read_text() == "after"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "link"]
    mask = os.umask(0o027)
    try:
        write_output(tmp_path / "new", after)
    finally:
        os.umask(mask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    with pytest.raises(InputError, match="is a folder with other contents: give a new name, or a bundle"):
        check_output_folder(tmp_path)
