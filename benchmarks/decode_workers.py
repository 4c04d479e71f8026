"""What generates in `decode.py`, one contestant a process: requests come as lines of JSON, answers go back as lines of JSON.

A request is {"prompts": [[id, ...], ...], "new": N}, answered by {"prefill_s", "decode_s", "ids"}, or {"score": [[id, ...], ...]}, answered by
{"nll", "count"}: the negative log-likelihood of all ids but the first of each text, summed, and their number.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.contestant import megabytes

Ids = Sequence[Sequence[int]]


class Contestant(Protocol):
    """A model that continues prompts of one length greedily, and scores texts."""

    def generate(self, prompts: Ids, new: int) -> dict[str, Any]:
        """The new ids of each prompt, the seconds of the prompts and those of all tokens but the first."""

    def logits(self, text: Sequence[int]) -> np.ndarray:
        """f[S, V] of one text."""


def nll(logits: np.ndarray, text: Sequence[int]) -> float:
    """The negative log-likelihood of a text's ids, but of the first one."""
    scores = logits[:-1].astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    picked = scores[np.arange(len(scores)), np.asarray(text[1:])]
    return float((np.log(np.exp(scores).sum(-1)) - picked).sum())


class Ours:
    """An engine of bmgraph, from a bundle."""

    speculate = False

    def __init__(self, source: Path, threads: int) -> None:
        import bmgraph as bg

        self._engine: Any = bg.load(source, threads=threads)
        self._engine.tokenizer = None

    def generate(self, prompts: Ids, new: int) -> dict[str, Any]:
        given = [list(row) for row in prompts]
        ids = self._engine.generate(given, max_new_tokens=new, eos=(), speculate=self.speculate)
        speed = self._engine.speed
        found = {"ids": ids, "prefill_s": speed.prefill_seconds, "decode_s": speed.decode_seconds}
        return {**found, "per_step": speed.per_step} if self.speculate else found

    def logits(self, text: Sequence[int]) -> np.ndarray:
        import torch

        ids = torch.tensor([list(text)])
        found: np.ndarray = self._engine(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"][
            0
        ].numpy()
        return found


class Speculating(Ours):
    """An engine of bmgraph that guesses ahead."""

    speculate = True


class Transformers:
    """transformers in fp32, with its own cache."""

    def __init__(self, source: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float32).eval()

    def generate(self, prompts: Ids, new: int) -> dict[str, Any]:
        import torch
        from transformers import DynamicCache

        found, cache, tokens = [], DynamicCache(), torch.tensor([list(row) for row in prompts])
        begin = time.perf_counter()
        with torch.inference_mode():
            for step in range(new):
                out = self._model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                tokens = out.logits[:, -1].argmax(-1, keepdim=True)
                found.append(tokens[:, 0].tolist())
                if not step:
                    first = time.perf_counter()
        end = time.perf_counter()
        return {"ids": list(map(list, zip(*found))), "prefill_s": first - begin, "decode_s": end - first}

    def logits(self, text: Sequence[int]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self._model(input_ids=torch.tensor([list(text)])).logits[0].numpy()  # type: ignore[no-any-return]


class Genai:
    """onnxruntime-genai, whose config says how many threads."""

    def __init__(self, source: Path, threads: int) -> None:
        import onnxruntime_genai

        self._og: Any = onnxruntime_genai
        self._model = onnxruntime_genai.Model(str(source))

    def _generator(self, rows: int, length: int) -> Any:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=length, min_length=length, batch_size=rows, do_sample=False)
        return self._og.Generator(self._model, params)

    def generate(self, prompts: Ids, new: int) -> dict[str, Any]:
        tokens = np.array([list(row) for row in prompts], np.int32)
        begin = time.perf_counter()
        generator, found = self._generator(len(tokens), tokens.shape[1] + new), []
        generator.append_tokens(tokens)
        for step in range(new):
            generator.generate_next_token()
            found.append(np.array(generator.get_next_tokens()).tolist())
            if not step:
                first = time.perf_counter()
        end = time.perf_counter()
        return {"ids": list(map(list, zip(*found))), "prefill_s": first - begin, "decode_s": end - first}

    def logits(self, text: Sequence[int]) -> np.ndarray:
        generator = self._generator(1, len(text) + 1)
        generator.append_tokens(np.array([list(text)], np.int32))
        found: np.ndarray = np.array(generator.get_output("logits"))[0]
        return found


