"""What a window that slides costs: SmolLM2-135M in 4 bits on ONNX Runtime goes on with and without `window=`.

`python -m benchmarks.sliding_window [--new 600] [--window 256] [--keep 4] [--rounds 3]`: one prompt, two of unequal lengths, and two requests of
`submit`, in turn, whose processor seconds and wall-clock seconds a token are medians over the rounds; ids are those of `generate` on what is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import bmgraph as bg
from benchmarks import smollm2
from bmgraph.backends import Onnx
from bmgraph.passes import Quantize


def read_anew(engine: Any, prompt: list[int], new: int, size: int, keep: int) -> list[int]:
    """The greedy ids by calls of `generate` without a window, each on what a window keeps of the text."""
    view, found = list(prompt), list[int]()
    while len(found) < new:
        if len(view) > size:
            view = view[:keep] + view[-((size - keep) // 2) :]
        some = engine.generate(view, max_new_tokens=min(new - len(found), size + 1 - len(view)), eos=())
        found += some
        view += some
    return found


def timed(call: Callable[[], Any], tokens: int) -> tuple[float, float]:
    """Milliseconds of the processors and of the clock for each token."""
    processor, clock = time.process_time(), time.perf_counter()
    call()
    return tuple(
        (end - begin) / tokens * 1e3
        for end, begin in ((time.process_time(), processor), (time.perf_counter(), clock))
    )  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("new", 600), ("window", 256), ("keep", 4), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    model, tokenizer = smollm2.loaded()
    text = tokenizer("Once upon a time, in a small house by the sea, there lived", return_tensors="pt")
    engine = bg.compile(
        model,
        [Quantize("int4", embeddings=8)],
        example=dict(text),
        backend=Onnx(generate=True, threads=1),
        verify="structure",
    )
    one: list[int] = text["input_ids"][0].tolist()
    two = [one, one[:5]]
    slides = {"window": given.window, "keep": given.keep}

    def submitted(options: dict[str, Any]) -> list[Any]:
        made = [engine.submit(prompt, max_new_tokens=given.new, eos=(), **options) for prompt in two]
        return [request.result().ids for request in made]

    arms: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, options in (("without a window", {}), ("with a window", slides)):
        arms[f"one prompt, {name}"] = (
            lambda options=options: engine.generate(one, max_new_tokens=given.new, eos=(), **options),
            1,
        )
        arms[f"two prompts, {name}"] = (
            lambda options=options: engine.generate(two, max_new_tokens=given.new, eos=(), **options),
            2,
        )
        arms[f"two requests, {name}"] = lambda options=options: submitted(options), 2
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for _ in range(given.rounds):
        for name, (call, rows) in arms.items():
            times[name].append(timed(call, rows * given.new))
            print(
                f"{name}: {times[name][-1][0]:.2f} ms of the processor a token, {times[name][-1][1]:.2f} of the clock",
                flush=True,
            )
    found = engine.generate(one, max_new_tokens=given.new, eos=(), **slides)
    same = sum(a == b for a, b in zip(found, read_anew(engine, one, given.new, given.window, given.keep)))
    medians = {
        name: [round(statistics.median(column), 3) for column in zip(*rows)] for name, rows in times.items()
    }
    print(
        json.dumps(
            {
                "ms a token (processor, clock)": medians,
                "ids as generate gives them": f"{same} of {given.new}",
            },
            indent=1,
        )
    )
    engine.stop_batching()


if __name__ == "__main__":
    main()
