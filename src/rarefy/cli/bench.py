"""`rarefy bench`: several models timed side by side."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from rarefy.cli.console import stdout_console, write_json
from rarefy.cli.optional import compress_extra
from rarefy.cli.options import DebugFlag, JsonFlag, ThreadsOption
from rarefy.cli.progress import ProgressDisplay
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


def bench(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Rarefy directories, Hugging Face directories or GGUF files."),
    ],
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
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Timed rounds.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, metavar="N", help="Rounds before them.")] = 1,
    threads: ThreadsOption = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Time models side by side: interleaved rounds, median and range, peak memory, bytes on disk.

    A model that is named twice competes with itself, which shows how large the noise is.

    Examples:

        rarefy bench ORIGINAL OUT

        rarefy bench OUT OUT

        rarefy bench OUT --runtime engine --decode-tokens 128 --rounds 9 --json
    """
    del debug
    with compress_extra("bench"):
        from rarefy.measure.bench import bench as measure
    with ProgressDisplay() as display:
        rows = measure(
            models,
            runtimes=[item.value for item in runtime] if runtime else None,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            batch_size=batch_size,
            rounds=rounds,
            warmup=warmup,
            num_threads=threads,
            progress=lambda done, total: display("bench", done, total),
        )
    if as_json:
        write_json(rows)
        return
    speeds = [name for name in _COLUMNS if name in rows[0]]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("model", overflow="fold")
    for title in [*(_COLUMNS[name] for name in speeds), "peak memory", "on disk"]:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(printable(row["name"])),
            *(_speed(row[name]) for name in speeds),
            format_bytes(row["peak_memory_bytes"]),
            "-" if row["disk_bytes"] is None else format_bytes(row["disk_bytes"]),
        )
    console = stdout_console()
    console.print(table)
    console.print()
    console.print(Text(printable(rows[0]["how"])))


def _speed(spread: Mapping[str, Any]) -> Text:
    text = Text(format_number(float(spread["median"])))
    text.append(f"\n{format_number(float(spread['low']))} to {format_number(float(spread['high']))}", style="dim")
    return text
