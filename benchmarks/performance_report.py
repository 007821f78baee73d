"""Writes docs/performance.md and its picture, docs/performance-roofline.svg, from the results of performance.py."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

_KINDS = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "int8": "int8",
    "int8 weight-only": "int8",
    "int8 blocks": "int8",
    "int4": "int4",
    "int4 weight-only": "int4",
    "int8 50 % zeros": "int8 50 % zeros",
    "int8 80 % zeros": "int8 80 % zeros",
}
"""Values of a contestant -> those of the contestant of rarefy that it is compared with."""

_INTRODUCTION = """# Performance

<!-- Written by `make bench` (benchmarks/performance.py). Do not edit. -->

Products y = x W^T alone, of rarefy and of other libraries, with random weights. Whole models: [quality.md](quality.md).

{machine}

How it was measured:

- **Cold weights.** With up to 16 rows every contestant multiplies with enough different copies of its weight, one
  after the other, to exceed the last-level cache three times; with more, which arithmetic limits, with two copies.
  Libraries that run a graph get one graph with all copies; rarefy and torch are called once for each product.
- **Interleaved.** All contestants of a table take turns in {rounds} rounds in one process, and memory is read in every
  round too. Median, and the range over the rounds. The ratio is that of the times in the same rounds: above 1 rarefy is
  faster than this contestant, below 1 it is slower.
- **Checked.** Every result that was timed was compared with float32 numpy; the weights are such that every format holds
  them exactly, and the activations may lose 2 %, which 8 bits explain.
- **Of memory**: bytes of the packed weight over the time, over the bandwidth of the same rounds with the same threads.
  That bandwidth is the best of nine ways to read (1 to 12 streams per thread, several prefetch distances, vectors as
  wide as the CPU has, huge pages where the system gives them) of a buffer eight times the last-level cache.
- Weights in 4 bits have a scale for every 64 columns (ggml: 32), int8 one for every row. In the tables of every layout
  those of 4 bits and less have zero points as well, which dense are 3 % more bytes. Contestants marked weight-only
  multiply with bfloat16 activations, the other integer ones quantize the activations to 8 bits first. Of 87.5 % zeros,
  8 of every 64 columns are kept, of 2:4 zeros 2 of every 4; other zeros lie anywhere. Blocks have 16 rows and 64
  columns, and so many of them are zero as their line says.
- **AVX2 only**, **AVX2 and AVX-VNNI**: rarefy, oneDNN (OpenVINO, torch) and torch are told so by their environment
  variables, and ggml is compiled for it. In both oneDNN may use AVX-VNNI, for OpenVINO makes no products of integers
  with less, and what of OpenVINO is not oneDNN may use AVX-512: the second compares like with like.

