"""`rarefy bench`: several models timed side by side, or rarefy's own products."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from rarefy.cli.bench_kernels import time_kernels, time_packing
from rarefy.cli.console import stdout_console, write_json
from rarefy.cli.optional import compress_extra
from rarefy.cli.options import DebugFlag, JsonFlag
from rarefy.cli.progress import ProgressDisplay
from rarefy.core.errors import UsageError
from rarefy.report.units import format_bytes, format_number, printable


class BenchRuntime(StrEnum):
    """What runs the models."""

    ENGINE = "engine"
    TRANSFORMERS_FLOAT32 = "transformers-float32"
    TRANSFORMERS_BFLOAT16 = "transformers-bfloat16"


_COLUMNS = {
    "prompt_tokens_per_s": "prompt tok/s",
    "decode_tokens_per_s": "decode tok/s",
    "sequences_per_s": "sequences/s",
}


_MODEL_OPTIONS = ("models", "runtime", "prompt_tokens", "decode_tokens", "batch_size", "warmup")
_KERNEL_OPTIONS = ("layout", "shape", "rows", "packing")


def bench(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="Rarefy directories, Hugging Face directories or GGUF files.",
            show_default=False,
        ),
    ] = None,
    runtime: Annotated[
        list[BenchRuntime] | None,
        typer.Option(
            help="May be repeated. By default the engine for rarefy directories, and all that can run it for others.",
            show_default=False,
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of a prompt or sequence.")] = 128,
    decode_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens generated after it.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences per batch of an encoder.")] = 8,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Timed rounds; 5, or 9 with --kernels.", show_default=False),
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, metavar="N", help="Rounds before them.")] = 1,
    threads: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Threads to use; all cores if not given. With --kernels it may be repeated: 1 and all if not given.",
            show_default=False,
        ),
    ] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Time rarefy's products on random weights instead of models.")
    ] = False,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="With --kernels: a storage layout; may be repeated. All.", show_default=False
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OUTxIN",
            help="With --kernels: outputs and inputs; may be repeated. 4096x4096, 11008x4096, 2048x5632.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", help="With --kernels: rows of activations; may be repeated. 1 and 128.", show_default=False
        ),
    ] = None,
    packing: Annotated[
        bool,
        typer.Option("--packing", help="With --kernels: time packing, checking and repacking instead of products."),
    ] = False,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Time models side by side: interleaved rounds, median and range, peak memory, bytes on disk.

    A model that is named twice competes with itself, which shows how large the noise is.

    With --kernels: products of every storage layout, cold, and how much of the memory bandwidth they reach.

    Examples:

        rarefy bench ORIGINAL OUT

        rarefy bench OUT OUT

        rarefy bench OUT --runtime engine --decode-tokens 128 --rounds 9 --json

        rarefy bench --kernels --layout dense-int4-v1 --layout bitmask-int4-v1 --shape 4096x4096 --rows 1

        rarefy bench --kernels --packing --shape 4096x4096
    """
    del debug
    for name in _MODEL_OPTIONS if kernels else _KERNEL_OPTIONS:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            where = "MODEL" if name == "models" else f"--{name.replace('_', '-')}"
            found = "given together with --kernels" if kernels else "given without --kernels"
            raise UsageError(where, found, allowed="models, or --kernels with --layout, --shape and --rows")
    if packing:
        if rows or threads:
            raise UsageError("--packing", "given together with --rows or --threads", allowed="it uses one thread")
        time_packing(layouts=layout, shapes=shape, rounds=rounds, as_json=as_json)
        return
    if kernels:
        time_kernels(layouts=layout, shapes=shape, rows=rows, threads=threads, rounds=rounds, as_json=as_json)
        return
    if not models:
        raise UsageError("rarefy bench", "no model", allowed="one MODEL or more, or --kernels")
    if threads and len(threads) > 1:
        raise UsageError("--threads", "given more than once", allowed="one number for models")
    with compress_extra("bench"):
        from rarefy.measure.bench import bench as measure
    with ProgressDisplay() as display:
        timed = measure(
            models,
            runtimes=[item.value for item in runtime] if runtime else None,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            batch_size=batch_size,
            rounds=5 if rounds is None else rounds,
            warmup=warmup,
            num_threads=threads[0] if threads else None,
            progress=lambda done, total: display("bench", done, total),
        )
    if as_json:
        write_json(timed)
        return
    speeds = [name for name in _COLUMNS if name in timed[0]]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("model", overflow="fold")
    for title in [*(_COLUMNS[name] for name in speeds), "peak memory", "on disk"]:
        table.add_column(title, justify="right", no_wrap=True)
    for row in timed:
        table.add_row(
            Text(printable(row["name"])),
            *(_speed(row[name]) for name in speeds),
            format_bytes(row["peak_memory_bytes"]),
            "-" if row["disk_bytes"] is None else format_bytes(row["disk_bytes"]),
        )
    console = stdout_console()
    console.print(table)
    console.print()
    console.print(Text(printable(timed[0]["how"])))


def _speed(spread: Mapping[str, Any]) -> Text:
    text = Text(format_number(float(spread["median"])))
    text.append(f"\n{format_number(float(spread['low']))} to {format_number(float(spread['high']))}", style="dim")
    return text
