"""The page at / in a real browser: a talk, the speed, another model, and a key. Needs playwright and chromium."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import bmgraph as bg
from bmgraph.backends import Onnx
from tests.helpers.models import tokens
from tests.helpers.rotary_decoder import rotary_decoder
from tests.helpers.served import ServedProcess, word_tokenizer

pytest.importorskip("starlette")


@pytest.mark.slow
def test_a_person_talks_with_it(tmp_path: Path) -> None:
    playwright: Any = pytest.importorskip("playwright.sync_api")
    browser_file = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_file is None:
        pytest.skip("needs chromium")
    engine = bg.compile(
        rotary_decoder(),
        example=tokens(),
        backend=Onnx(generate=True, threads=1),
        resources={"tokenizer": word_tokenizer()},
    )
    engine.save(tmp_path / "toy")
    expected = engine.generate("w3 w14", max_new_tokens=5)
    with (
        ServedProcess(tmp_path / "toy", environment={"BMGRAPH_API_KEY": "secret"}) as server,
        playwright.sync_playwright() as library,
    ):
        browser = library.chromium.launch(executable_path=browser_file, args=["--no-sandbox"])
        page = browser.new_context(bypass_csp=True).new_page()  # waits are evaluated
        said: list[str] = []
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(server.url)
        page.locator("#key").fill("secret")
        page.locator("#key").press("Enter")
        page.wait_for_function("document.querySelector('#model').value == 'toy'")
        page.locator("#temperature").fill("0")
        page.locator("#most").fill("5")
        page.locator("#text").fill("w3 w14")
        page.locator("#text").press("Enter")
        page.wait_for_function(
            "document.querySelector('#send').textContent == 'Send' && document.querySelector('.speed').textContent"
        )
        assert page.locator(".assistant").text_content() == expected
        assert page.locator(".user").text_content() == "w3 w14"
        assert page.locator(".speed").text_content().startswith("5 tokens, ")
        page.locator("#most").fill("99999999")
        page.locator("#text").fill("<b>w3</b>")
        page.locator("#send").click()
        page.locator(".error").wait_for()
        page.locator("#most").fill("5")
        page.locator("#text").fill("<b>w3</b>")
        page.locator("#send").click()
        page.wait_for_function("document.querySelectorAll('.assistant').length == 3")
        assert page.locator("b").count() == 0  # what was said is text and no markup
        page.locator("#clear").click()
        assert page.locator(".turn").count() == 0
        page.screenshot(path=str(tmp_path / "page.png"))
        browser.close()
    assert said == []
