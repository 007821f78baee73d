"""From the fractions of a rule to patterns: whole numbers of zeros that together are as many as asked."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import floor

from rarefy.core.patterns import NM, Blocks, Lines, Unstructured, WantedPattern
from rarefy.methods.allocation.base import LayerShape

# What floating-point arithmetic may take from a whole number of units.
_ROUNDING = 1e-6


def patterns_of(
    pattern: WantedPattern, layers: Sequence[LayerShape], amounts: Mapping[str, float]
) -> dict[str, WantedPattern]:
    """The pattern of every layer: of the same kind, with its own amount.

    A unit is what is zero as a whole: an entry, a block, a row or column; of N:M one entry in every group, of which at
    least one stays. Every layer gets the whole units in its amount, and then those that come closest to one more get
    it, until the total is as near to what is asked as units allow: exact for single entries.

    Args:
        pattern: of the step; its sparsity is what is asked of all layers together.
        layers: all layers of the step.
        amounts: the fraction of zeros of each; where it is what is asked, or not given, the pattern stays as it is.
    """
    own = [layer for layer in layers if amounts.get(layer.name, pattern.sparsity) != pattern.sparsity]
    num_units = [_num_units(pattern, layer) for layer in own]
    most = [units - 1 if isinstance(pattern, NM) else units for units in num_units]
    unit_sizes = [layer.size / max(1, units) for layer, units in zip(own, num_units, strict=True)]
    wanted = [amounts[layer.name] * units for layer, units in zip(own, num_units, strict=True)]
    given = [min(limit, floor(units + _ROUNDING)) for units, limit in zip(wanted, most, strict=True)]
    changed = {layer.name for layer in own}
    left = float(round(pattern.sparsity * sum(layer.size for layer in layers)))
    left -= sum(round(pattern.sparsity * layer.size) for layer in layers if layer.name not in changed)
    left -= sum(units * size for units, size in zip(given, unit_sizes, strict=True))
    queue = [(given[place] - wanted[place], place) for place in range(len(own)) if given[place] < most[place]]
    heapq.heapify(queue)
    while queue:
        _, place = heapq.heappop(queue)
        if 2 * left <= unit_sizes[place] * (1 + _ROUNDING):
            continue  # it would take the total further away; a smaller unit may not
        given[place] += 1
        left -= unit_sizes[place]
        if given[place] < most[place]:
            heapq.heappush(queue, (given[place] - wanted[place], place))
    patterns: dict[str, WantedPattern] = {layer.name: pattern for layer in layers}
    for layer, units, total in zip(own, given, num_units, strict=True):
        patterns[layer.name] = _with_units(pattern, units, total)
    return patterns


def _num_units(pattern: WantedPattern, layer: LayerShape) -> int:
    match pattern:
        case Unstructured():
            return layer.size
        case NM():
            return pattern.group
        case Lines():
            return layer.matrix[0 if pattern.axis == "rows" else 1]
        case Blocks():
            down, across = pattern.grid_shape(layer.matrix)
            return down * across


def _with_units(pattern: WantedPattern, units: int, total: int) -> WantedPattern:
    if isinstance(pattern, NM):
        return NM(total - units, total)
    return replace(pattern, sparsity=units / max(1, total))
