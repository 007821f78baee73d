"""The part of `rarefy bench` that times products instead of models."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.table import Table
from rich.text import Text

from rarefy.cli.console import stdout_console, write_json
from rarefy.cli.progress import ProgressDisplay
from rarefy.core.errors import UsageError
from rarefy.measure.kernel_bench import ROUNDS, ROWS, SHAPES, bench_kernels
from rarefy.measure.packing_bench import STEPS, bench_packing
from rarefy.report.units import format_bytes, format_number, format_percent


def parse_shape(text: str) -> tuple[int, int]:
    """Outputs and inputs from "4096x11008".

    Raises:
        UsageError: the text is anything else.
    """
    match = re.fullmatch(r"([0-9]{1,9})[xX×]([0-9]{1,9})", text)
    if match is None:
        raise UsageError("--shape", repr(text), allowed="OUTxIN, outputs and inputs, such as 4096x11008")
    return int(match[1]), int(match[2])


def time_kernels(
    *,
    layouts: Sequence[str] | None,
    shapes: Sequence[str] | None,
    rows: Sequence[int] | None,
    threads: Sequence[int] | None,
    rounds: int | None,
    as_json: bool,
) -> None:
    """Time the products, and write them as JSON or as a table for each shape."""
    with ProgressDisplay() as display:
        timed = bench_kernels(
            layouts=layouts or (),
            shapes=[parse_shape(text) for text in shapes] if shapes else SHAPES,
            rows=rows or ROWS,
            threads=threads or (),
            rounds=ROUNDS if rounds is None else rounds,
            progress=lambda done, total: display("bench", done, total),
        )
    if as_json:
        write_json(timed)
        return
    console = stdout_console()
    for shape, products in groupby(timed, key=lambda row: row["shape"]):
        console.print(_table(shape, list(products)))
        console.print()
    multiple = min(row["cache_multiple"] for row in timed)
    warm = "" if multiple >= 1 else ", which holds them: such small weights are not cold"
    console.print(
        Text(
            f"Each product reads another copy of its weight; the copies are at least {multiple:.1f} times as large as "
            f"the last-level cache{warm}. "
            f"{timed[0]['num_rounds']} interleaved rounds, median and range; every result was checked. GB/s: bytes of "
            "the packed weight over the time. Memory: that over the read bandwidth, measured in the same rounds "
            "with the same threads."
        )
    )


def time_packing(
    *, layouts: Sequence[str] | None, shapes: Sequence[str] | None, rounds: int | None, as_json: bool
) -> None:
    """Time packing, checking and repacking, and write them as JSON or as a table for each shape."""
    with ProgressDisplay() as display:
        timed = bench_packing(
            layouts=layouts or (),
            shapes=[parse_shape(text) for text in shapes] if shapes else SHAPES[:1],
            rounds=5 if rounds is None else rounds,
            progress=lambda done, total: display("bench", done, total),
        )
    if as_json:
        write_json(timed)
        return
    console = stdout_console()
    for shape, rows in groupby(timed, key=lambda row: row["shape"]):
        console.print(_packing_table(shape, list(rows)))
        console.print()
    console.print(
        Text(
            "Millions of weights per second, zeros counted too, on one thread; the median and the slowest of "
            f"{timed[0]['num_rounds']} rounds. Pack: from float32 weights on their grid to the layout. Check: all that "
            "is verified of stored arrays. Repack: from the layout to what the kernels read, at every load."
        )
    )


def _packing_table(shape: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        title=Text(f"{shape[0]} x {shape[1]}", style="bold"),
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
        header_style="dim",
    )
    table.add_column("layout", no_wrap=True)
    for title in (*STEPS, "isa"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        cells = [Text("-", style="dim") if row[f"{step}_weights_per_s"] is None else _rate(row, step) for step in STEPS]
        table.add_row(Text(_name(row)), *cells, row["isa"])
    return table


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['layout']} {row['note']}".rstrip()


def _rate(row: Mapping[str, Any], step: str) -> Text:
    text = Text(f"{row[f'{step}_weights_per_s'] / 1e6:.0f}")
    return text.append(f" ({row[f'{step}_weights_per_s_low'] / 1e6:.0f})", style="dim")


def _milliseconds(value: float) -> str:
    """Four digits behind the point where `format_number` would write an exponent: a column of numbers to compare."""
    return f"{value:.4f}" if value < 0.1 else format_number(value)


def _table(shape: Sequence[int], products: Sequence[Mapping[str, Any]]) -> Table:
    bandwidths: dict[int, list[float]] = {}
    for row in products:
        bandwidths.setdefault(row["threads"], []).append(row["bandwidth_bytes_per_s"])
    read = ", ".join(f"{format_bytes(max(rates))}/s ({threads} thr)" for threads, rates in bandwidths.items())
    isas = {row["isa"] for row in products}
    table = Table(
        title=Text(f"{shape[0]} x {shape[1]}, {', '.join(sorted(isas))}; memory {read}", style="bold"),
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
        header_style="dim",
    )
    table.add_column("layout", no_wrap=True)
    for title in ("rows", "thr", "ms", "range", "weight", "GB/s", "memory"):
        table.add_column(title, justify="right", no_wrap=True)
    products = sorted(products, key=lambda row: (row["rows"], row["threads"]))
    for row in products:
        isa = f" ({row['isa']})" if len(isas) > 1 else ""
        table.add_row(
            Text(_name(row) + isa),
            str(row["rows"]),
            str(row["threads"]),
            _milliseconds(row["ms"]),
            Text(f"{_milliseconds(row['ms_low'])}-{_milliseconds(row['ms_high'])}", style="dim"),
            format_bytes(row["bytes"]),
            f"{row['bytes'] / row['ms'] / 1e6:.1f}",
            format_percent(row["bandwidth_fraction"]),
        )
    return table