class LlamaCpp:
    """llama.cpp by its own interface, which takes several sequences in one batch."""

    def __init__(self, source: Path, threads: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self._threads = threads
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(source).encode(), params)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def _context(self, rows: int, length: int) -> Any:
        params = self._api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = rows * max(256, length), rows * length, rows * length
        params.n_seq_max, params.n_threads, params.n_threads_batch = rows, self._threads, self._threads
        if hasattr(params, "flash_attn_type"):
            params.flash_attn_type = 1
        elif hasattr(params, "flash_attn"):
            params.flash_attn = True
        return self._api.llama_init_from_model(self._model, params)

    def _decode(self, context: Any, batch: Any, tokens: np.ndarray, begin: int, every: bool) -> None:
        """Run ids i[B, S] at positions from `begin` on, with logits of all positions or of the last."""
        count = 0
        for row, ids in enumerate(tokens):
            for place, item in enumerate(ids):
                batch.token[count], batch.pos[count] = int(item), begin + place
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, row
                batch.logits[count] = int(every or place == len(ids) - 1)
                count += 1
        batch.n_tokens = count
        if self._api.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def _row(self, context: Any, index: int) -> np.ndarray:
        return np.ctypeslib.as_array(self._api.llama_get_logits_ith(context, index), (self._vocabulary,))

    def generate(self, prompts: Ids, new: int) -> dict[str, Any]:
        tokens = np.array([list(row) for row in prompts])
        rows, length = tokens.shape
        context, found = self._context(rows, length + new), []
        batch = self._api.llama_batch_init(rows * length, 0, 1)
        begin = time.perf_counter()
        given = tokens
        for step in range(new):
            self._decode(context, batch, given, 0 if not step else length + step - 1, False)
            last = [(row + 1) * given.shape[1] - 1 for row in range(rows)]
            picked = [int(self._row(context, index).argmax()) for index in last]
            found.append(picked)
            given = np.array(picked)[:, None]
            if not step:
                first = time.perf_counter()
        end = time.perf_counter()
        self._api.llama_batch_free(batch)
        self._api.llama_free(context)
        return {"ids": list(map(list, zip(*found))), "prefill_s": first - begin, "decode_s": end - first}

    def logits(self, text: Sequence[int]) -> np.ndarray:
        context, batch = self._context(1, len(text)), self._api.llama_batch_init(len(text), 0, 1)
        self._decode(context, batch, np.array([list(text)]), 0, True)
        found = np.stack([self._row(context, index).copy() for index in range(len(text))])
        self._api.llama_batch_free(batch)
        self._api.llama_free(context)
        return found


KINDS: dict[str, Any] = {
    "bmgraph": Ours, "bmgraph speculating": Speculating, "transformers": Transformers, "genai": Genai, "llama.cpp": LlamaCpp,
}  # fmt: skip


def answer(contestant: Contestant, request: dict[str, Any]) -> dict[str, Any]:
    """What a contestant makes of a request, with the process's largest memory so far in MiB."""
    if "score" in request:
        texts = request["score"]
        found: dict[str, Any] = {
            "nll": sum(nll(contestant.logits(text), text) for text in texts),
            "count": sum(len(text) - 1 for text in texts),
        }
    else:
        found = contestant.generate(request["prompts"], request["new"])
    return {**found, "peak_mib": megabytes("VmHWM")}


def main() -> None:
    """Answer requests until there are no more."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("source", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    contestant = KINDS[options.kind](options.source, options.threads)
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(contestant, json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
