"""Rows of one batch that choose among LoRAs: beside PEFT's mixed batches, a loop over the deltas, and the bare backbone.

Llama layers of SmolLM2-135M's shape with random weights, LoRAs of ranks 4, 8 and 16 on all seven linears of each; the vocabulary is
small, so that the head does not hide what deltas cost. All but the first delta are added while the engines run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bmgraph as bg
from bmgraph.backends import Onnx
from bmgraph.benchmarking import Comparison
from bmgraph.ir.pass_record import machine
from bmgraph.passes import Deltas, Quantize
from bmgraph.verify.metrics import relative_error

HERE = Path(__file__).parent
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANKS = (16, 8, 4)
ROWS, TOKENS, VOCABULARY = 32, 128, 2048

INT8 = Quantize("int8", activations="static", outliers=False, site_drift=1.0)
"""Without copies of channels, so that deltas that were trained on the model fit; the weights are random, so that drift says little."""

Call = Callable[[], Any]


def backbone(layers: int) -> Any:
    """A Llama of SmolLM2-135M's widths."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=VOCABULARY, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def with_adapters(model: Any, count: int, folder: Path) -> Any:
    """PEFT's model with so many LoRAs of random values, each saved in a folder of its name."""
    from peft import LoraConfig, get_peft_model

    made: Any = None
    for index in range(count):
        rank = RANKS[index % len(RANKS)]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LINEARS))
        if made is None:
            made = get_peft_model(model, config, adapter_name="d0")
        else:
            made.add_adapter(f"d{index}", config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            if "lora_" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * tensor.shape[1] ** -0.5 * 0.3)
    for index in range(count):
        made.save_pretrained(folder, selected_adapters=[f"d{index}"])
    return made.eval()


def merged(layers: int, peft_model: Any, name: str) -> Any:
    """The backbone with one LoRA in its weights, by the formula."""
    model, modules = backbone(layers), dict(peft_model.base_model.model.named_modules())
    with torch.no_grad():
        for path, module in model.named_modules():
            if path.rpartition(".")[2] in LINEARS:
                lora = modules[path]
                a, b = lora.lora_A[name].weight, lora.lora_B[name].weight
                module.weight += lora.scaling[name] * (b @ a)
    return model


class Served:
    """Engines of one backbone, bare and with a table of deltas, for whole batches and for generation."""

    def __init__(
        self, program: bg.Program, passes: list[Any], count: int, folder: Path, calibration: Any, threads: int
    ) -> None:
        program = bg.Pipeline(passes).run(program, calibration=[calibration], verify="off")
        table = Deltas(("d0",), capacity=count, rank=max(RANKS))
        resources = {"d0": folder / "d0"}
        self.bare, self.rows = (
            bg.compile(program, own, backend=Onnx(threads=threads), resources=resources, verify="off")
            for own in ([], [table])
        )
        self.bare_decoder, self.rows_decoder = (
            bg.compile(
                program, own, backend=Onnx(threads=threads, generate=True), resources=resources, verify="off"
            )
            for own in ([], [table])
        )
        self.seconds = []
        for index in range(1, count):
            for engine in (self.rows, self.rows_decoder):
                begin = time.perf_counter()
                engine.deltas.add(f"d{index}", folder / f"d{index}")
                self.seconds.append(time.perf_counter() - begin)

    def decode(self, engine: Any, batch: dict[str, torch.Tensor], names: list[str] | None) -> Call:
        """One decode step of all rows after the tokens of the batch, whose cache does not grow."""
        decoder = engine.decoder()
        feeds = {"input_ids": batch["input_ids"].numpy()}
        chosen = {} if names is None else {"delta": torch.tensor(engine.deltas.numbers(names)).numpy()}
        state = decoder.start(len(batch["input_ids"]), {}, TOKENS + 1)

        def step(ids: Any) -> Any:
            length = TOKENS + (ids.shape[1] == 1)
            given = {decoder.cache.tokens.name: ids, **chosen}
            if decoder.cache.mask is not None:
                given[decoder.cache.mask.name] = torch.ones(len(ids), length, dtype=torch.int64).numpy()
            if decoder.cache.scored is not None:
                given[decoder.cache.scored.name] = torch.tensor([ids.shape[1] - 1]).numpy()
            return state.step(given)

        step(feeds["input_ids"])
        memory, one = state._memory, feeds["input_ids"][:, :1]
        held, values = memory.held, dict(memory._values)

        def call() -> Any:
            memory.held, memory._values = held, dict(values)
            return step(one)

        return call


def peft_calls(peft_model: Any, batch: dict[str, torch.Tensor], names: list[str]) -> dict[str, Call]:
    """A mixed batch, and a loop over the deltas: whole batches, and one decode step after one."""
    groups = {name: [row for row, own in enumerate(names) if own == name] for name in dict.fromkeys(names)}

    def loop(run: Callable[[list[int], dict[str, Any]], Any]) -> list[Any]:
        found = []
        for name, rows in groups.items():
            peft_model.set_adapter(name)
            found.append(run(rows, {}))
        return found

    def whole(rows: list[int], options: dict[str, Any]) -> Any:
        own = {key: value[rows] for key, value in batch.items()}
        return peft_model(**own, **options, use_cache=False).logits

    every = list(range(ROWS))
    cached = peft_model(**batch, adapter_names=names, use_cache=True).past_key_values
    parts = {
        name: peft_model(
            **{key: value[rows] for key, value in batch.items()}, adapter_names=[name] * len(rows), use_cache=True
        ).past_key_values
        for name, rows in groups.items()
    }  # fmt: skip

    def step(rows: list[int], options: dict[str, Any], cache: Any) -> Any:
        mask = torch.ones(len(rows), TOKENS + 1, dtype=torch.int64)
        ids = batch["input_ids"][rows][:, :1]
        logits = peft_model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, **options, use_cache=True
        ).logits
        cache.crop(-1)
        return logits

    return {
        "peft mixed": lambda: whole(every, {"adapter_names": names}),
        "peft loop": lambda: loop(whole),
        "peft mixed decode": lambda: step(every, {"adapter_names": names}, cached),
        "peft loop decode": lambda: loop(lambda rows, options: step(rows, options, parts[names[rows[0]]])),
    }


