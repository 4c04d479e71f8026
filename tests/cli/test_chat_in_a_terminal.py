"""`bmgraph chat` in a pseudo-terminal, as a person uses it: prompts, answers, Ctrl-C in an answer, Ctrl-D at the end."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bmgraph as bg
from bmgraph.backends import Onnx
from tests.helpers.models import tiny_decoder, tokens
from tests.runtime.generation.test_chat import TEMPLATES, tokenizer

PROMPT, LONGEST = "> ", 120.0


class Terminal:
    """A process whose standard streams are a terminal."""

    def __init__(self, *command: str) -> None:
        self._own, other = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, start_new_session=True
        )
        os.close(other)
        self.shown = ""

    def until(self, text: str) -> str:
        """What is shown up to the next `text`; fails where that does not come."""
        end = time.monotonic() + LONGEST
        while text not in self.shown:
            ready, _, _ = select.select([self._own], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} did not come after {self.shown!r}"
            self.shown += os.read(self._own, 4096).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def close(self) -> int:
        """The exit status, after what is left was shown."""
        try:
            while os.read(self._own, 4096):
                pass
        except OSError:  # Linux: the other side is closed
            pass
        status = self.process.wait(LONGEST)
        os.close(self._own)
        return status


@pytest.mark.slow
def test_a_conversation(tmp_path: Path) -> None:
    program = bg.capture(tiny_decoder(longest=2048), tokens())
    engine = bg.compile(
        program, backend=Onnx(generate=True), resources={"tokenizer": tokenizer(TEMPLATES["tags"])}
    )
    expected = engine.chat([{"role": "user", "content": "Hi"}], max_new_tokens=4)
    engine.save(tmp_path / "out")
    terminal = Terminal(
        sys.executable, "-m", "bmgraph", "chat", str(tmp_path / "out"), "--max-new-tokens", "4"
    )
    try:
        assert "Ctrl-D" in terminal.until(PROMPT)
        terminal.type("Hi\n")
        assert expected.strip() in " ".join(terminal.until(PROMPT).split())
        terminal.type("\n")  # an empty line is no question
        terminal.until(PROMPT)
        terminal.type("\x04")
        assert terminal.close() == 0
    finally:
        terminal.process.kill()


@pytest.mark.slow
def test_ctrl_c_ends_an_answer_and_then_the_conversation(tmp_path: Path) -> None:
    program = bg.capture(tiny_decoder(longest=20_000), tokens())
    engine = bg.compile(
        program, backend=Onnx(generate=True), resources={"tokenizer": tokenizer(TEMPLATES["tags"])}
    )
    engine.save(tmp_path / "out")
    command = (sys.executable, "-m", "bmgraph", "chat", str(tmp_path / "out"), "--max-new-tokens", "15000")
    terminal = Terminal(*command)
    try:
        terminal.until(PROMPT)
        terminal.type("Hi\n")
        terminal.until("Hi")
        time.sleep(2)  # it is in the middle of fifteen thousand tokens
        os.killpg(terminal.process.pid, signal.SIGINT)
        assert len(terminal.until(PROMPT).split()) < 14_000
        os.killpg(terminal.process.pid, signal.SIGINT)
        assert terminal.close() == 0
    finally:
        terminal.process.kill()
