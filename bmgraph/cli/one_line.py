"""Runs a command: whatever goes wrong ends as one line on the error stream, and an exit code."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from bmgraph.cli.console import BROKEN_PIPE, CleanConsole, clean, discard_output, one_line
from bmgraph.errors import BmgraphError

FAILED, INTERRUPTED = 2, 130
"""Exit codes of a command that failed, and of one that the user stopped (as of one that SIGINT (2) ends)."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Debug:
    """Whether the user asked to see where an error comes from, and what libraries say; set once options are read."""

    on: bool = False


def exit_code_of(command: Callable[[], object], debug: Debug) -> int:
    """Run a command; returns the exit code: its own if it returns one, else 0.

    An exception of any kind is printed as one line; with debug, its traceback comes first.
    """
    try:
        found = command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        discard_output()
        return BROKEN_PIPE
    except SystemExit:
        raise
    except BaseException as error:  # the last frame; panics of Rust libraries are not Exceptions
        _tell(error, debug.on)
        return FAILED
    return found if isinstance(found, int) else 0


def _tell(error: BaseException, with_traceback: bool) -> None:
    if isinstance(error, OSError) and error.errno in _FULL:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        discard_output()  # what could not be written now would raise again at exit
    console = CleanConsole(stderr=True, soft_wrap=True)
    with suppress(OSError):  # the error stream may be full or closed, too
        if with_traceback:
            console.print(clean("".join(traceback.format_exception(error))))
        text = describe(error)
        if text:
            console.print("[red]error:[/] ", end="", markup=True)
            console.print(one_line(text))


def describe(error: BaseException) -> str:
    """What a user reads of an error; empty if it has been told already."""
    told = getattr(error, "format_message", None)  # errors of the command line's own syntax
    if callable(told):
        text = str(told())
        return f"{text.rstrip('.')}; see: bmgraph --help" if text else ""
    if isinstance(error, BmgraphError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        advice = ": free some space, or have TMPDIR name a folder with more" if error.errno in _FULL else ""
        return f"{where}{error.strerror}{advice}"
    if isinstance(error, MemoryError):
        return "there is not enough memory: take a smaller model or example, or a machine with more"
    text = str(error).strip()
    return f"{type(error).__name__}{': ' if text else ''}{text} (to see where: bmgraph --debug COMMAND ...)"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide what libraries write beside us: warnings, logs, and what native code writes to the error stream.

    It is not ours to clean, may hold names from files, and would surround the one line that counts.
    """
    level, unraisable = logging.root.manager.disable, sys.unraisablehook
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda found: None
    try:
        with warnings.catch_warnings(), _native_errors_hidden():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        sys.unraisablehook = unraisable


@contextmanager
def _native_errors_hidden() -> Iterator[None]:
    """Lead file descriptor 2 nowhere; `sys.stderr` still leads where it did."""
    stderr = sys.stderr
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        if stderr is not None and stderr.fileno() == 2:
            sys.stderr = open(os.dup(kept), "w", encoding=stderr.encoding, errors=stderr.errors, buffering=1)  # noqa: SIM115
    except (OSError, ValueError):
        pass  # a stream that is no file: it does not use the descriptor
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        sys.stderr = stderr
