"""The API without a socket and without a model: bodies, streams, limits, errors, access and metrics."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bmgraph.runtime.generation.batching.options import Batching
from bmgraph.runtime.generation.chat_template import ChatTemplate
from tests.helpers.asgi import acall, call
from tests.helpers.counting_decoder import CountingEngine, alone

pytest.importorskip("starlette")

from bmgraph.serving.app import Server
from bmgraph.serving.options import ServeOptions
from bmgraph.serving.served_models import ServedModels

LETTERS = "abcdefghijklmnopqrst"


class Spelling:
    """A tokenizer with a letter for each of 20 ids, and a chat template."""

    eos_ids: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        return [LETTERS.index(letter) for letter in text]

    encode_plain = encode

    def decode(self, ids: list[int]) -> str:
        return "".join(LETTERS[item] for item in ids)

    def encode_chat(self, messages: Any) -> list[int]:
        template = ChatTemplate("{% for m in messages %}{{ m['content'] }}{% endfor %}")
        return self.encode(template.render(messages))


def text_after(prompt: str, count: int) -> str:
    return Spelling().decode(alone(Spelling().encode(prompt), count))


def usage(prompt: int, new: int, cached: int = 0) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return {**counts, "prompt_tokens_details": {"cached_tokens": cached}}


def served(limit: int | None = 64, **options: Any) -> Server:
    engine = CountingEngine(limit)
    engine.tokenizer = Spelling()
    return Server(ServedModels(engine, "toy"), ServeOptions(**options))


@pytest.fixture
def server() -> Iterator[Server]:
    found = served()
    yield found
    found.close()


GREEDY = {"model": "toy", "temperature": 0}


def test_a_window_slides_for_all_clients() -> None:
    server = served(limit=8, window=True, keep=1)
    try:
        asked = {**GREEDY, "prompt": "alongpram", "max_tokens": 30}
        body = call(server.app, "POST", "/v1/completions", asked).json
        engine = server.models.engine
        expected = engine.generate(asked["prompt"], max_new_tokens=30, window=True, keep=1)
        assert body["choices"][0]["text"] == expected
        assert body["usage"] == usage(9, 30)
    finally:
        server.close()


def test_a_completion(server: Server) -> None:
    found = call(server.app, "POST", "/v1/completions", {**GREEDY, "prompt": "dog", "max_tokens": 5})
    assert found.status == 200
    body = found.json
    assert body["choices"] == [
        {"index": 0, "text": text_after("dog", 5), "logprobs": None, "finish_reason": "length"}
    ]
    assert body["usage"] == usage(3, 5)
    assert (body["object"], body["model"]) == ("text_completion", "toy")
    several = call(
        server.app, "POST", "/v1/completions", {**GREEDY, "prompt": ["dog", [0, 1]], "logprobs": 2}
    ).json
    assert [choice["text"] for choice in several["choices"]] == [text_after("dog", 16), text_after("ab", 16)]
    scores = several["choices"][1]["logprobs"]
    assert "".join(scores["tokens"]) == text_after("ab", 16)
    assert scores["text_offset"] == list(range(16))
    assert [max(top, key=top.get) for top in scores["top_logprobs"]] == scores["tokens"]
    whole = text_after("dog", 16)
    stopped = call(
        server.app, "POST", "/v1/completions", {**GREEDY, "prompt": "dog", "stop": [whole[4:6]]}
    ).json
    assert stopped["choices"][0] == {"index": 0, "text": whole[:4], "logprobs": None, "finish_reason": "stop"}


def test_an_answer_of_given_choices(server: Server) -> None:
    server.models.engine.tokenizer.eos_ids = (19,)
    asked = {**GREEDY, "prompt": "dog", "choices": ["cab", "go"]}
    found = call(server.app, "POST", "/v1/completions", asked).json["choices"][0]
    assert found["text"] in ("cab", "go")
    assert found["finish_reason"] == "stop"
    wrong = call(server.app, "POST", "/v1/completions", {**asked, "choices": ["cab", ""]})
    assert (wrong.status, wrong.error["param"]) == (400, "choices")
    wrong = call(server.app, "POST", "/v1/completions", {**asked, "max_tokens": 3})
    assert (wrong.status, "choice 0 has 3 ids" in wrong.error["message"]) == (400, True)


def test_a_stream_of_several_answers_repeats_with_its_seed(server: Server) -> None:
    asked = {"model": "toy", "prompt": "dog", "max_tokens": 6, "n": 3, "seed": 7, "temperature": 1.5}
    whole = [choice["text"] for choice in call(server.app, "POST", "/v1/completions", asked).json["choices"]]
    assert len(set(whole)) == 3
    events = call(
        server.app,
        "POST",
        "/v1/completions",
        {**asked, "stream": True, "stream_options": {"include_usage": True}},
    ).events
    assert events.pop() == "[DONE]"
    assert events.pop()["usage"] == usage(3, 18, cached=3)
    texts, reasons = ["", "", ""], ["", "", ""]
    for event in events:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"] or ""
    assert (texts, reasons) == (whole, ["length"] * 3)
    assert len({event["id"] for event in events}) == 1


def test_a_chat(server: Server) -> None:
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "dog"}]},
    ]
    asked = {**GREEDY, "messages": messages, "max_completion_tokens": 4, "logprobs": True, "top_logprobs": 1}
    body = call(server.app, "POST", "/v1/chat/completions", asked).json
    (choice,) = body["choices"]
    expected = text_after("adog", 4)
    assert choice["message"] == {"role": "assistant", "content": expected, "refusal": None}
    content = choice["logprobs"]["content"]
    assert [item["token"] for item in content] == list(expected)
    assert [item["top_logprobs"][0]["bytes"] for item in content] == [[ord(item)] for item in expected]
    events = call(server.app, "POST", "/v1/chat/completions", {**asked, "stream": True}).events
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == expected
    assert deltas[-1] == {}
    whole = call(server.app, "POST", "/v1/chat/completions", {**GREEDY, "messages": messages}).json
    assert whole["usage"]["completion_tokens"] == 60  # as many as the 64 positions leave


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", b"{", 400, "the body is not valid JSON"),
        ("completions", b"[" * 100_000, 400, "the body is not valid JSON"),
        ("completions", b'{"model": NaN}', 400, "NaN is no number"),
        ("completions", b'{"seed": ' + b"9" * 9000 + b"}", 400, "the body is not valid JSON"),
        ("completions", b"\xff\xfe", 400, "the body is not valid JSON"),
        ("completions", b"3", 400, "the body is not a JSON object"),
        ("completions", b"", 400, "the body is not valid JSON"),
        ("completions", {"prompt": "dog"}, 400, "model is missing"),
        ("completions", {"model": 3, "prompt": "dog"}, 400, "model is 3: give a text"),
        ("completions", {"model": "toy"}, 400, "prompt is missing"),
        ("completions", {"model": "toi", "prompt": "dog"}, 404, "the model 'toi' does not exist; did you mean 'toy'"),
        ("completions", {"model": "toy", "prompt": []}, 400, "prompt is neither a text nor a list"),
        ("completions", {"model": "toy", "prompt": [[]]}, 400, "prompt holds something that is no text"),
        ("completions", {"model": "toy", "prompt": ""}, 400, "prompt 0 is empty"),
        ("completions", {"model": "toy", "prompt": [99]}, 400, "prompt 0 has id 99: the vocabulary has ids 0 to 19"),
        ("completions", {"model": "toy", "prompt": "dog", "max_tokens": 0}, 400, "max_tokens is 0: give a whole number"),
        ("completions", {"model": "toy", "prompt": "dog", "max_tokens": 62}, 400, "which with 62 new ones are more than the 64"),
        ("completions", {"model": "toy", "prompt": "dog" * 30}, 400, "the prompt has 90 tokens"),
        ("completions", {"model": "toy", "prompt": "dog", "temperature": "hot"}, 400, "temperature is .*: give a number"),
        ("completions", {"model": "toy", "prompt": "dog", "temprature": 1}, 400, "there is no field 'temprature'; did you mean"),
        ("completions", {"model": "toy", "prompt": "dog", "top_p": 0}, 400, "top_p=0.0: give a number above 0"),
        ("completions", {"model": "toy", "prompt": "dog", "n": 65}, 400, "n is 65: give a whole number from 1 to 64"),
        ("completions", {"model": "toy", "prompt": ["d"] * 40, "n": 2}, 400, "40 prompts with n=2"),
        ("completions", {"model": "toy", "prompt": "d", "n": 2, "temperature": 0}, 400, "would all be the likeliest"),
        ("completions", {"model": "toy", "prompt": "d", "echo": True}, 400, "echo is not supported"),
        ("completions", {"model": "toy", "prompt": "d", "best_of": 3}, 400, "best_of is not supported"),
        ("completions", {"model": "toy", "prompt": "d", "stop": [""]}, 400, "stop is .*: give a text"),
        ("completions", {"model": "toy", "prompt": "d", "logit_bias": {"x": 1}}, 400, "logit_bias names 'x'"),
        ("completions", {"model": "toy", "prompt": "d", "logit_bias": {"77": 1}}, 400, "logit_bias has id 77"),
        ("completions", {"model": "toy", "prompt": "d", "stream_options": {}}, 400, "stream_options needs stream"),
        ("chat/completions", {"model": "toy"}, 400, "messages is missing"),
        ("chat/completions", {"model": "toy", "messages": ["a"]}, 400, r"messages\[0\] is no object"),
        ("chat/completions", {"model": "toy", "messages": [{"role": "user"}]}, 400, r"messages\[0\].content is missing"),
        (
            "chat/completions",
            {"model": "toy", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "a part that is no text",
        ),
        (
            "chat/completions",
            {"model": "toy", "messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]},
            400,
            "tools is not supported: this server calls no tools",
        ),
        (
            "chat/completions",
            {"model": "toy", "messages": [{"role": "user", "content": "a"}], "response_format": {"type": "grammar"}},
            400,
            "response_format of type 'grammar' is not supported: give text, json_object or json_schema",
        ),
        ("embeddings", {"model": "toy", "input": "a"}, 404, "gives texts and no embeddings"),
        ("else", {}, 404, "there is no POST '/v1/else' here"),
        ("models/toi", None, 405, "there is no POST"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_the_form_of_the_api(
    server: Server, path: str, body: object, status: int, message: str
) -> None:
    import re

    found = call(server.app, "POST", f"/v1/{path}", body)
    assert found.status == status
    assert re.search(message, found.error["message"]), found.text
    load = server.models.engine.scheduler().load
    assert (load.running, load.waiting) == (0, 0)


def test_limits() -> None:
    server = served(limit=None, longest_body=1000, most_tokens=10, seconds=0.3)
    asked = {**GREEDY, "prompt": "dog", "max_tokens": 11}
    assert (
        "gives 10 tokens to an answer at most"
        in call(server.app, "POST", "/v1/completions", asked).error["message"]
    )
    long = {**GREEDY, "prompt": "d" * 1000}
    assert call(server.app, "POST", "/v1/completions", long).status == 413
    assert call(server.app, "POST", "/v1/completions", long, {"content-length": "9" * 30}).status == 413
    assert call(server.app, "POST", "/v1/completions", long, {"content-length": "10"}).status == 413
    server.close()
    server = served(limit=None, seconds=0.3)
    slow = call(server.app, "POST", "/v1/completions", {**asked, "max_tokens": 10**6})
    assert (slow.status, slow.error["code"]) == (408, "timeout")
    stream = call(server.app, "POST", "/v1/completions", {**asked, "max_tokens": 10**6, "stream": True})
    assert stream.events[-1]["error"]["code"] == "timeout"
    assert _idle(server)
    server.close()


def test_what_is_full_is_told_with_429() -> None:
    server = served(limit=None)
    server.models.engine.batching = Batching(rows=1, waiting=1)

    async def all_of_it() -> None:
        endless = {**GREEDY, "prompt": "dog", "max_tokens": 10**6}
        first = asyncio.create_task(acall(server.app, "POST", "/v1/completions", endless))
        while not server.models.engine.scheduler().load.running:
            await asyncio.sleep(0.01)
        second = asyncio.create_task(acall(server.app, "POST", "/v1/completions", endless))
        while not server.models.engine.scheduler().load.waiting:
            await asyncio.sleep(0.01)
        third = await acall(server.app, "POST", "/v1/completions", endless)
        assert (third.status, third.error["code"], third.headers["retry-after"]) == (429, "queue_full", "1")
        server.close()
        for task in (first, second):
            assert (await task).status == 500

    asyncio.run(all_of_it())


def _idle(server: Server) -> bool:
    """Whether nothing runs or waits, within a while."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        load = server.models.engine.scheduler().load
        if not load.running + load.waiting:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(stream: bool) -> None:
    server = served(limit=None)
    asked = {**GREEDY, "prompt": "dog", "max_tokens": 10**6, "stream": stream}
    found = call(server.app, "POST", "/v1/completions", asked, leave_after=3 if stream else 0)
    assert len(found.parts) >= 3 or not stream
    assert _idle(server)
    server.close()


