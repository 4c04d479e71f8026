"""`bmgraph serve` as a process, with OpenAI's own client: what it serves, what it survives, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bmgraph as bg
from bmgraph.backends import Onnx
from bmgraph.cli.console import CleanConsole
from bmgraph.cli.serving import serve_bundle
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.passes import Deltas
from tests.helpers.models import tiny_encoder, tokens
from tests.helpers.paths import ROOT
from tests.helpers.rotary_decoder import rotary_decoder
from tests.helpers.served import LONGEST, ServedProcess, word_tokenizer
from tests.passes.test_per_row_deltas import two_deltas

pytest.importorskip("starlette")
openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def program() -> Program:
    return bg.capture(rotary_decoder(), tokens())


@pytest.fixture(scope="module")
def bundle(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder without deltas, and with a tokenizer."""
    out = tmp_path_factory.mktemp("served") / "toy"
    bg.compile(
        program, backend=Onnx(generate=True, threads=1), resources={"tokenizer": word_tokenizer()}
    ).save(out)
    return out


def test_the_official_client_lists_completes_chats_and_streams(bundle: Path) -> None:
    expected = bg.load(bundle).generate("w3 w14", max_new_tokens=6)
    with ServedProcess(bundle) as server:
        client = server.client()
        assert [model.id for model in client.models.list()] == ["toy"]
        found = client.completions.create(
            model="toy", prompt="w3 w14", max_tokens=6, temperature=0, logprobs=2
        )
        assert found.choices[0].text == expected
        assert found.usage.completion_tokens == 6
        messages = [{"role": "user", "content": "w3 w14"}]
        stream = client.chat.completions.create(
            model="toy", messages=messages, max_tokens=6, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected
        with pytest.raises(openai.NotFoundError, match="the model 'none' does not exist"):
            client.completions.create(model="none", prompt="w3")
        with pytest.raises(openai.BadRequestError, match="tools is not supported"):
            client.chat.completions.create(
                model="toy", messages=messages, tools=[{"type": "function", "function": {"name": "f"}}]
            )
        _run_the_client_of_the_page(server.url)
        assert server.stop() == 0


def _blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "serving.md").read_text(), re.S | re.M)


def _run_the_client_of_the_page(url: str) -> None:
    client = _blocks()[0].replace("http://127.0.0.1:8000", url).replace('model="out"', 'model="toy"')
    assert url in client
    exec(client.replace("Why is the sky blue?", "w3 w14"), {})


