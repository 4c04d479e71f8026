"""`engine.generate` and `engine.submit`: check prompts and options, run the decode loop or join the batch, return or stream text or ids."""

from __future__ import annotations

import threading
import weakref
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bmgraph.errors import InputError
from bmgraph.ir.generation_defaults import GenerationDefaults
from bmgraph.ir.given_tensor import as_tensor
from bmgraph.runtime.delta_slots import Hold
from bmgraph.runtime.engine_base import Engine, renamed
from bmgraph.runtime.generation.batching.joining import JoiningDecoder, check_encoded, joining
from bmgraph.runtime.generation.batching.options import Batching
from bmgraph.runtime.generation.batching.request import Request
from bmgraph.runtime.generation.batching.scheduler import Scheduler
from bmgraph.runtime.generation.beam_search import BeamLoop, BeamSearch
from bmgraph.runtime.generation.call_options import (
    BOUND,
    GENERATE_OPTIONS,
    SUBMIT_OPTIONS,
    answers_each,
    as_list,
    pad_id,
    split_options,
    start_id,
    token_count,
)
from bmgraph.runtime.generation.chat_template import Message
from bmgraph.runtime.generation.choices import Choices, ChoosingRow
from bmgraph.runtime.generation.decode_loop import (
    DecodeLoop,
    Decoder,
    Loop,
    Speed,
    beginnings,
    check_memory,
    check_prompts,
)
from bmgraph.runtime.generation.detokenizer import TextStream
from bmgraph.runtime.generation.hf_call import check_absent, new_ids, tensor_call
from bmgraph.runtime.generation.json_grammar import JsonGrammar
from bmgraph.runtime.generation.logprobs import score_count
from bmgraph.runtime.generation.option_checks import shown, whole_number
from bmgraph.runtime.generation.sampling import Constraint, Sampler
from bmgraph.runtime.generation.scored_answers import scored_answers
from bmgraph.runtime.generation.sliding_window import SlidingWindow, window_of
from bmgraph.runtime.generation.speculation import SpeculativeLoop, draft_count, rewinding
from bmgraph.runtime.generation.tokenizer import NO_CHAT, Tokenizer
from bmgraph.utils.tokenizer_json import check_characters

NO_CACHE = "this engine has no cache: compile with generate=True, as in Onnx(generate=True)"

Piece = tuple[int, Any]
"""(row, new piece of text), or (row, new id) without a tokenizer."""

_STARTING = threading.Lock()
"""Held while an engine gets its scheduler."""