Repeat it with `make bench`, which makes an environment of its own; the layouts alone with `rarefy bench --kernels`.
What limits the products that fall short, in cycles and bytes: [limits.md](limits.md).
"""


def write_report(known: dict[str, Any], report: Path) -> None:
    """Write both files from what has been measured."""
    results = known["results"]
    peers = [result for result in results if result["setting"]["part"] == "peers"]
    layouts = [result for result in results if result["setting"]["part"] == "layouts"]
    rounds = max((result["bandwidth"]["num_runs"] for result in peers), default=0)
    text = [_INTRODUCTION.format(machine=_machine(known["machine"]), rounds=rounds)]
    picture = report.with_name(f"{report.stem}-roofline.svg")
    text.append(f"![Roofline]({picture.name})\n")
    text += _in_any_format(peers)
    text += _summary(peers)
    text.append("## Beside other libraries\n")
    for result in peers:
        text += _peer_table(result)
    text.append("## Every layout\n")
    for result in layouts:
        text += _layout_table(result)
    report.write_text("\n".join(text), encoding="utf-8")
    picture.write_text(_roofline(peers), encoding="utf-8")


def _machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    ggml = f", ggml {machine['ggml']}" if machine["ggml"] else ""
    return (
        f"Machine: {machine['cpu']}, {machine['cpus']} CPUs, last-level cache "
        f"{machine['last_level_cache_bytes'] >> 20} MiB; flags {' '.join(machine['flags'])}. "
        f"Versions: {versions}{ggml}."
    )


_ISAS = {"default": "", "avx2": ", AVX2 only", "avx_vnni": ", AVX2 and AVX-VNNI"}


def _title(setting: dict[str, Any]) -> str:
    rows = "one row" if setting["rows"] == 1 else f"{setting['rows']} rows"
    threads = "one thread" if setting["threads"] == 1 else f"{setting['threads']} threads"
    isa = _ISAS[setting["isa"]]
    return f"{setting['shape'][0]} x {setting['shape'][1]}, {rows}, {threads}{isa}"


def _ratio(row: dict[str, Any]) -> dict[str, float] | None:
    """The time of a contestant over that of rarefy with the same values."""
    ratio: dict[str, float] | None = None if row["peer"] == "rarefy" else row["ratios"].get(_KINDS[row["values"]])
    return ratio


def _in_any_format(peers: Sequence[dict[str, Any]]) -> list[str]:
    """Each of rarefy's integer contestants beside whatever is fastest among the others."""
    lines = [
        "## Beside the fastest of the others, in any format\n",
        "The others compute the same product of dense weights where they have no kernel for zeros. Above 1 rarefy is",
        "faster. *At most*: the same if a product took as long as reading its weight once does, at the bandwidth of",
        "the same rounds, which no kernel for this many bytes gets past.\n",
        "| product | rarefy | ms | fastest other | its ms | its time over rarefy's | range | at most |",
        "|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for result in peers:
        others = [row for row in result["rows"] if row["peer"] != "rarefy"]
        if not others:
            continue
        best = min(others, key=lambda row: row["ms"])
        for row in result["rows"]:
            if row["peer"] != "rarefy" or not row["values"].startswith("int"):
                continue
            ratio = best["ratios"][row["values"]]
            lines.append(
                f"| {_title(result['setting'])} | {row['values']} | {row['ms']:.3f} | {best['peer']} {best['values']} "
                f"| {best['ms']:.3f} | **{ratio['median']:.2f}** | {ratio['low']:.2f} to {ratio['high']:.2f} "
                f"| {_at_most(result, row, ratio)} |"
            )
    return [*lines, ""]


def _at_most(result: dict[str, Any], row: dict[str, Any], ratio: dict[str, float]) -> str:
    """The ratio of a product that takes as long as reading its weight; of one row, which memory limits."""
    if result["setting"]["rows"] != 1:
        return ""
    return f"{ratio['median'] / row['bandwidth_fraction']:.2f}"


def _summary(peers: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["## Where rarefy loses\n"]
    lost = []
    for result in peers:
        for row in result["rows"]:
            ratio = _ratio(row)
            if ratio is not None and ratio["median"] < 1:
                lost.append((ratio["median"], f"{_title(result['setting'])}: {row['peer']} {row['values']}", ratio))
    if not lost:
        return [*lines, "Nowhere in these tables.\n"]
    lines += ["| case | its time over rarefy's | range |", "|---|---:|---:|"]
    for median, case, ratio in sorted(lost):
        lines.append(f"| {case} | {median:.2f} | {ratio['low']:.2f} to {ratio['high']:.2f} |")
    return [*lines, ""]


def _peer_table(result: dict[str, Any]) -> list[str]:
    setting, bandwidth = result["setting"], result["bandwidth"]
    operations = 2 * setting["shape"][0] * setting["shape"][1] * setting["rows"]
    lines = [
        f"### {_title(setting)}\n",
        f"Memory: {bandwidth['median'] / 1e9:.1f} GB/s ({bandwidth['low'] / 1e9:.1f} to {bandwidth['high'] / 1e9:.1f})."
        + "".join(f" Left out: {peer} ({why})." for peer, why in result["left_out"].items())
        + "\n",
        "| | weights | ms | range | GB/s | of memory | GOPS | over rarefy's time | at most |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    ours = {row["values"]: row for row in result["rows"] if row["peer"] == "rarefy"}
    for row in sorted(result["rows"], key=lambda row: row["ms"]):
        ratio = _ratio(row)
        compared = "" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        at_most = "" if ratio is None else _at_most(result, ours[_KINDS[row["values"]]], ratio)
        name = "**rarefy**" if row["peer"] == "rarefy" else row["peer"]
        lines.append(
            f"| {name} | {row['values']} | {row['ms']:.3f} | {row['ms_low']:.3f} to {row['ms_high']:.3f} "
            f"| {row['bytes'] / row['ms'] / 1e6:.1f} | {row['bandwidth_fraction']:.0%} "
            f"| {operations / row['ms'] / 1e6:.0f} | {compared} | {at_most} |"
        )
    return [*lines, ""]


def _layout_table(result: dict[str, Any]) -> list[str]:
    setting, rows = result["setting"], result["rows"]
    shape = f"{setting['shape'][0]} x {setting['shape'][1]}"
    memory = {row["threads"]: row["bandwidth_bytes_per_s"] for row in rows}
    read = ", ".join(f"{rate / 1e9:.1f} GB/s with {threads}" for threads, rate in sorted(memory.items()))
    lines = [
        f"### {shape}, {', '.join(sorted({row['isa'] for row in rows}))}\n",
        f"Memory by threads: {read}.\n",
        "| layout | rows | threads | ms | range | GB/s | of memory | dense of the type over it |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    times = {(row["layout"], row["rows"], row["threads"]): row["ms"] for row in rows}
    for row in sorted(rows, key=lambda row: (row["rows"], row["threads"])):
        name = f"{row['layout']} {row['note']}".rstrip()
        dense = f"dense-{row['layout'].split('-')[1]}-v1"
        dense_ms = None if name == dense else times.get((dense, row["rows"], row["threads"]))
        compared = "" if dense_ms is None else f"{dense_ms / row['ms']:.2f}"
        lines.append(
            f"| {name} | {row['rows']} | {row['threads']} | {row['ms']:.3f} "
            f"| {row['ms_low']:.3f} to {row['ms_high']:.3f} | {row['bytes'] / row['ms'] / 1e6:.1f} "
            f"| {row['bandwidth_fraction']:.0%} | {compared} |"
        )
    return [*lines, ""]


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 780, 470, 90, 20, 40, 90
_COLORS = {"rarefy": "#c2410c", "torch": "#6b7280", "ONNX Runtime": "#2563eb", "OpenVINO": "#7c3aed", "ggml": "#059669"}


def _roofline(peers: Iterable[dict[str, Any]]) -> str:
    """Operations per second over operations per byte of packed weight, at the most threads and the default kernels."""
    usable = [result for result in peers if result["setting"]["isa"] == "default"]
    threads = max((result["setting"]["threads"] for result in usable), default=1)
    points, bandwidths = [], []
    for result in usable:
        setting = result["setting"]
        if setting["threads"] != threads:
            continue
        bandwidths.append(result["bandwidth"]["median"])
        operations = 2 * setting["shape"][0] * setting["shape"][1] * setting["rows"]
        for row in result["rows"]:
            label = f"{row['peer']} {row['values']}, {_title(setting)}: {row['ms']:.3f} ms"
            points.append((operations / row["bytes"], operations / row["ms"] * 1e3, row["peer"], label))
    if not points:
        return "<svg xmlns='http://www.w3.org/2000/svg'/>"
    bandwidth = sorted(bandwidths)[len(bandwidths) // 2]
    top = max(rate for _, rate, _, _ in points)
    x_range = (0.25, max(intensity for intensity, *_ in points) * 1.5)
    y_range = (min(rate for _, rate, _, _ in points) * 0.6, top * 1.8)

    def x(intensity: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * math.log(intensity / x_range[0]) / math.log(x_range[1] / x_range[0])

    def y(rate: float) -> float:
        return (
            _HEIGHT
            - _BOTTOM
            - (_HEIGHT - _TOP - _BOTTOM) * math.log(rate / y_range[0]) / math.log(y_range[1] / y_range[0])
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="14">Products at {threads} threads: operations per second over operations '
        "per byte of packed weight</text>",
    ]
    for power in range(-1, 5):
        if x_range[0] <= 10**power <= x_range[1]:
            parts.append(
                f'<line x1="{x(10**power):.1f}" x2="{x(10**power):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" '
                f'stroke="#e5e7eb"/><text x="{x(10**power):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">'
                f"{10.0**power:g}</text>"
            )
    for power in range(8, 15):
        if y_range[0] <= 10**power <= y_range[1]:
            parts.append(
                f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(10**power):.1f}" y2="{y(10**power):.1f}" '
                f'stroke="#e5e7eb"/><text x="{_LEFT - 6}" y="{y(10**power) + 4:.1f}" text-anchor="end">'
                f"{10 ** (power - 9):g} GOPS</text>"
            )
    left, ridge = max(x_range[0], y_range[0] / bandwidth), top / bandwidth
    parts.append(
        f'<polyline fill="none" stroke="black" points="{x(left):.1f},{y(left * bandwidth):.1f} '
        f'{x(ridge):.1f},{y(top):.1f} {x(x_range[1]):.1f},{y(top):.1f}"/>'
        f'<text x="{x(left) + 8:.1f}" y="{y(left * bandwidth) - 28:.1f}">{bandwidth / 1e9:.0f} GB/s</text>'
        f'<text x="{x(ridge):.1f}" y="{y(top) - 6:.1f}">highest measured</text>'
    )
    for intensity, rate, peer, label in sorted(points, key=lambda point: point[2] == "rarefy"):
        parts.append(
            f'<circle cx="{x(intensity):.1f}" cy="{y(rate):.1f}" r="{4.5 if peer == "rarefy" else 3.5}" '
            f'fill="{_COLORS.get(peer, "black")}" fill-opacity="0.7"><title>{escape(label)}</title></circle>'
        )
    for index, (peer, color) in enumerate(_COLORS.items()):
        left_edge, base = _LEFT + 130 * index, _HEIGHT - 20
        parts.append(
            f'<circle cx="{left_edge + 5}" cy="{base - 4}" r="5" fill="{color}"/>'
            f'<text x="{left_edge + 16}" y="{base}">{peer}</text>'
        )
    parts.append(
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - _BOTTOM + 38}" text-anchor="middle">operations per byte</text></svg>\n'
    )
    return "\n".join(parts)
