"""Conversations by chat templates: as transformers renders them, and never more than a bounded work for a hostile one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import bmgraph as bg
from bmgraph.backends import Onnx
from bmgraph.cli import chat as chat_command
from bmgraph.cli.console import CleanConsole
from bmgraph.errors import BundleError, InputError
from bmgraph.runtime.generation.bounded_jinja import BUDGET, LONGEST_TEMPLATE, BoundedTemplate
from bmgraph.runtime.generation.chat_template import ChatTemplate
from bmgraph.runtime.generation.tokenizer import tokenizer_of
from tests.helpers.models import tiny_decoder, tokens

TEMPLATES = {
    "tags": "{% for message in messages %}{{'<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}",
    "system": """{%- if messages[0]['role'] == 'system' -%}
    {%- set told = messages[0]['content'] | trim -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set told = '' -%}
    {%- set rest = messages -%}
{%- endif -%}
{{- bos_token -}}
{%- for message in rest -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('roles must alternate') -}}
    {%- endif -%}
    {%- if loop.first and told -%}{%- set content = '<<' ~ told ~ '>> ' ~ message.content -%}
    {%- else -%}{%- set content = message.content -%}{%- endif -%}
    {%- if message.role == 'user' -%}[Q] {{ content.strip() }} [/Q]
    {%- else -%}{% generation %} {{ content }}{{ eos_token }}{% endgeneration %}{%- endif -%}
{%- endfor -%}""",
    "names": "{%- set state = namespace(count=0) %}{%- macro line(m, mark='#') %}{{ mark * 1 if false else mark }} "
    "{{ m.role | upper }}: {{ m.content | replace('\n', ' ') }} {{ m | tojson }}\n{% endmacro %}"
    "{%- for m in messages if m.role != 'tool' %}{%- set state.count = state.count + 1 %}{{ line(m) }}"
    "{%- if loop.last %}{{ state.count }} of {{ messages | length }} {{ ['a', 'b'] | join(', ') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{% break %}{% endif %}{%- endfor %}",
}

TALKS = [
    [{"role": "user", "content": " Is it <true> & 'safe'? "}],
    [
        {"role": "system", "content": "Be\nbrief. "},
        {"role": "user", "content": "Hi {{ 1 + 1 }}"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": 'é\n"x"'},
    ],
]

WORDS = [
    "<s>",
    "</s>",
    "[",
    "Q",
    "]",
    "/",
    "<",
    ">",
    "|",
    "start",
    "end",
    "user",
    "assistant",
    "system",
    ":",
    "Hi",
    "Hello",
    "Be",
    "brief",
]


def tokenizer(template: str | None) -> Any:
    """A tokenizer of transformers with a template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate([*WORDS, "unk"])}
    made = Tokenizer(models.WordLevel(words, unk_token="unk"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    found = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="unk")
    found.chat_template = template
    return found


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("talk", TALKS, ids=["one", "several"])
def test_templates_are_rendered_as_by_transformers(name: str, talk: list[dict[str, str]]) -> None:
    theirs = tokenizer(TEMPLATES[name])
    text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    found = ChatTemplate.of(theirs)
    assert found is not None
    assert found.render(talk) == text
    assert tokenizer_of(theirs).encode_chat(talk) == theirs.apply_chat_template(
        talk, add_generation_prompt=True, return_dict=False
    )
    assert ChatTemplate.from_json(json.loads(json.dumps(found.as_json()))) == found


HOSTILE = {
    "loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% set c = a %}{% endfor %}{% endfor %}",
    "range": "{% for a in range(10 ** 9) %}{% endfor %}",
    "long range": "{% for a in range(1000000000) %}{% endfor %}",
    "doubling": "{% set n = namespace(s='ab') %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "concatenation": "{% set n = namespace(s='ab') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "lists": "{% set n = namespace(s=[1]) %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "times": "{{ 'a' * 1000000000 }}",
    "power": "{{ 9 ** 99999999 }}",
    "product": "{% set n = namespace(s=9) %}{% for a in range(60) %}{% set n.s = n.s * n.s %}{% endfor %}",
    "width": "{{ 'a'.ljust(1000000000) }}",
    "format": "{{ '%1000000000d' % 3 }}",
    "format method": "{{ '{:1000000000}'.format(3) }}",
    "filter": "{{ 'a' | center(1000000000) }}",
    "replace": "{% set n = namespace(s='aa') %}{% for a in range(60) %}{% set n.s = n.s | replace('a', n.s) %}{% endfor %}",
    "method replace": "{% set n = namespace(s='aa') %}{% for a in range(60) %}{% set n.s = n.s.replace('a', n.s) %}{% endfor %}",
    "join": "{% set n = namespace(s='aa') %}{% for a in range(60) %}{% set n.s = n.s.join(n.s) %}{% endfor %}",
    "block": "{% set n = namespace(s='aa') %}{% for a in range(60) %}{% set b %}{{ n.s }}{{ n.s }}{% endset %}"
    "{% set n.s = b %}{% endfor %}",
    "macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "environment": "{{ self._TemplateReference__context.environment.begin() }}",
    "include": "{% include '/etc/passwd' %}",
    "lipsum": "{{ lipsum(1000000) }}",
    "nested": "{{ " + "(" * 30000 + "1" + ")" * 30000 + " }}",
    "long": "a" * (LONGEST_TEMPLATE + 1),
    "syntax": "{% for %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"the template (is not valid|does not take this|has )"):
        BoundedTemplate(HOSTILE[name]).render({})


def test_nothing_of_python_is_reached() -> None:
    assert (
        BoundedTemplate("{{ raise_exception.__globals__ }}{{ range.__self__ }}{{ joined }}").render({}) == ""
    )


def test_a_long_conversation_is_within_the_budget() -> None:
    talk = [{"role": "user", "content": "x" * 2000}] * 400
    text = ChatTemplate(TEMPLATES["tags"]).render(talk)
    assert 800_000 < len(text) < BUDGET
    assert ChatTemplate(TEMPLATES["tags"]).render(talk) == text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (["hello"], "is no message"),
        ([{"role": "user"}], "is no message"),
        ([{"role": "user", "content": 3}], "holds texts alone"),
        ([{"role": "assistant", "content": "x"}], "roles must alternate"),
    ],
)
def test_wrong_messages_are_refused(messages: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ChatTemplate(TEMPLATES["system"], {"bos_token": "", "eos_token": ""}).render(messages)


@pytest.fixture(scope="module")
def engine() -> Any:
    decoder = bg.capture(tiny_decoder(longest=64), tokens())
    return bg.compile(
        decoder, backend=Onnx(generate=True), resources={"tokenizer": tokenizer(TEMPLATES["tags"])}
    )


def test_an_engine_chats_and_keeps_its_template(engine: Any, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}]
    ids = engine.tokenizer.encode_chat(talk)
    assert len(ids) > 5
    expected = engine.generate([ids], max_new_tokens=4)[0]
    assert engine.chat(talk, max_new_tokens=4) == expected
    assert "".join(engine.chat(talk, max_new_tokens=4, stream=True)) == expected
    engine.save(tmp_path / "out")
    loaded = bg.load(tmp_path / "out")
    assert loaded.chat(talk, max_new_tokens=4) == expected
    engine.tokenizer = tokenizer_of(tokenizer(None))
    for silent in (engine.tokenizer, None):
        engine.tokenizer = silent
        with pytest.raises(InputError, match="has no chat template"):
            engine.chat(talk)
        with pytest.raises(InputError, match="has no chat template"):
            chat_command.Conversation(engine, "", {})


def test_the_command_answers_line_by_line(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer is that of the engine to the conversation so far; what no longer fits is dropped, and told."""
    engine.tokenizer = tokenizer_of(tokenizer(TEMPLATES["tags"]))
    engine.save(tmp_path / "out")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\nHello\n"))
    written = io.StringIO()
    console = CleanConsole(file=written, width=1000)
    assert isinstance(console, Console)
    chat_command.chat(tmp_path / "out", "Be brief", {"max_new_tokens": 3}, console)
    talk = [{"role": "system", "content": "Be brief"}]
    for text in ("Hi", "Hello"):
        talk.append({"role": "user", "content": text})
        answer = engine.chat(talk, max_new_tokens=3)
        assert answer in written.getvalue()
        talk.append({"role": "assistant", "content": answer})
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n" * 6))
    chat_command.chat(tmp_path / "out", "", {"max_new_tokens": 3}, console)
    assert "messages no longer fit" in written.getvalue()
    options = {"max_new_tokens": 120, "window": 60}
    slid = "".join(chat_command.Conversation(engine, "Be brief", options).answer("Hi"))
    kept = len(engine.tokenizer.encode("<|start|>system\nBe brief<|end|>\n<|start|>user\n"))
    assert slid == engine.chat(talk[:2], keep=kept, **options)


def test_a_bundle_with_a_changed_template_is_refused(engine: Any, tmp_path: Path) -> None:
    engine.tokenizer = tokenizer_of(tokenizer(TEMPLATES["tags"]))
    engine.save(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["chat"] = {"template": 3}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="manifest"):
        bg.load(tmp_path / "out")