class GeneratingEngine(Engine):
    """An engine that can generate if its program has a KV cache.

    `tokenizer` turns text into ids and back; `generation` is what the model's own config says of ids and lengths; `speed`
    is that of the last generation. `batching` are the limits of `submit`, read when its first request comes.
    """

    tokenizer: Tokenizer | None = None
    speed: Speed = Speed()
    batching: Batching = Batching()
    _scheduler: Scheduler | None = None
    generation: GenerationDefaults = GenerationDefaults()

    @abstractmethod
    def decoder(self) -> Decoder | None:
        """What the decode loop runs on; None if the program has no KV cache."""

    def generate(
        self,
        prompts: Any = None,
        *,
        input_ids: Any = None,
        max_new_tokens: int | None = None,
        stream: bool = False,
        stop: str | Sequence[str] = (),
        eos: int | Sequence[int] | None = None,
        start: int | None = None,
        n: int = 1,
        speculate: bool | int = False,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        logprobs: int | bool | None = None,
        window: int | bool | None = None,
        keep: int = 0,
        **options: Any,
    ) -> Any:
        """Continue each prompt until `max_new_tokens`, an id of `eos` or a string of `stop`.

        prompts: a text, a sequence of ids, or a list of either, of any lengths. The results are texts if the engine has a
        tokenizer, else lists of ids; they hold neither the prompt nor the eos id or stop string. stream: return an iterator
        over pieces as they are produced, for a list of prompts over (row, piece). n: so many answers to each prompt, sampled, in a list
        for each; streamed they are rows n * prompt to n * prompt + n - 1. start: the id that the decoder of an
        encoder-decoder model starts with. By default start, eos and the number of tokens are those of the model's generation
        config (`generation`), then the tokenizer's eos and 64 tokens; a number of tokens that was not given is cut to what the
        model has positions for. speculate: guess the ids that follow from the text itself, and read several in one step, on ONNX
        Runtime's CPU: True, or how many ids a step guesses at most, up to 15. The results, sampled ones too, are those of
        speculate=0, which guesses none and also reads two positions in a step; without speculate= a step reads one, by other
        kernels, which may choose another id where two are almost equally likely. Rows then run one by one: several pay only where
        texts repeat. num_beams, length_penalty, early_stopping: search for the likeliest texts with so many beams, as Hugging
        Face's `generate` does (`BeamSearch`); n of them come back, best first. logprobs: each result is an
        `Answer` with the log probability of each id, and those of so many of the likeliest ids. window: go on beyond the positions of the
        model (True), or beyond so many: where a text is longer, its oldest ids go but the first `keep`, and the newest half of what fits
        is read again (`SlidingWindow`; of decoders, without beams and speculation); without it a text ends at the limit. options: those of `Sampling` (temperature, top_k, top_p, min_p, seed) and `Penalties`
        (repetition_penalty, presence_penalty, frequency_penalty, no_repeat_ngram_size, min_new_tokens, logit_bias), `choices` (a list of
        texts, or of ids without a tokenizer, one of which each result is; each step then leaves only ids that go on with one of them, and
        sampling draws among these), `json` (True: each result is a JSON object; a JSON schema as a dict: one that it allows; needs the
        extra "json"), and the program's inputs with one value per prompt. `speed` holds the tokens per second, and per step, afterwards.

        input_ids: a call in the form of Hugging Face's `generate`, which takes padded ids i64[B, S] with `attention_mask=`, and options
        under its names (max_length, do_sample, eos_token_id, ...); it returns ids i64[B, length] as that does, with the prompt in front
        (`hf_call.py`). What engines have no counterpart of is refused by name.

        Raises InputError, before anything runs, for an unknown option and for a prompt that is empty, too long for the
        model's positions, or holds ids outside the vocabulary, and for speculate= where the engine cannot take back what was
        guessed. Raises BackendError for speculate= where a token's bits depend on those that run beside it.
        """
        decoder = self.decoder()
        if decoder is None:
            raise InputError(NO_CACHE)
        shared: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "num_beams": num_beams, "length_penalty": length_penalty,
            "early_stopping": early_stopping, "window": window, "keep": keep,
        }  # fmt: skip
        if input_ids is not None:
            check_absent(
                prompts=prompts, stream=stream, stop=stop, eos=eos, start=start, n=n, speculate=speculate, logprobs=logprobs
            )  # fmt: skip
            return self._generate_tensor(decoder, input_ids, {**options, **shared})
        items, single = as_list(prompts)
        ids = [self._ids(item, index) for index, item in enumerate(items)]
        scores = score_count(logprobs)
        if scores is not None and (stream or num_beams != 1 or draft_count(speculate) is not None):
            raise InputError(
                "logprobs with stream, num_beams or speculate: leave one of them out (engine.submit streams with logprobs)"
            )
        stops = self._stops(stop)
        loop, hold, each = self._begun(
            decoder, ids, eos=eos, start=start, n=n, speculate=speculate, scores=scores, **shared, **options
        )
        if scores is not None and isinstance(loop, DecodeLoop):
            with hold or nullcontext():
                asked = [prompt for prompt in ids for _ in range(each)]
                return _grouped(scored_answers(loop, asked, self.tokenizer, stops), each, single)
        pieces = _id_pieces(loop) if self.tokenizer is None else _text_pieces(loop, self.tokenizer, stops)
        if hold is not None:
            pieces = _until_the_end(pieces, hold)
        if stream:
            return (piece for _, piece in pieces) if single and each == 1 else pieces
        rows: list[list[Any]] = [[] for _ in loop.done]
        for row, piece in pieces:
            rows[row].append(piece)
        results: list[Any] = rows if self.tokenizer is None else ["".join(row_pieces) for row_pieces in rows]
        return _grouped(results, each, single)

    def chat(self, messages: Sequence[Message], **options: Any) -> Any:
        """Answer a conversation, {"role": ..., "content": ...} one after the other, by the tokenizer's chat template.

        Returns the assistant's text, or with stream=True an iterator over its pieces; `options` are those of `generate`.

        Raises InputError if the engine has no tokenizer with a chat template, for messages that the template does not take,
        and what `generate` raises.
        """
        if self.tokenizer is None:
            raise InputError(NO_CHAT)
        return self.generate(self.tokenizer.encode_chat(messages), **options)

    def submit(
        self,
        prompt: Any,
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        eos: int | Sequence[int] | None = None,
        logprobs: int | bool | None = None,
        answer: int = 0,
        start: int | None = None,
        window: int | bool | None = None,
        keep: int = 0,
        **options: Any,
    ) -> Request:
        """Let a prompt be continued beside those of other calls; returns at once with the handle of the request.

        Requests join and leave one batch between its steps, so several are faster than one after the other. Iterate over the handle
        for pieces of text (ids without a tokenizer) as they come; `result()` waits for the whole `Answer`, `cancel()` ends it. The
        ids are those that `generate` gives for the prompt alone with the same options, but where two ids are almost equally likely: the
        engine's kernels for several rows round otherwise than those for one.

        prompt: a text or ids. max_new_tokens, stop, eos, start, window, keep and options (sampling, penalties, choices, json, a delta for
        the prompt): as of `generate`.
        logprobs: with each id its log probability, and those of so many of the likeliest ids. answer: 1, 2, ... for the answers
        that `generate(n=)` gives beside the first. `batching` limits what runs, waits and takes memory.

        Raises InputError as `generate` does, where rows cannot join (TensorRT), and for a request that needs more
        cache than there may be; BusyError where as many requests wait as may.
        """
        decoder = self.decoder()
        if decoder is None:
            raise InputError(NO_CACHE)
        rows = joining(decoder)
        items, single = as_list(prompt)
        if not single:
            raise InputError("submit takes one prompt: call it once for each")
        ids, stops = self._ids(items[0], 0), self._stops(stop)
        scores, number = score_count(logprobs), whole_number("answer", answer)
        slides = window_of(decoder.cache, bool(decoder.encoder_inputs), window, keep)
        hold = self._held(options, 1)
        try:
            chosen = self._chosen(options, hold)
            sampling, row_inputs = split_options(decoder, chosen, 1, "submit", SUBMIT_OPTIONS)
            ends = self._eos_ids(eos, decoder)
            count = token_count(decoder, [ids], max_new_tokens, self.generation, slides=slides is not None)
            check_prompts(decoder, [ids], count, slides)
            first = start_id(decoder, start, self.generation)
            check_encoded(rows, ids)
            choosing, begun = (
                self._choosing(decoder, options, 1, ends, count),
                beginnings(decoder, [ids], first),
            )
            sampler = Sampler(sampling, 1, begun, ends, logprobs=scores, first=number, choosing=choosing)
            stream = None if self.tokenizer is None else TextStream(self.tokenizer, stops)
            encoded = None if first is None else (first, pad_id(decoder, self.generation))
            request = Request(
                ids,
                count,
                sampler,
                ends,
                row_inputs,
                stream,
                hold,
                owner=self,
                window=slides,
                encoded=encoded,
            )
            self.scheduler(rows).submit(request)
        except BaseException:
            if hold is not None:
                hold.release()
            raise
        return request

    def scheduler(self, decoder: JoiningDecoder | None = None) -> Scheduler:
        """What runs the requests of `submit`, in its own thread; made and started by the first call.

        Raises InputError where requests cannot join a batch.
        """
        with _STARTING:
            found = self._scheduler
            if found is None or found.stopped or found.is_foreign:
                given = self.decoder() if decoder is None else decoder
                if given is None:
                    raise InputError(NO_CACHE)
                found = self._scheduler = Scheduler(joining(given), self.batching)
                found.start()
                weakref.finalize(self, found.stop)
            return found

    def stop_batching(self) -> None:
        """End the requests that run and wait with an error, and the thread that runs them; a later `submit` starts anew."""
        with _STARTING:
            found, self._scheduler = self._scheduler, None
        if found is not None:
            found.stop()

    def _generate_tensor(self, decoder: Decoder, input_ids: Any, given: dict[str, Any]) -> torch.Tensor:
        """The results of a call in the form of Hugging Face's `generate`."""
        call = tensor_call(decoder, input_ids, given, self.generation, self._eos_ids(None, decoder))
        tokenizer = call.tokenizer or self.tokenizer
        stops = self._stops(call.stops, tokenizer)
        if stops and call.options.get("num_beams", 1) != 1:
            raise InputError("stop_strings with num_beams: leave one of them out")
        start = start_id(decoder, call.options.get("start"), self.generation)
        loop, hold, each = self._begun(decoder, call.prompts, **call.options)
        with hold or nullcontext():
            return call.result(new_ids(loop, tokenizer, stops), each, start)

    def _begun(
        self,
        decoder: Decoder,
        ids: list[list[int]],
        *,
        max_new_tokens: int | None = None,
        eos: int | Sequence[int] | None = None,
        start: int | None = None,
        n: int = 1,
        speculate: bool | int = False,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        scores: int | None = None,
        window: int | bool | None = None,
        keep: int = 0,
        **options: Any,
    ) -> tuple[Loop, Hold | None, int]:
        """The loop of a generation whose prompts and options are checked, the deltas that it holds, and its rows for a prompt."""
        search = BeamSearch(num_beams, length_penalty, early_stopping)
        each, drafts = answers_each(n, options, search), draft_count(speculate)
        if search.num_beams > 1 and drafts is not None:
            raise InputError(
                f"speculate with num_beams={search.num_beams}: a beam search reads no guesses; leave one of them out"
            )
        slides = window_of(decoder.cache, bool(decoder.encoder_inputs), window, keep)
        if slides is not None and (search.num_beams > 1 or drafts is not None):
            raise InputError("window with num_beams or speculate: leave one of them out")
        hold = self._held(options, len(ids))
        try:
            chosen = self._chosen(options, hold)
            loop = self._loop(
                decoder, ids, chosen, max_new_tokens, eos, start, each, drafts, search, scores, slides
            )
        except BaseException:
            if hold is not None:
                hold.release()
            raise
        self.speed = loop.speed
        return loop, hold, each

    def _loop(
        self,
        decoder: Decoder,
        ids: list[list[int]],
        options: dict[str, Any],
        max_new_tokens: int | None,
        eos: int | Sequence[int] | None,
        start: int | None,
        each: int,
        drafts: int | None,
        search: BeamSearch,
        scores: int | None,
        window: SlidingWindow | None,
    ) -> Loop:
        """The loop of a generation, whose prompts and options are checked, with `each` rows for a prompt; `drafts` as `draft_count`
        gives them."""
        sampling, row_inputs = split_options(decoder, options, len(ids), "generate", GENERATE_OPTIONS)
        ends = self._eos_ids(eos, decoder)
        start = start_id(decoder, start, self.generation)
        count = token_count(decoder, ids, max_new_tokens, self.generation, slides=window is not None)
        check_prompts(decoder, ids, count, window)
        check_memory(decoder, ids, count, max(each, search.num_beams), window)
        pad = pad_id(decoder, self.generation)
        choosing = self._choosing(decoder, options, len(ids) * each, ends, count)
        if choosing and (search.num_beams > 1 or drafts is not None):
            raise InputError("choices or json with num_beams or speculate: leave one of them out")
        if search.num_beams > 1:
            return BeamLoop(decoder, ids, count, sampling, ends, row_inputs, start, pad, each, search)
        rows = [prompt for prompt in ids for _ in range(each)]
        row_inputs = {name: value.repeat(each, 0) for name, value in row_inputs.items()}
        given = rows, count, sampling, ends, row_inputs, start, pad, each
        if drafts is None:
            return DecodeLoop(decoder, *given, logprobs=scores, choosing=choosing, window=window)
        return SpeculativeLoop(rewinding(decoder), *given, drafts)

    def _choosing(
        self, decoder: Decoder, options: dict[str, Any], rows: int, ends: Sequence[int], most: int
    ) -> Sequence[Constraint]:
        """What leaves only ids of the choices, or of JSON, to each row; nothing where neither is asked for. Raises InputError."""
        choices, given = (options.get(name) for name in BOUND)
        wanted = given is not None and given is not False
        if choices is None and not wanted:
            return []
        if choices is not None and wanted:
            raise InputError("choices with json: leave one of them out")
        count = int(decoder.cache.logits.shape[-1])
        if choices is not None:
            trie = Choices(choices, self.tokenizer, ends, count, most)
            return [ChoosingRow(trie) for _ in range(rows)]
        grammar = JsonGrammar(given, self.tokenizer, ends, count)
        return [grammar.row() for _ in range(rows)]

    def _chosen(self, options: dict[str, Any], hold: Hold | None) -> dict[str, Any]:
        """The options, with the numbers of the deltas that are held in the place of their names."""
        if hold is None or self.live is None or hasattr(options.get(self.live.form.input), "shape"):
            return options
        return {**options, self.live.form.input: torch.tensor(hold.numbers, dtype=torch.int64)}

    def rename_choice(self, name: str, names: tuple[str, ...]) -> None:
        """Let an input have other names for its values, for generation too."""
        super().rename_choice(name, names)
        decoder: Any = self.decoder()
        if decoder is not None:
            decoder.cache = replace(decoder.cache, others=renamed(decoder.cache.others, name, names))
            decoder.encoder_inputs = renamed(decoder.encoder_inputs, name, names)

    def _held(self, options: dict[str, Any], rows: int) -> Hold | None:
        """The deltas that the prompts choose, held until the generation ends; None where they choose none."""
        if self.live is None:
            return None
        name = self.live.form.input
        spec = next(spec for spec in self.inputs if spec.name == name)
        given = options.get(name)
        if not (given is None or isinstance(given, (str, list, tuple, torch.Tensor, np.ndarray))):
            return None  # the check of the options tells
        return self.hold_deltas(given, {str(spec.shape[0]): rows})

    def _ids(self, prompt: Any, index: int) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError(
                    f"prompt {index} is a text, and this engine has no tokenizer: give ids, or compile with "
                    "resources={'tokenizer': ...}"
                )
            check_characters(prompt, f"prompt {index}")
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, (torch.Tensor, np.ndarray)):
            ids = as_tensor(f"prompt {index}", prompt, "ids")
            if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
                raise InputError(
                    f"prompt {index} has dtype {prompt.dtype}: give integer ids, as .long() makes them"
                )
            if ids.dim() != 1:
                raise InputError(f"prompt {index} has shape {list(ids.shape)}: give ids of one dimension")
            return [int(item) for item in ids.tolist()]
        return list(prompt)

    def _stops(self, stop: str | Sequence[str], tokenizer: Tokenizer | None = None) -> tuple[str, ...]:
        if not isinstance(stop, (str, Sequence)):
            raise InputError(f"stop={shown(stop)}: give a text, or a list of texts")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if stops and self.tokenizer is None and tokenizer is None:
            raise InputError("stop strings need a tokenizer: compile with resources={'tokenizer': ...}")
        if not all(isinstance(item, str) and item for item in stops):
            raise InputError(f"stop={shown(stop)}: give non-empty strings")
        return stops

    def _eos_ids(self, eos: int | Sequence[int] | None, decoder: Decoder) -> tuple[int, ...]:
        if eos is None:
            return self.generation.eos or (self.tokenizer.eos_ids if self.tokenizer is not None else ())
        several = isinstance(eos, (Sequence, set, frozenset)) and not isinstance(eos, str)
        if isinstance(eos, (torch.Tensor, np.ndarray)):
            several = as_tensor("eos", eos, "ids").dim() == 1
        count = max(decoder.cache.vocabulary, int(decoder.cache.logits.shape[-1]))
        given: Any = eos
        ids = tuple(whole_number("eos", item) for item in (given if several else (given,)))
        for item in ids:
            if not 0 <= item < count:
                raise InputError(
                    f"eos={shown(item)}: this model has the ids 0 to {count - 1}; give () for a text that no id ends"
                )
        return ids


def _grouped(results: Sequence[Any], each: int, single: bool) -> Any:
    """The results of rows as they are returned: a list for each prompt that has several, one alone for a single prompt."""
    if each > 1:
        results = [list(results[begin : begin + each]) for begin in range(0, len(results), each)]
    return results[0] if single else list(results)


def _until_the_end(pieces: Iterator[Piece], hold: Hold) -> Iterator[Piece]:
    """The pieces; the deltas are held until they end, or nobody has the iterator any more."""
    with hold:
        yield from pieces


def _id_pieces(loop: Loop) -> Iterator[Piece]:
    for picked in loop:
        for row in np.flatnonzero(~loop.done):
            yield int(row), int(picked[row])


def _text_pieces(loop: Loop, tokenizer: Tokenizer, stops: tuple[str, ...]) -> Iterator[Piece]:
    streams = [TextStream(tokenizer, stops) for _ in loop.done]
    for picked in loop:
        for row, stream in enumerate(streams):
            piece = stream.finish() if loop.done[row] else stream.push(int(picked[row]))
            loop.done[row] |= stream.ended
            if piece:
                yield row, piece
    for row, stream in enumerate(streams):
        piece = stream.finish()
        if piece:
            yield row, piece
