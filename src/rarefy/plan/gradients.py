"""What the passes for gradients will take."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import final

from rarefy.calibrate.gradient_statistics import result_bytes
from rarefy.calibrate.gradient_sums import chunks_of, most_bytes, sum_bytes
from rarefy.calibrate.statistics import GradientStatistic
from rarefy.recipe import LayerPlan, LayerRef, Recipe, Structure

# Numbers that autograd keeps for each that a layer is given or gives: norms, activations, attention.
_KEPT = 3
# Passes over the weights' products: a forward one, and backward one for the inputs and one for the weights.
_FORTH_AND_BACK = 3


@final
@dataclass(frozen=True)
class GradientCosts:
    """What gradients take.

    Args:
        memory_bytes: while they are taken.
        scratch_bytes: on disk: what blocks are given, and the statistics.
        seconds: of the passes.
        notes: what a user should know.
    """

    memory_bytes: int
    scratch_bytes: int
    seconds: float
    notes: tuple[str, ...]


def gradient_costs(
    recipe: Recipe,
    layers: Sequence[LayerPlan],
    structure: Structure,
    *,
    num_samples: int,
    item_bytes: int,
    rows_of: Callable[[str], int],
    pass_seconds: Callable[[Sequence[LayerRef]], float],
) -> GradientCosts | None:
    """What the passes for gradients take; None where no method needs any.

    Args:
        recipe: the recipe.
        layers: of the recipe.
        structure: of the model.
        num_samples: how many gradients there will be.
        item_bytes: of a number during the passes.
        rows_of: how many rows of inputs a layer meets in all data.
        pass_seconds: time of a forward pass of all data through some layers.

    Raises:
        UsageError: the blocks of one layer alone are too large.
    """
    wanted: dict[str, list[GradientStatistic]] = {}
    for layer in layers:
        needs = dict.fromkeys(each for place in layer.places for each in recipe.steps[place].statistics())
        own = [statistic for statistic in needs if isinstance(statistic, GradientStatistic)]
        if own:
            wanted[layer.layer] = own
    if not wanted:
        return None
    shapes = {layer.layer: layer.shape for layer in layers}
    inside = len(structure.blocks) > 1
    parts: dict[str, list[LayerRef]] = {"": []}  # the model's layers by block
    for ref in structure.layers:
        parts.setdefault((ref.block or "") if inside else "", []).append(ref)
    outside = parts.pop("")
    seconds = memory = border = 0.0
    first = min((place for place, part in enumerate(parts.values()) if _wanted_of(part, wanted)), default=len(parts))
    for place, part in enumerate(parts.values()):
        chunks = chunks_of(_wanted_of(part, wanted), shapes, most_bytes()) or [[]]
        seconds += pass_seconds(part) * (1 + (_FORTH_AND_BACK * len(chunks) if place >= first else 0))
        memory = max(memory, item_bytes * _num_weights(part) + _largest(chunks, wanted, shapes))
        given = [rows_of(ref.name) * ref.shape[1] for ref in part if ref.kind in ("linear", "conv")]
        border = max(border, min(given, default=0))
    chunks = chunks_of(_wanted_of(outside, wanted), shapes, most_bytes()) or [[]]
    products = [ref for ref in outside if ref.kind != "embedding"]
    seconds += pass_seconds(products) * _FORTH_AND_BACK * len(chunks)
    memory = max(memory, _largest(chunks, wanted, shapes)) + item_bytes * _num_weights(outside)
    memory += item_bytes * border + item_bytes * max(
        _activations(part, rows_of) for part in (*parts.values(), products)
    ) / max(1, num_samples)
    results = sum(result_bytes(each, shapes[layer]) for layer, own in wanted.items() for each in own)
    notes = () if inside else ("gradients: the model is no row of blocks, so that all of it is in memory at once",)
    return GradientCosts(
        memory_bytes=round(memory),
        scratch_bytes=round(item_bytes * border * len(parts)) + results,
        seconds=seconds,
        notes=notes,
    )


def _wanted_of(
    own: Sequence[LayerRef], wanted: Mapping[str, Sequence[GradientStatistic]]
) -> dict[str, Sequence[GradientStatistic]]:
    return {ref.name: wanted[ref.name] for ref in own if ref.name in wanted}


def _largest(
    chunks: Sequence[Sequence[str]],
    wanted: Mapping[str, Sequence[GradientStatistic]],
    shapes: Mapping[str, tuple[int, int]],
) -> int:
    """Bytes of the sums of the largest chunk."""
    return max(sum(sum_bytes(each, shapes[layer]) for layer in chunk for each in wanted[layer]) for chunk in chunks)


def _num_weights(own: Sequence[LayerRef]) -> int:
    return sum(prod(ref.shape) for ref in own if ref.shape and ref.tied_to is None)


def _activations(own: Sequence[LayerRef], rows_of: Callable[[str], int]) -> int:
    """Numbers that go into and out of the products of some layers in all data, with what autograd keeps of them."""
    return _KEPT * sum(rows_of(ref.name) * (ref.matrix[0] + ref.matrix[1]) for ref in own if ref.matrix is not None)
