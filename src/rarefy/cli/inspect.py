"""`rarefy inspect`: what a model is made of and what can be done with each part."""

import math
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rarefy.cli.console import note, stdout_console, write_json
from rarefy.cli.layer_names import pattern_of, sectioned
from rarefy.cli.optional import compress_extra
from rarefy.cli.options import DebugFlag, JsonFlag, ModelArgument
from rarefy.cli.packed import inspect_packed, is_packed
from rarefy.report.units import format_bytes, format_count, format_percent, printable

if TYPE_CHECKING:
    from rarefy.models import LayerRef, LoadedModel, Structure


def inspect(
    model: ModelArgument,
    zeros: Annotated[bool, typer.Option("--zeros/--no-zeros", help="Count zeros, which reads every weight.")] = True,
    every: Annotated[
        bool, typer.Option("--all", help="One line for each layer, also where the blocks are all alike.")
    ] = False,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """List the layers: shape, type, bytes, zeros, and whether each can be compressed or why not.

    Layers that are the same in every block share one line; --all lists them one by one. Of a directory that
    rarefy wrote it lists the storage formats.

    Examples:

        rarefy inspect ./SmolLM2-135M-Instruct

        rarefy inspect model.gguf --json > layers.json
    """
    del debug
    if is_packed(model):
        inspect_packed(model, zeros=zeros, every=every, as_json=as_json)
        return
    with compress_extra("inspect"):
        from rarefy.models import load_model
    loaded = load_model(model, stream=True)
    structure = loaded.structure(count_zeros=zeros)
    if as_json:
        write_json(_as_json(loaded, structure))
        return
    for text in loaded.notes:
        note(f"note: {text}")
    _print(stdout_console(), loaded, structure, every)


def _as_json(loaded: "LoadedModel", structure: "Structure") -> dict[str, object]:
    return {
        "model": loaded.source,
        "architecture": loaded.architecture,
        "num_parameters": loaded.num_parameters(),
        "num_bytes": loaded.stored_bytes(),
        "blocks": [vars(block) for block in structure.blocks],
        "layers": [vars(layer) for layer in structure.layers],
        "notes": list(loaded.notes),
    }


def _print(console: Console, loaded: "LoadedModel", structure: "Structure", every: bool) -> None:
    stacks = dict.fromkeys(block.stack for block in structure.blocks)
    blocks = f"{len(structure.blocks)} blocks" + (f" in {', '.join(stacks)}" if any(stacks) else "")
    console.print(
        Text(
            printable(
                f"{loaded.source}: {loaded.architecture}, {format_count(loaded.num_parameters())} parameters, "
                f"{format_bytes(loaded.stored_bytes())}, {blocks}"
            ),
            style="bold",
        )
    )
    console.print()
    groups = [(layer,) for layer in structure.layers] if every else group_layers(structure.layers)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("layer", overflow="fold")
    for name in ("count", "shape", "type", "bytes", "zeros"):
        table.add_column(name, justify="left" if name == "type" else "right", no_wrap=True)
    table.add_column("", no_wrap=True)
    reasons: dict[str, int] = {}
    names = [group[0].name if len(group) == 1 else pattern_of(group[0].name) for group in groups]
    for group, (heading, name) in zip(groups, sectioned(names), strict=True):
        first = group[0]
        if heading is not None:
            table.add_row(Text(heading, style="dim"))
        reason = first.reason
        mark = "ok" if reason is None else f"no ({reasons.setdefault(reason, len(reasons) + 1)})"
        table.add_row(
            Text(name),
            str(len(group)),
            "x".join(map(str, first.shape)) or "-",
            first.dtype,
            format_bytes(sum(layer.num_bytes for layer in group)),
            _zeros(group),
            mark,
        )
    console.print(table)
    console.print()
    good = [layer for layer in structure.layers if layer.compressible]
    num_bytes = sum(layer.num_bytes for layer in good)
    console.print(Text(f"ok: can be compressed ({len(good)} layers, {format_bytes(num_bytes)})"))
    for reason, number in reasons.items():
        console.print(Text(printable(f"no ({number}): {reason}")))


def group_layers(layers: "tuple[LayerRef, ...]") -> "list[tuple[LayerRef, ...]]":
    """Put the layers together that differ in nothing but the number of their block, in the order of the first ones."""
    groups: dict[tuple[object, ...], list[LayerRef]] = {}
    for layer in layers:
        role = layer.name if layer.block is None else pattern_of(layer.name)
        groups.setdefault((role, layer.kind, layer.shape, layer.dtype, layer.reason), []).append(layer)
    return [tuple(group) for group in groups.values()]


def _zeros(group: "tuple[LayerRef, ...]") -> str:
    counted = [layer for layer in group if layer.num_zeros is not None]
    total = sum(math.prod(layer.shape) for layer in counted)
    if not total:
        return "-"
    share = sum(layer.num_zeros or 0 for layer in counted) / total
    return "<0.1 %" if 0 < share < 0.001 else format_percent(share)