def test_an_engine_that_fails_says_no_more_than_it_should() -> None:
    server = served()
    server.models.engine.counting.failing = {2}
    found = call(server.app, "POST", "/v1/completions", {**GREEDY, "prompt": "dog"})
    assert found.status == 500
    assert "step 2" not in found.text
    again = call(server.app, "POST", "/v1/completions", {**GREEDY, "prompt": "dog"})
    assert again.json["choices"][0]["text"] == text_after("dog", 16)
    server.close()


def test_a_key_opens_all_but_health_and_metrics() -> None:
    server = served(api_key="secret")
    asked = {**GREEDY, "prompt": "dog"}
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "secret"},
        {"authorization": "Bearer \u00fc"},
    ):
        found = call(server.app, "POST", "/v1/completions", asked, headers)
        assert (found.status, found.error["code"]) == (401, "invalid_api_key")
    assert (
        call(server.app, "POST", "/v1/completions", asked, {"authorization": "bearer secret"}).status == 200
    )
    assert call(server.app, "GET", "/v1/models").status == 401
    assert call(server.app, "GET", "/health").json == {"status": "ok"}
    assert "bmgraph_running 0" in call(server.app, "GET", "/metrics").text
    server.close()
    assert call(server.app, "GET", "/health").status == 503


def test_models_and_counts(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "bmgraph.serving")
    listed = call(server.app, "GET", "/v1/models").json
    assert [item["id"] for item in listed["data"]] == ["toy"]
    assert call(server.app, "GET", "/v1/models/toy").json["object"] == "model"
    assert call(server.app, "GET", "/v1/models/none").error["code"] == "model_not_found"
    assert call(server.app, "POST", "/v1/models", {"id": "x", "folder": "y"}).status == 403
    assert call(server.app, "DELETE", "/v1/models/toy").status == 403
    call(server.app, "POST", "/v1/completions", {**GREEDY, "prompt": "dog", "max_tokens": 5})
    again = call(server.app, "POST", "/v1/completions", {**GREEDY, "prompt": "do", "max_tokens": 1}).json
    assert again["usage"] == usage(2, 1, cached=1)
    text = call(server.app, "GET", "/metrics").text
    assert 'bmgraph_new_tokens_total{model="toy"} 6' in text
    assert 'bmgraph_cached_prompt_tokens_total{model="toy"} 1' in text
    assert "bmgraph_kept_positions 7" in text
    assert 'bmgraph_requests_total{path="/v1/completions",status="200"} 2' in text
    assert 'bmgraph_first_token_seconds_bucket{le="+Inf"} 2' in text
    lines = [record.getMessage() for record in caplog.records]
    assert any(
        '"POST /v1/completions" 200' in line and "model=toy prompt=3 cached=0 new=5" in line for line in lines
    )
    assert not any("dog" in line for line in lines)


def test_many_at_once_have_what_they_have_alone(server: Server) -> None:
    async def all_of_it() -> list[Any]:
        prompts = [LETTERS[place % 20] * (1 + place % 7) for place in range(40)]
        asked = [
            {**GREEDY, "prompt": prompt, "max_tokens": 1 + place % 9} for place, prompt in enumerate(prompts)
        ]
        found = await asyncio.gather(*(acall(server.app, "POST", "/v1/completions", item) for item in asked))
        return [
            (item["prompt"], item["max_tokens"], reply.json["choices"][0]["text"])
            for item, reply in zip(asked, found)
        ]

    for prompt, count, text in asyncio.run(all_of_it()):
        assert text == text_after(prompt, count)
    assert json.loads(json.dumps(server.models.card("toy")))["owned_by"] == "bmgraph"
    assert threading.active_count() < 60
