"""What `rarefy inspect` says of a directory that rarefy wrote: its storage layouts. Needs no torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from rarefy.artifact import QUANT_METHOD, Artifact, read_artifact
from rarefy.cli.console import stdout_console, write_json
from rarefy.cli.layer_names import pattern_of, sectioned
from rarefy.report.units import format_bytes, format_number, format_percent, printable


@dataclass(frozen=True)
class PackedLayer:
    """A layer as it is stored; `zeros` is the share of zeros, None where they were not counted."""

    name: str
    shape: tuple[int, int]
    format: str
    zeros: float | None
    num_bytes: int
    bits_per_weight: float


def is_packed(model: str) -> bool:
    """Return whether `model` is a directory whose config.json names rarefy; the loader judges damaged files."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def inspect_packed(model: str, *, zeros: bool, every: bool, as_json: bool) -> None:
    """Print the layers of an artifact, or write them as JSON.

    Raises:
        RarefyError: the directory is damaged.
    """
    artifact = read_artifact(model)
    rows = [_row(artifact, name, zeros) for name in artifact.specs]
    rest_bytes = sum(artifact.stored(name).nbytes for name in artifact.names())
    architecture = ", ".join(map(str, artifact.config.get("architectures") or ["unknown architecture"]))
    if as_json:
        write_json(
            {
                "model": model,
                "architecture": architecture,
                "quant_method": QUANT_METHOD,
                "layers": [asdict(row) for row in rows],
                "tied": artifact.tied,
                "other_tensors": {"count": len(artifact.names()), "num_bytes": rest_bytes},
            }
        )
        return
    packed_bytes = sum(row.num_bytes for row in rows)
    console = stdout_console()
    console.print(
        Text(
            printable(
                f"{model}: {architecture}, compressed by rarefy; {len(rows)} layers in {format_bytes(packed_bytes)}, "
                f"{len(artifact.names())} other tensors in {format_bytes(rest_bytes)}"
            ),
            style="bold",
        )
    )
    console.print()
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("layer", overflow="fold")
    for title in ("count", "shape", "format", "zeros", "bits", "bytes"):
        table.add_column(title, justify="left" if title == "format" else "right", no_wrap=True)
    groups = [[row] for row in rows] if every else _groups(rows)
    names = [group[0].name if len(group) == 1 else pattern_of(group[0].name) for group in groups]
    for group, (heading, name) in zip(groups, sectioned(names), strict=True):
        first = group[0]
        if heading is not None:
            table.add_row(Text(heading, style="dim"))
        num_bytes = sum(row.num_bytes for row in group)
        shares = [row.zeros for row in group if row.zeros is not None]
        table.add_row(
            Text(name),
            str(len(group)),
            "x".join(map(str, first.shape)),
            first.format,
            format_percent(sum(shares) / len(shares)) if shares else "-",
            format_number(num_bytes * 8 / (len(group) * math.prod(first.shape))),
            format_bytes(num_bytes),
        )
    console.print(table)
    for alias, name in artifact.tied.items():
        console.print(Text(printable(f"{alias} has the weight of {name}")))


def _row(artifact: Artifact, name: str, zeros: bool) -> PackedLayer:
    layout = artifact.layer(name)
    num_weights = math.prod(layout.shape)
    share = 1.0 - float(np.count_nonzero(layout.to_dense())) / num_weights if zeros else None
    return PackedLayer(name, layout.shape, layout.format, share, layout.nbytes, layout.nbytes * 8 / num_weights)


def _groups(rows: Sequence[PackedLayer]) -> list[list[PackedLayer]]:
    groups: dict[tuple[str, tuple[int, int], str], list[PackedLayer]] = {}
    for row in rows:
        groups.setdefault((pattern_of(row.name), row.shape, row.format), []).append(row)
    return list(groups.values())
