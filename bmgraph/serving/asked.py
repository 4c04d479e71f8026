"""What a request for text asks: its fields, checked, as prompts and options of `engine.submit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bmgraph.runtime.generation.batching.joining import joining
from bmgraph.runtime.generation.json_grammar import why_no_json
from bmgraph.serving.api_error import ApiError, refused
from bmgraph.serving.fields import Fields
from bmgraph.serving.options import ServeOptions
from bmgraph.serving.served_models import ServedModels

COMPLETION_TOKENS = 16
"""New tokens of a completion if nobody says, as in OpenAI's API; of a chat as many as fit."""

UNBOUNDED = 1024
"""New tokens of a chat if nobody says, where neither the server nor the model has a bound, or a window slides."""

MOST_SCORES, MOST_STOPS, MOST_CHOICES = 20, 16, 256
LARGEST_SEED = 2**63 - 1

_NO_TOOLS = "this server calls no tools; leave it out"
_IGNORED = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")


@dataclass(frozen=True)
class Asked:
    """A request: prompts (texts or ids), `each` answers to each, and the options of `submit` for all of them."""

    model: str
    prompts: Sequence[str | list[int]]
    each: int
    stream: bool
    usage_in_stream: bool
    scores: int | None
    most_new: int | None
    options: dict[str, Any]


def completion(fields: Fields, allowed: ServeOptions) -> Asked:
    """The fields of `/v1/completions`. Raises ApiError."""
    model, prompts = fields.text("model"), _prompts(fields)
    most_new = _most_new(fields, ("max_tokens",), allowed)
    scores = fields.whole("logprobs", 0, MOST_SCORES)
    fields.refuse(("echo",), "only what is new is answered", (False,))
    each = fields.whole("n", 1, allowed.most_answers) or 1
    fields.refuse(("best_of",), "all answers are given; use n", (each, 1))
    fields.refuse(("suffix",), "a text is continued at its end alone", ("",))
    return _asked(fields, allowed, model, prompts, each, scores, most_new or COMPLETION_TOKENS)


def chat(fields: Fields, models: ServedModels, allowed: ServeOptions) -> Asked:
    """The fields of `/v1/chat/completions`; the messages become ids by the tokenizer's template. Raises ApiError, and InputError for
    messages that the template does not take."""
    model = fields.text("model")
    messages = _messages(fields)
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MOST_SCORES)
    if top is not None and not wanted:
        raise refused("top_logprobs needs logprobs: true", "top_logprobs")
    fields.refuse(("tools", "functions"), _NO_TOOLS, ([],))
    fields.refuse(("tool_choice", "function_call"), _NO_TOOLS, ("none", "auto"))
    fields.refuse(("audio", "prediction", "web_search_options"), "answers are texts, made by the model alone")
    fields.refuse(
        ("store", "parallel_tool_calls"), "nothing is stored, and no tools are called", (False, True)
    )
    fields.refuse(("modalities",), "answers are texts", (["text"],))
    fields.refuse(("reasoning_effort", "verbosity"), "the model has no such setting")
    bound = _response_format(fields)
    most_new = _most_new(fields, ("max_completion_tokens", "max_tokens"), allowed)
    each = fields.whole("n", 1, allowed.most_answers) or 1
    scores = (top or 0) if wanted else None
    ids = models.tokenizer.encode_chat(messages)
    return _asked(fields, allowed, model, [ids], each, scores, most_new, bound)


def _response_format(fields: Fields) -> dict[str, Any]:
    """The options of `submit` for the form that an answer must have. Raises ApiError."""
    form = fields.inner("response_format")
    if form is None:
        return {}
    kind = form.text("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise refused(
            f"response_format of type {kind[:40]!r} is not supported: give text, json_object or json_schema",
            "response_format", "unsupported_parameter",
        )  # fmt: skip
    missing = "" if kind == "text" else why_no_json()
    if missing:
        raise refused(
            f"response_format of type {kind!r} is not supported by this server: {missing}", "response_format",
            "unsupported_parameter",
        )  # fmt: skip
    found: dict[str, Any] = {} if kind == "text" else {"json": True}
    if kind == "json_schema":
        inner = form.inner("json_schema")
        schema = None if inner is None else inner.value("schema")
        if inner is None or not isinstance(schema, dict):
            raise refused("response_format.json_schema.schema is missing: give an object", "response_format")
        inner.ignore("name", "description", "strict")
        inner.done()
        found = {"json": schema}
    form.done()
    return found


def _asked(
    fields: Fields,
    allowed: ServeOptions,
    model: str,
    prompts: Sequence[str | list[int]],
    each: int,
    scores: int | None,
    most_new: int | None,
    bound: dict[str, Any] | None = None,
) -> Asked:
    """A request of the fields that both kinds have. Raises ApiError."""
    if len(prompts) * each > allowed.most_answers:
        raise refused(
            f"{len(prompts)} prompts with n={each}: this server gives {allowed.most_answers} answers to a request at most",
            "n",
        )
    stream, options = fields.flag("stream"), {**_sampling(fields), **(bound or {})}
    inner = fields.inner("stream_options")
    if inner is not None and not stream:
        raise refused("stream_options needs stream: true", "stream_options")
    usage = False
    if inner is not None:
        usage = inner.flag("include_usage")
        inner.ignore("include_obfuscation")
        inner.done()
    if each > 1 and options["temperature"] == 0:
        raise refused(f"n={each} answers would all be the likeliest: give a temperature above 0", "n")
    fields.ignore(*_IGNORED)
    fields.done()
    return Asked(model, prompts, each, stream, usage, scores, most_new, options)


