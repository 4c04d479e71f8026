"""The commands: demo, compile, run, generate, chat, serve, inspect, bench, train, passes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bmgraph.cli.console import CleanConsole
from bmgraph.cli.one_line import Debug, exit_code_of, quiet_libraries
from bmgraph.errors import InputError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Compile big models: a PyTorch model, through ordered and verified passes, to a faster engine.",
)  # fmt: skip
console = CleanConsole()

SourceArgument = Annotated[
    str, typer.Argument(help="A Hugging Face folder, a .gguf file, or module:function.")
]
TrustOption = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        metavar="PACKAGE",
        help="Let a program call operators of this package; tensorrt: load a plan, which is native code. May be repeated.",
    ),
]
SpeculateOption = Annotated[
    bool,
    typer.Option("--speculate", help="Guess ahead from the text itself: faster, most where texts repeat."),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        help="Go on where a text has more tokens than this: the oldest go, and half of what fits is read again; 0: the model's positions."
    ),
]
KeepOption = Annotated[int, typer.Option(help="With --window: so many of the first tokens stay.")]
BundleArgument = Annotated[
    Path, typer.Argument(help="A folder written by compile, engine.save or program.save.")
]


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            envvar="BMGRAPH_DEBUG",
            help="Show the traceback of an error, and what libraries say beside it.",
        ),
    ] = False,
) -> None:
    context.ensure_object(Debug).on = debug
    if not debug:
        context.with_resource(quiet_libraries())


@app.command()
def demo(runs: Annotated[int, typer.Option(help="Timed runs of each contestant.")] = 10) -> None:
    """Compile a trained sentence encoder to an int8 engine, verify it, run it, and print speed, size and cosine."""
    from bmgraph.cli.demo import demo as run_demo

    run_demo(console, runs)


@app.command()
def compile(
    source: SourceArgument,
    out: Annotated[Path | None, typer.Option(help="The folder to write the engine to.")] = None,
    passes: Annotated[
        str, typer.Option(help="Passes in order, such as 'quantize{scheme=int8}'; see: bmgraph passes.")
    ] = "",
    backend: Annotated[
        str, typer.Option(help="What to lower to; auto: the fastest here, on the example.")
    ] = "onnx",
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="For passes that measure: a text file, one text a line, or a .safetensors file, one batch."
        ),
    ] = None,
    max_drift: Annotated[
        float | None, typer.Option(help="The largest relative L2 change of an output that passes may cause.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of an example, at most.")] = 128,
    generate: Annotated[
        bool, typer.Option("--generate", help="Give a decoder a KV cache, for bmgraph generate.")
    ] = False,
    kv_cache: Annotated[
        str, typer.Option(help="What that cache is kept in: float, or, on openvino, int8.")
    ] = "float",
    dump: Annotated[
        Path | None, typer.Option(help="A folder to write the program to after every pass.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="A folder that keeps what passes have finished: the same command goes on there if it was stopped. It is removed at the end."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what a pass fit{...} would choose, and build nothing.")
    ] = False,
) -> None:
    """Take a model through passes to an engine, verify it, and save it."""
    from bmgraph.backends import resolve_backend
    from bmgraph.cli.calibration import calibration_batches
    from bmgraph.cli.model_source import open_source
    from bmgraph.cli.output_file import check_output_folder
    from bmgraph.compiler import compile as compile_model
    from bmgraph.pass_manager.observers import Dump
    from bmgraph.pass_manager.pass_spec import parse_passes
    from bmgraph.passes import known_passes

    if out is not None:
        check_output_folder(out)
    elif not dry_run:
        raise InputError("give --out FOLDER, to which the engine is written, or --dry-run")
    config = replace(resolve_backend(backend), kv_cache=kv_cache)
    config.check_kv_cache()
    chosen = parse_passes(passes, known_passes())
    found = open_source(source, length)
    texts = generate and found.tokenizer is not None
    batches, note = (
        calibration_batches(found, calibration, length, texts) if chosen or calibration else (None, "")
    )
    for line in (*found.notes, *([note] if note else [])):
        console.print(f"note: {line}")
    resources = {"tokenizer": found.tokenizer} if found.tokenizer is not None else None
    if dry_run:
        from bmgraph.planning import plan

        planned = plan(
            found.model, chosen, example=found.example, backend=config.generating() if generate else config,
            calibration=batches, max_drift=max_drift, resources=resources,
        )  # fmt: skip
        console.print(planned)
        return
    engine = compile_model(
        found.model, chosen, example=found.example, backend=config.generating() if generate else config,
        calibration=batches, max_drift=max_drift, observers=[Dump(dump)] if dump else [],
        resources=resources, resume=resume,
    )  # fmt: skip
    console.print(engine.report)
    assert out is not None
    engine.save(out)
    console.print(f"saved to {out}; next: bmgraph {'generate' if generate else 'bench'} {out}")


@app.command()
def run(
    bundle: BundleArgument,
    inputs: Annotated[
        Path | None, typer.Option(help="A .safetensors file with the inputs; the saved example by default.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A .safetensors file to write the outputs to.")] = None,
    trust: TrustOption = None,
) -> None:
    """Run a saved engine or program on one batch."""
    from bmgraph.cli.output_file import check_output, write_output
    from bmgraph.loading import load
    from bmgraph.serialize.safetensors_io import read_tensors, write_tensors

    if output:
        check_output(output)
    loaded = load(bundle, trust=tuple(trust or ()))
    if inputs is not None and not inputs.is_file():
        raise InputError(f"there is no regular file {inputs}")
    batch = read_tensors(inputs) if inputs else loaded.example
    names = {spec.name for spec in loaded.inputs}
    found = loaded(**{name: value for name, value in batch.items() if inputs or name in names})
    for name, value in found.items():
        first = ", ".join(f"{item:.4f}" for item in value.reshape(-1)[:4].tolist())
        console.print(f"{name}: {str(value.dtype).removeprefix('torch.')}{list(value.shape)} {first}, ...")
    if output:
        write_output(output, lambda file: write_tensors(file, found))
        console.print(f"written to {output}")


@app.command()
def generate(
    bundle: BundleArgument,
    prompts: Annotated[
        list[str], typer.Argument(help="Texts, or ids such as '3 14 15' for an engine without a tokenizer.")
    ],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens at most; by default what the model's generation config says, else 64."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: the likeliest id; above: sample.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest ids with this share.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample among so many of the likeliest ids; 0: all.")] = 0,
    min_p: Annotated[
        float, typer.Option(help="Sample ids at least so many times as likely as the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: ids that were there become less likely.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends the answer; may be repeated.")
    ] = None,
    num_beams: Annotated[int, typer.Option(help="Search for the likeliest text with so many beams.")] = 1,
    speculate: SpeculateOption = False,
    window: WindowOption = None,
    keep: KeepOption = 0,
) -> None:
    """Continue texts with a saved engine that was compiled with --generate; it starts and ends as its folder says.

    The answer to a single prompt is printed as it comes, those to several at the end, one after the other. Without options the likeliest ids are
    taken; --temperature 0.8 --top-p 0.9 makes answers vary. For many prompts, bmgraph serve; for a conversation, bmgraph chat.

    Examples:

    bmgraph compile FOLDER --generate --out out/ && bmgraph generate out/ "Once upon a time" --max-new-tokens 50

    bmgraph generate out/ "First prompt" "Second prompt" --temperature 0.8 --seed 1 --stop "."
    """
    from bmgraph.cli.text_generation import generated_texts, slides

    options = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "repetition_penalty": repetition_penalty,
        "seed": seed, "max_new_tokens": max_new_tokens, "stop": tuple(stop or ()), "speculate": speculate, "num_beams": num_beams,
        **slides(window, keep),
    }  # fmt: skip
    for piece in generated_texts(bundle, prompts, options):
        console.print(piece, soft_wrap=True, end="")


@app.command()
def chat(
    bundle: BundleArgument,
    system: Annotated[str, typer.Option(help="What the model is told first.")] = "",
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0: the likeliest id; above: sample.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest ids with this share.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    speculate: SpeculateOption = False,
    window: WindowOption = None,
    keep: KeepOption = 0,
) -> None:
    """Talk with a saved engine whose tokenizer has a chat template: a line is answered before the next is read."""
    from bmgraph.cli.chat import chat as run_chat
    from bmgraph.cli.text_generation import slides

    options = {
        "temperature": temperature, "top_p": top_p, "seed": seed, "max_new_tokens": max_new_tokens, "speculate": speculate,
        **slides(window, keep),
    }  # fmt: skip
    run_chat(bundle, system, options, console)


@app.command()
def serve(
    bundle: BundleArgument,
    host: Annotated[
        str, typer.Option(help="The address to listen at; 0.0.0.0 for all of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen at; 0 for any free one.")] = 8000,
    name: Annotated[
        str, typer.Option(help="What clients call the model; by default its folder's name.")
    ] = "",
    delta: Annotated[
        list[str] | None,
        typer.Option(
            "--delta", metavar="NAME=FOLDER", help="A delta that clients call as a model; may be repeated."
        ),
    ] = None,
    deltas_from: Annotated[
        Path | None,
        typer.Option(help="Let clients add deltas from this folder and remove them, while the server runs."),
    ] = None,
    api_key: Annotated[
        str,
        typer.Option(
            envvar="BMGRAPH_API_KEY",
            help="What clients must send; better set in the environment.",
            show_default=False,
        ),
    ] = "",
    rows: Annotated[int, typer.Option(help="Answers that run together at most.")] = 32,
    waiting: Annotated[
        int, typer.Option(help="Answers that wait at most; more are refused (status 429).")
    ] = 256,
    cache: Annotated[
        str, typer.Option(help="What the KV cache may take, such as 2GB; by default half of the free memory.")
    ] = "",
    prefixes: Annotated[
        str,
        typer.Option(
            help="What of it keeps texts that were read, for prompts that begin alike; by default a quarter, 0 for none."
        ),
    ] = "",
    prefill: Annotated[
        int, typer.Option(help="Tokens of prompts read between two steps of the answers that run.")
    ] = 256,
    wide: Annotated[
        bool,
        typer.Option(
            help="Multiply weights in 4 bits as 8-bit integers in steps of many tokens, where that is faster, fits in memory and is as near."
        ),
    ] = True,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="New tokens of an answer at most; by default what the model has room for."),
    ] = None,
    window: WindowOption = None,
    keep: KeepOption = 0,
    max_body: Annotated[int, typer.Option(help="Bytes of a request at most.")] = 2**20,
    timeout: Annotated[float, typer.Option(help="Seconds until an answer is ended.")] = 600.0,
    embedding: Annotated[str, typer.Option(help="The output of an encoder that gives embeddings.")] = "",
    trust: TrustOption = None,
) -> None:
    """Serve a saved engine to clients of OpenAI's API, many at a time: completions and chat of one compiled with --generate,
    embeddings of an encoder. Deltas are models of their own. A page to chat is at /.

    Requests join and leave one batch between its steps: --rows of them at most, --waiting more in a queue, within --cache bytes. Health is
    at /health, metrics are at /metrics. After Ctrl-C or SIGTERM no more requests are taken, and those that run get 30 seconds.

    Examples:

    bmgraph serve out/ --port 8000 --delta trec=trec/

    curl localhost:8000/v1/completions -d '{"model": "out", "prompt": "Once upon a time", "max_tokens": 20}'
    """
    from bmgraph.cli.serving import serve_bundle
    from bmgraph.cli.text_generation import slides

    limits = {
        "rows": rows, "waiting": waiting, "cache": cache, "prefixes": prefixes, "prefill": prefill, "wide": wide,
    }  # fmt: skip
    allowed = {
        "api_key": api_key, "longest_body": max_body, "most_tokens": max_tokens, "seconds": timeout,
        "deltas_from": None if deltas_from is None else str(deltas_from), **slides(window, keep),
    }  # fmt: skip
    serve_bundle(
        bundle,
        limits,
        allowed,
        delta or [],
        console,
        host=host,
        port=port,
        name=name,
        embedding=embedding,
        trust=tuple(trust or ()),
    )


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="A bundle, or a model as compile takes it.")],
    text: Annotated[bool, typer.Option(help="Print the graph of a program.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
    tree: Annotated[
        bool, typer.Option(help="Print the modules: shapes, what trains, deltas, counts and shares.")
    ] = True,
    trust: TrustOption = None,
) -> None:
    """Show what a bundle holds, or the structure found in a model, and its modules: what of them trains, and where deltas are."""
    from bmgraph.cli.inspection import inspection
    from bmgraph.cli.model_source import open_source
    from bmgraph.cli.structure_table import structure_table
    from bmgraph.frontend.capture import capture
    from bmgraph.ir.program import Program
    from bmgraph.loading import load
    from bmgraph.runtime.engine_base import Engine
    from bmgraph.serialize.bundle import MANIFEST

    if (Path(source) / MANIFEST).exists():
        loaded: Program | Engine = load(source, trust=tuple(trust or ()))
    else:
        found = open_source(source)
        for line in () if as_json else found.notes:
            console.print(f"note: {line}")
        loaded = capture(found.model, found.example)
    if as_json:
        console.print(json.dumps(inspection(loaded), indent=2), soft_wrap=True)
        return
    console.print(repr(loaded))
    for spec in loaded.inputs:
        console.print(f"  takes {spec}")
    for spec in loaded.outputs:
        console.print(f"  gives {spec}")
    if isinstance(loaded, Program):
        console.print(structure_table(loaded.structure()))
        if tree:
            console.print(str(loaded.tree()), soft_wrap=True)
        for line in loaded.fixed:
            console.print(f"  fixed by the model: {line}")
        for line in loaded.narrower:
            console.print(f"note: {line}")
        if text:
            console.print(str(loaded))
    else:
        console.print(loaded.report)


@app.command()
def bench(
    bundles: Annotated[
        list[Path], typer.Argument(help="Saved engines or programs that take the same inputs.")
    ],
    runs: Annotated[int, typer.Option(help="Timed runs of each.")] = 20,
    out: Annotated[Path | None, typer.Option(help="A file to write the figures to, as JSON.")] = None,
    trust: TrustOption = None,
) -> None:
    """Time saved engines on their example, in interleaved runs, and profile each by operator; those that generate also in tokens per
    second."""
    from bmgraph.benchmarking import benchmark
    from bmgraph.cli.node_profile import profile_of
    from bmgraph.cli.output_file import check_output, write_output
    from bmgraph.loading import load
    from bmgraph.runtime.openvino.engine import OpenVinoEngine
    from bmgraph.runtime.ort.decode_speed import decode_speed
    from bmgraph.runtime.ort.engine import OrtEngine

    if out:
        check_output(out)
    loaded = {str(path): load(path, trust=tuple(trust or ())) for path in bundles}
    batch = next(iter(loaded.values())).example
    result = benchmark(loaded, batch, runs=runs)
    console.print(result)
    figures = result.as_json()
    for name, item in loaded.items():
        spent = profile_of(item, batch)
        if spent is not None:
            console.print(name, spent)
            figures["contestants"][name]["profile_us"] = spent.as_json()
            speed = decode_speed(item) if isinstance(item, (OrtEngine, OpenVinoEngine)) else None
            if speed is not None:
                console.print(speed)
                figures["contestants"][name]["generation"] = speed.as_json()
    if out:
        write_output(out, lambda file: _write_json(file, figures))


@app.command()
def train(
    config: Annotated[
        Path,
        typer.Argument(
            help="A YAML, JSON or TOML file: model, data, steps, optimizer, passes, ...; see docs/training.md."
        ),
    ],
) -> None:
    """Train a model as a file says; on several ranks: torchrun --nproc-per-node 2 -m bmgraph train FILE."""
    from bmgraph.cli.train import train as run_train

    run_train(config, console)


@app.command()
def passes() -> None:
    """List the passes with their options."""
    import dataclasses
    import inspect as python_inspect

    from rich.table import Table

    from bmgraph.passes import known_passes

    table = Table()
    for name in ("pass", "stage", "effect", "options", "what it does"):
        table.add_column(name)
    for name, kind in sorted(known_passes().items()):
        options = ", ".join(f"{field.name}={field.default!r}" for field in dataclasses.fields(kind))
        summary = (python_inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
        table.add_row(name, kind.acts_on, kind.effect, options, summary)
    console.print(table)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Run the command line; an error of any kind is printed as one line, with exit code 2."""
    debug = Debug()
    command = typer.main.get_command(app)
    sys.exit(exit_code_of(lambda: command.main(prog_name="bmgraph", standalone_mode=False, obj=debug), debug))


if __name__ == "__main__":
    main()
