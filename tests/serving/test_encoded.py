"""An encoder-decoder, served by a process of its own: many clients at once, some of which leave, and what each gets is what it gets alone."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import bmgraph as bg
from bmgraph.backends import Onnx
from tests.helpers.served import ServedProcess, word_tokenizer
from tests.helpers.zoo import VOCABULARY

pytest.importorskip("openai")
pytest.importorskip("uvicorn")


@pytest.mark.slow
def test_clients_of_an_encoder_decoder(tmp_path: Path) -> None:
    from tests.runtime.generation.test_zoo_generate import with_head

    _, program = with_head("t5")
    engine = bg.compile(
        program, backend=Onnx(generate=True, threads=1), resources={"tokenizer": word_tokenizer(VOCABULARY)}
    )
    engine.save(tmp_path / "out")
    draw = random.Random(0)
    prompts = [
        " ".join(f"w{draw.randrange(VOCABULARY)}" for _ in range(draw.randint(1, 30))) for _ in range(40)
    ]
    expected = engine.generate(prompts, max_new_tokens=12)

    def ask(client: Any, number: int) -> str:
        if number % 8 == 7:  # leaves in the middle
            stream = client.completions.create(
                model="out", prompt=prompts[number], max_tokens=12, temperature=0, stream=True
            )
            next(iter(stream))
            stream.close()
            return expected[number]
        found = client.completions.create(
            model="out", prompt=prompts[number], max_tokens=12, temperature=0, stream=bool(number % 2)
        )
        text = "".join(chunk.choices[0].text for chunk in found) if number % 2 else found.choices[0].text
        return str(text)

    with ServedProcess(tmp_path / "out", "--rows", "6") as served:
        client = served.client()
        with ThreadPoolExecutor(12) as threads:
            assert list(threads.map(lambda number: ask(client, number), range(40))) == expected
        several = client.completions.create(
            model="out", prompt=prompts[0], max_tokens=8, n=3, seed=1, temperature=2.0, logprobs=2
        )
        again = client.completions.create(
            model="out", prompt=prompts[0], max_tokens=8, n=3, seed=1, temperature=2.0
        )
        assert [item.text for item in several.choices] == [item.text for item in again.choices]
        assert len({item.text for item in several.choices}) > 1
        chat = client.chat.completions.create(
            model="out", messages=[{"role": "user", "content": prompts[1]}], max_tokens=12, temperature=0
        )
        assert chat.choices[0].message.content == expected[1]  # its template gives the words as they are
        assert served.stop() == 0
