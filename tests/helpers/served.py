"""Engines that are served by a process of their own, as `bmgraph serve` starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

LONGEST = 120.0
TEMPLATE = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"


def word_tokenizer(count: int = 50) -> Any:
    """A tokenizer of transformers with the words w0, w1, ..., and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"w{item}": item for item in range(count)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    found = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0")
    found.chat_template = TEMPLATE
    return found


class ServedProcess:
    """`bmgraph serve` on any free port; `url` is where. Ends with the context."""

    def __init__(
        self, bundle: Path, *options: str, log: Path | None = None, environment: dict[str, str] | None = None
    ) -> None:
        command = [sys.executable, "-m", "bmgraph", "serve", str(bundle), "--port", "0", *options]
        errors = subprocess.DEVNULL if log is None else log.open("wb")
        try:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **(environment or {})},
            )
        finally:
            if log is not None:
                errors.close()  # type: ignore[union-attr]
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, f"the server said {line!r}"
        self.said, self.url = line, found[0]

    def client(self, key: str = "none", **options: Any) -> Any:
        """The official client."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=LONGEST, **options)

    def stop(self) -> int:
        """Ask it to end; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(LONGEST)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(LONGEST)
        if self.process.stdout is not None:
            self.process.stdout.close()