def test_the_code_of_the_page_runs_in_python(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine: Any = bg.load(bundle)
    (page,) = _blocks()[1:]
    said = page.replace("Is the sky blue?", "w1 w2").replace('"yes"', '"w3 w4"').replace('"no"', '"w5"')
    assert said.count("w") > page.count("w") + 3
    engine.generation = replace(engine.generation, eos=(49,))
    names: dict[str, Any] = {"engine": engine, "prompts": ["w3 w14", "w15", "w9 w2"]}
    exec(said, names)
    assert names["label"] in ("w3 w4", "w5")
    assert names["answer"].new_tokens == len(names["answer"].ids)
    assert f"{names['answer'].prompt_tokens} " in capsys.readouterr().out


@pytest.mark.slow
def test_deltas_are_models_that_come_and_go(program: Program, tmp_path: Path) -> None:
    folders = two_deltas(program, tmp_path)
    engine = bg.compile(
        program, [Deltas(("trec", "spam"), capacity=3)], backend=Onnx(generate=True, threads=1),
        resources={**folders, "tokenizer": word_tokenizer()},
    )  # fmt: skip
    expected = {
        name: engine.generate("w3 w14 w15", max_new_tokens=12, delta=name) for name in ("trec", "spam", None)
    }
    assert len(set(expected.values())) == 3
    engine.deltas.remove("spam")
    engine.save(tmp_path / "out")
    with ServedProcess(
        tmp_path / "out",
        "--delta",
        f"trec={folders['trec']}",
        "--deltas-from",
        str(tmp_path),
        "--name",
        "base",
    ) as server:
        client = server.client()

        def answer(model: str) -> str:
            found = client.completions.create(model=model, prompt="w3 w14 w15", max_tokens=12, temperature=0)
            return str(found.choices[0].text)

        assert [model.id for model in client.models.list()] == ["base", "trec"]
        added = client.post("/models", body={"id": "spam", "folder": "spam"}, cast_to=object)
        assert added["root"] == "base"
        with ThreadPoolExecutor(9) as pool:
            names = ["base", "trec", "spam"] * 3
            answers = list(pool.map(answer, names))
        assert answers == [expected[None if name == "base" else name] for name in names]
        assert client.models.delete("spam").deleted
        with pytest.raises(openai.NotFoundError):
            answer("spam")
        for folder, status in (("../x", 403), ("/etc", 403), ("nothing", 400)):
            with pytest.raises(openai.APIStatusError) as refused:
                client.post("/models", body={"id": "x", "folder": folder}, cast_to=object)
            assert refused.value.status_code == status
            assert str(tmp_path) not in str(refused.value)


@pytest.mark.slow
def test_an_encoder_gives_embeddings(tmp_path: Path) -> None:
    engine = bg.compile(
        tiny_encoder(), example=tokens(), backend=Onnx(threads=1), resources={"tokenizer": word_tokenizer()}
    )
    engine.save(tmp_path / "out")
    texts = ["w3 w14 w15", "w8", "w1 w2 w3 w4 w5 w6"]
    with ServedProcess(tmp_path / "out", "--embedding", "hidden") as server:
        client = server.client()
        found = client.embeddings.create(model="out", input=texts)
        plain = client.embeddings.create(model="out", input=texts, encoding_format="float")
        with pytest.raises(openai.NotFoundError, match="gives embeddings and no texts"):
            client.completions.create(model="out", prompt="w3")
        with pytest.raises(openai.BadRequestError, match="input 1 is empty"):
            client.embeddings.create(model="out", input=["w1", ""])
    for text, item, other in zip(texts, found.data, plain.data):
        ids = torch.tensor([[int(word[1:]) for word in text.split()]])
        states = engine(ids=ids, attention_mask=torch.ones_like(ids))["hidden"][0].mean(0)
        assert np.allclose(item.embedding, states / states.norm(), atol=1e-5)
        assert np.allclose(other.embedding, item.embedding, atol=1e-6)


@pytest.mark.slow
def test_a_port_in_use_and_what_serves_nothing(bundle: Path, tmp_path: Path) -> None:
    limits: dict[str, Any] = {
        "rows": 1, "waiting": 1, "cache": "", "prefixes": "", "prefill": 1, "wide": True,
    }  # fmt: skip
    allowed: dict[str, Any] = {"longest_body": 1, "seconds": 1.0, "most_tokens": None}

    def refused(
        message: str, served: Path = bundle, deltas: Sequence[str] = (), cache: str = "", **options: Any
    ) -> None:
        with pytest.raises(InputError, match=message):
            serve_bundle(
                served, {**limits, "cache": cache}, allowed, deltas, CleanConsole(), **{"port": 0, **options}
            )

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "bmgraph", "serve", str(bundle), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: port {port} of 127.0.0.1 is in use: give another --port")
        assert done.stderr.count("\n") == 1
    refused("is no address of this machine", host="192.0.2.1")
    refused("NAME=FOLDER", deltas=["trec"])
    refused("names 'a' twice", deltas=["a=b", "a=c"])
    refused("this engine has no deltas", deltas=[f"trec={tmp_path}"])
    refused("'much' is no size", cache="much")
    bg.capture(tiny_encoder(), tokens()).save(tmp_path / "program")
    refused("is a program: compile it to an engine first", tmp_path / "program")
    bg.compile(tiny_encoder(), example=tokens(), backend=Onnx(threads=1)).save(tmp_path / "mute")
    refused("has no tokenizer", tmp_path / "mute")


@pytest.mark.slow
def test_a_signal_lets_answers_end_and_takes_no_more(bundle: Path, tmp_path: Path) -> None:
    with ServedProcess(
        bundle, "--rows", "2", log=tmp_path / "log", environment={"BMGRAPH_API_KEY": "secret"}
    ) as server:
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        client, answers = server.client("secret"), []

        def ask(number: int) -> None:
            found = client.completions.create(model="toy", prompt=f"w{number}", max_tokens=30, temperature=0)
            answers.append(found.choices[0].text)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        while "bmgraph_running 0" in _get(server.url, "/metrics") and not answers:
            time.sleep(0.005)
        assert server.stop() == 0
        for thread in threads:
            thread.join(LONGEST)
    text = (tmp_path / "log").read_text()
    assert answers
    assert text.count('"POST /v1/completions" 200') == len(answers)
    assert "secret" not in text
    assert '"GET /v1/models" 401' in text


def _get(url: str, path: str) -> str:
    from urllib.request import urlopen

    with urlopen(url + path, timeout=LONGEST) as reply:
        return str(reply.read().decode())


@pytest.mark.slow
def test_a_thousand_bad_requests_among_valid_ones(bundle: Path, tmp_path: Path) -> None:
    """Malformed, oversized, slow and cancelled ones: each valid one has its answer, and afterwards nothing is held."""
    engine = bg.load(bundle)
    expected = {number: engine.generate(f"w{number}", max_new_tokens=8) for number in range(20)}
    with ServedProcess(bundle, "--max-body", "20000", log=tmp_path / "log") as server:
        client = server.client()
        host, port = server.url.removeprefix("http://").split(":")

        def bad(number: int) -> None:
            draw = random.Random(number)
            with socket.create_connection((host, int(port)), LONGEST) as link:
                kind = number % 6
                head = "POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
                if kind == 0:
                    link.sendall(draw.randbytes(200) + b"\r\n\r\n")
                elif kind == 1:
                    link.sendall(f"{head}Content-Length: 3\r\n\r\n{{]}}".encode())
                elif kind == 2:
                    body = b'{"model": "toy", "prompt": "' + b"w1 " * 20_000 + b'"}'
                    link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:30_000])
                elif kind == 3:
                    link.sendall(f"{head}Content-Length: 500\r\n\r\n{{".encode())  # the rest does not come
                    return
                else:
                    asked = {"model": "toy", "prompt": "w1", "max_tokens": 35, "stream": kind == 4}
                    body = json.dumps(asked).encode()
                    link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                    if draw.random() < 0.5:
                        return  # leaves at once
                link.settimeout(30)
                with contextlib.suppress(ConnectionError):
                    link.recv(65536)

        def valid(number: int) -> bool:
            found = client.completions.create(
                model="toy", prompt=f"w{number % 20}", max_tokens=8, temperature=0
            )
            return bool(found.choices[0].text == expected[number % 20])

        memory = []
        with ThreadPoolExecutor(24) as pool:
            for part in range(4):
                wrong = [pool.submit(bad, number) for number in range(part * 250, part * 250 + 250)]
                right = [pool.submit(valid, number) for number in range(60)]
                assert all(item.result(LONGEST) for item in right)
                for item in wrong:
                    item.result(LONGEST)
                memory.append(_resident(server.process.pid))
        end = time.monotonic() + 30
        while time.monotonic() < end:
            text = _get(server.url, "/metrics")
            if "bmgraph_running 0" in text and "bmgraph_waiting 0" in text:
                break
            time.sleep(0.1)
        else:
            raise AssertionError(text)
        assert memory[-1] - memory[1] < 20_000, memory  # KiB
        assert server.stop() == 0


def _resident(process: int) -> int:
    """The memory of a process, in KiB."""
    if not os.path.exists(f"/proc/{process}/status"):
        pytest.skip("needs /proc")
    text = Path(f"/proc/{process}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1])