def _sampling(fields: Fields) -> dict[str, Any]:
    """The options of sampling, by the names that `submit` has for them."""
    found: dict[str, Any] = {
        "temperature": fields.real("temperature", 0, 100),
        "top_p": fields.real("top_p", 0, 1),
        "top_k": fields.whole("top_k", 0, 2**31),
        "min_p": fields.real("min_p", 0, 1),
        "seed": fields.whole("seed", 0, LARGEST_SEED),
        "presence_penalty": fields.real("presence_penalty", -100, 100),
        "frequency_penalty": fields.real("frequency_penalty", -100, 100),
        "repetition_penalty": fields.real("repetition_penalty", 0, 100),
        "min_new_tokens": fields.whole("min_tokens", 0, 2**31),
        "logit_bias": _biases(fields),
        "stop": fields.texts("stop", MOST_STOPS) or None,
        "choices": list(fields.texts("choices", MOST_CHOICES)) or None,
    }
    found = {name: value for name, value in found.items() if value is not None}
    return {"temperature": 1.0, **found}


def _biases(fields: Fields) -> dict[int, float] | None:
    given = fields.inner("logit_bias")
    if given is None:
        return None
    found = {}
    for name in given.names:
        if not name.isascii() or not name.isdigit() or len(name) > 12:
            raise refused(f"logit_bias names {name[:40]!r}: give ids as texts of digits", "logit_bias")
        found[int(name)] = given.real(name, -100, 100) or 0.0
    return found or None


def _most_new(fields: Fields, names: Sequence[str], allowed: ServeOptions) -> int | None:
    """How many new tokens are asked for; None if nobody says."""
    found = None
    for name in names:
        given = fields.whole(name, 1, 2**31 - 1)
        found = given if found is None else found
        if given is not None and allowed.most_tokens is not None and given > allowed.most_tokens:
            raise refused(
                f"{name}={given}: this server gives {allowed.most_tokens} tokens to an answer at most", name
            )
    return found


def _prompts(fields: Fields) -> list[str | list[int]]:
    """Texts, or ids, one or several."""
    found = fields.value("prompt")
    if found is None:
        raise refused("prompt is missing", "prompt")
    if isinstance(found, str) or (isinstance(found, list) and found and all(map(_is_id, found))):
        return [found]
    if not isinstance(found, list) or not found:
        raise refused("prompt is neither a text nor a list: give a text, ids, or a list of either", "prompt")
    for item in found:
        if not isinstance(item, str) and not (isinstance(item, list) and item and all(map(_is_id, item))):
            raise refused(
                "prompt holds something that is no text and no list of ids: give a text, ids, or a list of either",
                "prompt",
            )
    return found


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _messages(fields: Fields) -> list[dict[str, str]]:
    """Messages with texts alone; a text in parts is joined."""
    given = fields.value("messages")
    if not isinstance(given, list) or not given:
        raise refused(
            'messages is missing or empty: give a list of {"role": ..., "content": ...}', "messages"
        )
    found = []
    for number, item in enumerate(given):
        if not isinstance(item, dict):
            raise refused(f"messages[{number}] is no object with role and content", "messages")
        message = Fields(item, f"messages[{number}].")
        role, content = message.text("role"), message.value("content")
        if isinstance(content, list):
            content = "".join(_part(part, number) for part in content)
        if not isinstance(content, str):
            raise refused(f"messages[{number}].content is missing: give a text", "messages")
        message.ignore("refusal", "annotations")
        message.refuse(("tool_calls", "function_call", "audio", "tool_call_id"), _NO_TOOLS, ([],))
        name = message.value("name")
        message.done()
        found.append({"role": role, "content": content, **({"name": name} if isinstance(name, str) else {})})
    return found


def _part(part: object, number: int) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise refused(
        f"messages[{number}].content has a part that is no text: this model reads texts alone", "messages"
    )


def room_for(asked: Asked, prompt: Sequence[int], models: ServedModels, allowed: ServeOptions) -> int:
    """How many new tokens an answer to a prompt may have. Raises ApiError where the prompt leaves no room for those asked for."""
    given = models.engine.decoder()
    assert given is not None
    decoder = joining(given)
    limit, longest = decoder.cache.limit, decoder.longest_encoded
    if longest is not None and len(prompt) > longest:
        raise ApiError(
            400, f"the prompt has {len(prompt)} tokens, more than the {longest} that this model's encoder takes: shorten it",
            code="context_length_exceeded",
        )  # fmt: skip
    taken = (
        0 if decoder.encoder_inputs else len(prompt)
    )  # the answer of an encoder-decoder has positions of its own
    left = None if limit is None or allowed.window is not None else limit - taken
    if left is not None and left < (asked.most_new or 1):
        raise ApiError(
            400, f"the prompt has {len(prompt)} tokens, which with {asked.most_new or 1} new ones are more than the {limit} positions of "
            "this model: shorten it, or ask for fewer" if taken else f"{asked.most_new or 1} new tokens are more than the {limit} positions "
            "of this model: ask for fewer", code="context_length_exceeded",
        )  # fmt: skip
    bounds = [item for item in (asked.most_new, left, allowed.most_tokens) if item is not None]
    return min(bounds) if bounds else UNBOUNDED
