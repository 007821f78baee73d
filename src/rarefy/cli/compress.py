"""`rarefy compress`: the main job. The plan first, then progress, then the verdict."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from rarefy.artifact import check_output
from rarefy.cli.console import note, stdout_console, write_json
from rarefy.cli.layer_names import sectioned
from rarefy.cli.optional import compress_extra
from rarefy.cli.options import DebugFlag, JsonFlag, ModelArgument
from rarefy.cli.progress import ProgressDisplay
from rarefy.report import render_verdict
from rarefy.report.units import format_bytes, format_percent, format_seconds, printable

if TYPE_CHECKING:
    from rarefy.plan import Plan

DEFAULT_RECIPE = "default"
# Of the plan's table: names, steps and formats stand left, numbers right.
_TEXT_COLUMNS = (0, 3, 4)


class ComputeDtype(StrEnum):
    """The type that calibration computes in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def compress(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="Directory to write.", show_default=False)],
    recipe: Annotated[
        str, typer.Option(metavar="FILE|NAME", help="A recipe file, or a name from `rarefy recipes list`.")
    ] = DEFAULT_RECIPE,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|DIR",
            help="Text, JSON lines, or a directory of them; a built-in text if not given.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of calibration text.")] = 128,
    sequence_length: Annotated[int, typer.Option(min=2, metavar="L", help="Tokens of a window.")] = 512,
    seed: Annotated[int, typer.Option(min=0, metavar="S", help="Seed of every random choice.")] = 0,
    compute_dtype: Annotated[
        ComputeDtype,
        typer.Option(help="What calibration computes in; auto: bfloat16 where the CPU multiplies it in hardware."),
    ] = ComputeDtype.AUTO,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUT if it is a model directory that is not read, and start anew.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop; nothing is written.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure quality and speed before and after.")
    ] = True,
    eval_data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text to measure quality on; held-out calibration text if not given.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Make a model smaller and faster, and say what it cost.

    The plan comes first, then progress, then the verdict; OUT appears at the end, whole or not at all. After an
    interruption the same command goes on after the last finished block, which it finds in OUT.partial.

    Examples:

        rarefy compress ./SmolLM2-135M-Instruct -o OUT --calibration texts/

        rarefy compress model.gguf -o OUT --recipe mine.yaml --samples 64 --seed 1

        rarefy compress ./model -o OUT --dry-run
    """
    del debug
    with compress_extra("compress"):
        from rarefy.checkpoint import what_is_left
        from rarefy.run import compress as run_compress
        from rarefy.run import plan as run_plan
    check_output(out, force=force, inputs=(model, recipe, calibration, eval_data))
    if dry_run:
        planned = run_plan(
            model, recipe, samples=samples, sequence_length=sequence_length, compute_dtype=compute_dtype.value
        )
        if as_json:
            write_json({"plan": planned.to_json()})
        else:
            _print_plan(planned)
        return
    with ProgressDisplay() as display:

        def announce(plan: "Plan") -> None:
            with display.paused():
                _print_plan(plan)

        try:
            result = run_compress(
                model,
                recipe,
                calibration=calibration,
                out=out,
                samples=samples,
                sequence_length=sequence_length,
                seed=seed,
                evaluation=eval_data,
                compute_dtype=compute_dtype.value,
                measure=measure,
                force=force,
                announce=None if as_json else announce,
                progress=display,
                tell=note,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(what_is_left(out)) from None
    if as_json:
        write_json({"out": str(out), "report": result.report.to_json()})
        return
    console = stdout_console()
    console.print()
    console.print(render_verdict(result.report))
    console.print()
    console.print(Text(printable(f"Model:  {out}")), soft_wrap=True)
    console.print(Text(printable(f"Report: {out / 'report.html'}")), soft_wrap=True)


def _print_plan(plan: "Plan") -> None:
    """Print what will be done, to how much, and what it will take."""
    console = stdout_console()
    console.print(Text("Plan", style="bold"))
    header, *rows = plan.table()
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for index, title in enumerate(header):
        table.add_column(
            title, justify="left" if index in _TEXT_COLUMNS else "right", overflow="fold", no_wrap=index > 0
        )
    for row, (heading, name) in zip(rows, sectioned(row[0] for row in rows), strict=True):
        if heading is not None:
            table.add_row(Text(heading, style="dim"))
        _, *cells, num_bytes = map(printable, row)
        table.add_row(Text(name), *map(Text, cells), _scaled(num_bytes))
    console.print(table)
    console.print()
    change = 1 - plan.disk_bytes / plan.input_bytes if plan.input_bytes else 0.0
    direction = f"{format_percent(change)} less" if change >= 0 else f"{format_percent(-change)} MORE"
    untouched_bytes = sum(layer.num_bytes for layer in plan.untouched)
    console.print(
        Text(
            f"On disk: {format_bytes(plan.input_bytes)} now, {format_bytes(plan.disk_bytes)} afterwards ({direction}). "
            f"Untouched: {len(plan.untouched)} layers, {format_bytes(untouched_bytes)}. "
            f"About {format_seconds(plan.seconds)} to compress on a quiet machine, measuring not included; "
            f"about {format_bytes(plan.memory_bytes)} of memory"
            + (f" and {format_bytes(plan.scratch_bytes)} of scratch space on disk." if plan.scratch_bytes else ".")
        )
    )
    console.print()
    for text in plan.notes:
        note(f"note: {text}")


def _scaled(num_bytes: str) -> str:
    mark, _, digits = num_bytes.rpartition(" ")
    return f"{mark} {format_bytes(int(digits))}".strip()