def main() -> None:
    """Time all arms in turn, compare outputs, and write results/multidelta.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 32, 256])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=("cpu", "wall"), default="cpu", help="wall: on a machine that does nothing else"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--decode-runs", type=int, default=15)
    parser.add_argument("--out", default=str(HERE / "results" / "multidelta.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found: dict[str, Any] = {
        "layers": options.layers,
        "rows": ROWS,
        "tokens": TOKENS,
        "vocabulary": VOCABULARY,
    }
    found |= {
        "threads": options.threads,
        "measured": f"{options.clock} time, arms in turn",
        "machine": machine(),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder, most = Path(temporary), max(options.counts)
        peft_model = with_adapters(backbone(options.layers), most, folder)
        print(f"PEFT: {time.process_time():.0f} CPU s", flush=True)
        example = {name: value[:2] for name, value in batch.items()}
        program = bg.capture(backbone(options.layers), example)
        served = {
            kind: Served(program, passes, most, folder, batch, options.threads)
            for kind, passes in (("fp32", []), ("int8", [INT8]))
        }
        print(f"engines: {time.process_time():.0f} CPU s", flush=True)
        found["table_mb"] = served["fp32"].rows.deltas.bytes / 1e6
        found["add_ms"] = {
            "median": 1e3 * statistics.median(served["fp32"].seconds),
            "largest": 1e3 * max(served["fp32"].seconds),
        }
        for count in options.counts:
            names = [f"d{row * max(1, count // ROWS) % count}" for row in range(ROWS)]
            found[str(count)] = compare(served, peft_model, batch, names, options)
            print(count, json.dumps(found[str(count)]["ratios"], indent=1), flush=True)
            Path(options.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def compare(
    served: dict[str, Served], peft_model: Any, batch: dict[str, torch.Tensor], names: list[str], options: Any
) -> dict[str, Any]:
    """Times, ratios and errors where row i chooses `names[i]`."""
    peft = peft_calls(peft_model, batch, names)
    arms: dict[str, Call] = {name: call for name, call in peft.items() if "decode" not in name}
    steps: dict[str, Call] = {name: call for name, call in peft.items() if "decode" in name}
    for kind, own in served.items():
        arms[f"bare {kind}"] = lambda own=own: own.bare(**batch)  # type: ignore[misc]
        arms[f"rows {kind}"] = lambda own=own: own.rows(**batch, delta=names)  # type: ignore[misc]
        steps[f"bare {kind} decode"] = own.decode(own.bare_decoder, batch, None)
        steps[f"rows {kind} decode"] = own.decode(own.rows_decoder, batch, names)
    whole = timed(arms, options.runs, 1, options.clock)
    print({name: round(whole.median(name)) for name in arms}, flush=True)
    decode = timed(steps, options.decode_runs, 2, options.clock)
    print({name: round(decode.median(name), 1) for name in steps}, flush=True)
    ratios = {}
    for kind in served:
        ratios[f"{kind}: rows / bare"] = 1 / whole.speedup(f"rows {kind}", f"bare {kind}")
        ratios[f"{kind}: over peft mixed"] = whole.speedup(f"rows {kind}", "peft mixed")
        ratios[f"{kind}: over peft loop"] = whole.speedup(f"rows {kind}", "peft loop")
        ratios[f"{kind} decode: rows / bare"] = 1 / decode.speedup(
            f"rows {kind} decode", f"bare {kind} decode"
        )
        ratios[f"{kind} decode: over peft mixed"] = decode.speedup(f"rows {kind} decode", "peft mixed decode")
        ratios[f"{kind} decode: over peft loop"] = decode.speedup(f"rows {kind} decode", "peft loop decode")
    logits = arms["rows fp32"]()["logits"]
    alone = merged_rows(peft_model, batch, names)
    errors = {row: float(relative_error(logits[row], value)) for row, value in alone.items()}
    int8 = arms["rows int8"]()["logits"]
    drift = {row: float(relative_error(int8[row], value)) for row, value in alone.items()}
    return {
        "ratios": ratios,
        "whole": whole.as_json(),
        "decode": decode.as_json(),
        "largest_error_to_merged": max(errors.values()),
        "int8_drift_to_merged": max(drift.values()),
    }


def timed(arms: dict[str, Call], runs: int, warmup: int, clock: str) -> Comparison:
    """Milliseconds of each arm, in turn: CPU time of all threads, which other work on the machine does not count in, or wall time."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(warmup + runs):
        for name, call in arms.items():
            begin = now()
            call()
            if index >= warmup:
                found[name].append(1e3 * (now() - begin))
    return Comparison(next(iter(arms)), found, "CPU time of all threads" if clock == "cpu" else "wall time")


def merged_rows(peft_model: Any, batch: dict[str, torch.Tensor], names: list[str]) -> dict[int, Any]:
    """Some rows by the backbone with their delta merged."""
    layers = peft_model.config.num_hidden_layers
    found = {}
    for row in (0, ROWS // 2 + 1, ROWS - 1):
        model = merged(layers, peft_model, names[row])
        found[row] = model(**{key: value[[row]] for key, value in batch.items()}).logits[0]
    return found


if __name__ == "__main__":
    main()
