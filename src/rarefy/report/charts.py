"""Inline SVG for the HTML report, drawn here so that the page needs nothing from outside.

Colours come from the page's CSS variables, hence one drawing serves light and dark. Coordinates are SVG user units.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from rarefy.core.results import LayerResult
from rarefy.report.facts import split_block
from rarefy.report.units import format_bytes, format_number, format_percent

_WIDTH = 1000.0
_GUTTER = 74.0
_STRIP_HEIGHT = 78.0
_STRIP_GAP = 44.0
_MAX_BAR = 34.0
_MAX_ROLES = 40
_MAX_CELL = 46.0


@dataclass(frozen=True)
class _Strip:
    title: str
    values: tuple[float, ...]
    backdrop: tuple[float, ...] | None
    top: float
    label: Callable[[float], str]


def layer_strips(layers: Sequence[LayerResult]) -> str:
    """Return four bar charts over one axis of layers: sparsity, bits per weight, error and bytes.

    One invisible column per layer carries the tooltip with all four values.
    """
    errors = {layer.error_metric for layer in layers}
    what = "output" if errors == {"output"} else "weight" if errors == {"weight"} else "output or weight"
    strips = (
        _Strip("Sparsity", tuple(_finite(layer.sparsity) for layer in layers), None, 1.0, format_percent),
        _strip("Stored bits per weight", [layer.bits_per_weight for layer in layers], None, lambda bits: f"{bits:g}"),
        _strip(f"Relative {what} error", [layer.error for layer in layers], None, format_percent),
        _strip(
            "Bytes, before (pale) and after",
            [layer.packed_bytes for layer in layers],
            [layer.dense_bytes for layer in layers],
            format_bytes,
        ),
    )
    plot_width = _WIDTH - _GUTTER
    step = min(plot_width / len(layers), _MAX_BAR)
    height = len(strips) * (_STRIP_HEIGHT + _STRIP_GAP) + 10
    parts = [_open_svg(_WIDTH, height, "Per layer: sparsity, bits per weight, error and bytes")]
    for index, strip in enumerate(strips):
        parts.append(_draw_strip(strip, 26 + index * (_STRIP_HEIGHT + _STRIP_GAP), step))
    parts.append(_block_ticks(layers, step, height - 8))
    for index, layer in enumerate(layers):
        x = _GUTTER + index * step
        parts.append(
            f'<rect class="hit" x="{x:.2f}" y="22" width="{step:.2f}" height="{height - 46:.0f}">'
            f"<title>{escape(_tooltip(layer))}</title></rect>"
        )
    parts.append("</svg>")
    return "".join(parts)


def error_heatmap(layers: Sequence[LayerResult]) -> str:
    """Return the errors as a grid, one row per kind of layer and one column per block; "" without blocks."""
    cells: dict[tuple[str, int], LayerResult] = {}
    for layer in layers:
        place = split_block(layer.name)
        if place is not None and math.isfinite(layer.error):
            cells[place[1], place[0]] = layer
    roles = list(dict.fromkeys(role for role, _ in cells))
    blocks = sorted({block for _, block in cells})
    if len(blocks) < 2 or not roles or len(roles) > _MAX_ROLES:
        return ""
    gutter = 12 + 7.4 * max(len(_shorten(role, 26)) for role in roles)
    cell = min((_WIDTH - gutter) / len(blocks), _MAX_CELL)
    row_height = min(max(cell, 16.0), 26.0)
    worst = max(layer.error for layer in cells.values())
    height = len(roles) * row_height + 26
    parts = [_open_svg(_WIDTH, height, "Error of every layer, by block and kind of layer")]
    for row, role in enumerate(roles):
        middle = row * row_height + row_height / 2 + 4
        parts.append(
            f'<text class="tick" x="{gutter - 8:.1f}" y="{middle:.1f}" text-anchor="end">'
            f"{escape(_shorten(role, 26))}</text>"
        )
        for column, block in enumerate(blocks):
            found = cells.get((role, block))
            if found is None:
                continue
            # The square root spreads the many small errors apart; the tooltip has the figure.
            shade = 0.05 + 0.95 * math.sqrt(max(found.error, 0.0) / worst) if worst > 0 else 0.05
            parts.append(
                f'<rect class="cell" x="{gutter + column * cell:.2f}" y="{row * row_height:.2f}" rx="2" '
                f'width="{cell - 1.5:.2f}" height="{row_height - 1.5:.2f}" fill-opacity="{shade:.3f}">'
                f"<title>{escape(_tooltip(found))}</title></rect>"
            )
    every = math.ceil(len(blocks) / max((_WIDTH - gutter) / 34, 1))
    for column in range(0, len(blocks), every):
        x = gutter + column * cell + (cell - 1.5) / 2
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{height - 8:.1f}" text-anchor="middle">{blocks[column]}</text>'
        )
    parts.append("</svg>")
    return "".join(parts)


def pair_bars(before: float, after: float, outcome: str) -> str:
    """Return two small bars on one scale, the upper one before and the lower one after."""
    top = max(before, after)
    if not (math.isfinite(top) and top > 0 and min(before, after) >= 0):
        return ""
    widths = (max(before / top * 100, 0.6), max(after / top * 100, 0.6))
    return (
        '<svg class="pair" viewBox="0 0 100 13" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="was" x="0" y="0" width="{widths[0]:.2f}" height="5"/>'
        f'<rect class="now {outcome}" x="0" y="7" width="{widths[1]:.2f}" height="6"/></svg>'
    )


def nice_ceiling(value: float) -> float:
    """Return the smallest of 1, 2, 2.5, 4, 5, 8, 10 times a power of ten that is not below `value`."""
    if not math.isfinite(value) or value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    for factor in (1.0, 2.0, 2.5, 4.0, 5.0, 8.0, 10.0):
        if factor * power >= value * (1 - 1e-12):
            return factor * power
    return 10.0 * power


def _strip(
    title: str, values: Sequence[float], backdrop: Sequence[float] | None, label: Callable[[float], str]
) -> _Strip:
    finite = tuple(_finite(value) for value in values)
    behind = None if backdrop is None else tuple(_finite(value) for value in backdrop)
    shown = sorted(finite + (behind or ()))
    top = shown[-1]
    # One embedding must not flatten every other bar: what towers over nearly all of them is cut, and the title says so.
    usual = shown[int(0.97 * (len(shown) - 1))]
    if usual > 0 and top > 3 * usual:
        top = usual
        num_cut = sum(max(pair) > nice_ceiling(top) for pair in zip(finite, behind or finite, strict=True))
        title += f"; {num_cut} {'bar is' if num_cut == 1 else 'bars are'} cut at the top, with ▲"
    return _Strip(title, finite, behind, nice_ceiling(top), label)


def _draw_strip(strip: _Strip, y: float, step: float) -> str:
    right = _GUTTER + step * len(strip.values)
    parts = [f'<text class="strip" x="{_GUTTER:.0f}" y="{y - 10:.1f}">{escape(strip.title)}</text>']
    for share in (0.0, 0.5, 1.0):
        line = y + _STRIP_HEIGHT * (1 - share)
        parts.append(f'<path class="grid" d="M{_GUTTER:.0f} {line:.1f}H{right:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_GUTTER - 8:.0f}" y="{line + 4:.1f}" text-anchor="end">'
            f"{escape(strip.label(strip.top * share))}</text>"
        )
    if strip.backdrop is not None:
        parts.append(f'<path class="behind" d="{_bars(strip.backdrop, strip.top, y, step)}"/>')
    parts.append(f'<path class="bars" d="{_bars(strip.values, strip.top, y, step)}"/>')
    for index, value in enumerate(zip(strip.values, strip.backdrop or strip.values, strict=True)):
        if max(value) > strip.top:
            middle = _GUTTER + (index + 0.5) * step
            parts.append(f'<path class="cut" d="M{middle - 4:.1f} {y - 1:.1f}h8l-4 -6z"/>')
    return "".join(parts)


def _bars(values: Sequence[float], top: float, y: float, step: float) -> str:
    gap = 1.0 if step > 3 else 0.0
    pieces: list[str] = []
    for index, value in enumerate(values):
        size = min(max(value, 0.0) / top, 1.0) * _STRIP_HEIGHT
        if size > 0:
            x = _GUTTER + index * step
            pieces.append(f"M{x:.2f} {y + _STRIP_HEIGHT:.1f}v{-size:.2f}h{step - gap:.2f}v{size:.2f}z")
    return "".join(pieces)


def _block_ticks(layers: Sequence[LayerResult], step: float, y: float) -> str:
    starts: list[tuple[int, int]] = []
    previous: int | None = None
    for index, layer in enumerate(layers):
        place = split_block(layer.name)
        block = None if place is None else place[0]
        if block is not None and block != previous:
            starts.append((index, block))
        previous = block
    if not starts:
        return ""
    parts: list[str] = []
    free_from = -math.inf
    for index, block in starts:
        x = _GUTTER + index * step
        if x < free_from:
            continue
        text = f"block {block}" if not parts else str(block)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y:.1f}">{text}</text>')
        free_from = x + len(text) * 8 + 10
    return "".join(parts)


def _tooltip(layer: LayerResult) -> str:
    return (
        f"{layer.name}\n{layer.format}, {format_percent(layer.sparsity)} zeros, "
        f"{format_number(layer.bits_per_weight)} bits per weight\n"
        f"{layer.error_metric} error {format_percent(layer.error)}\n"
        f"{format_bytes(layer.dense_bytes)} to {format_bytes(layer.packed_bytes)}"
    )


def _open_svg(width: float, height: float, label: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">'


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else "…" + text[-(limit - 1) :]


def _finite(value: float) -> float:
    return float(value) if math.isfinite(value) else 0.0
