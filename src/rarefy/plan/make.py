"""Making a plan from shapes alone: no weight is read. Shape suffixes: O out, I in."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol, final

from rarefy.calibrate.statistics import GradientStatistic, Gram
from rarefy.core.grids import IntGrid
from rarefy.core.patterns import NM, Blocks, Lines, Pattern, Unstructured
from rarefy.core.ranks import Rank, TapRanks
from rarefy.layouts import FloatFormat, choose_format
from rarefy.methods import LayerMethod
from rarefy.methods.allocation import ModelAllocation
from rarefy.methods.masks import sparser
from rarefy.plan.cost import Rates, gram_seconds, measure_rates, num_walks, solve_seconds
from rarefy.plan.gradients import gradient_costs
from rarefy.plan.records import Plan, PlannedLayer, UntouchedRow
from rarefy.recipe import (
    UNTARGETED,
    LayerPlan,
    LayerRef,
    Recipe,
    Structure,
    amounts_in_words,
    left_alone,
    notes,
    resolve,
)

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
# torch and transformers, imported
_LIBRARY_BYTES = 450_000_000
# model code between the products: norms, attention, activations, copies
_FORWARD_OVERHEAD = 1.6
_TENSOR_HEADER_BYTES = 110


class StoredLayer(LayerRef, Protocol):
    """A layer that also says how it is stored."""

    @property
    def dtype(self) -> str:
        """Of the weight as stored."""
        ...

    @property
    def num_bytes(self) -> int:
        """Of all its own parameters as stored; 0 where another layer holds them."""
        ...


@final
@dataclass(frozen=True)
class _Rows:
    """How many rows of inputs layers meet in all calibration data.

    Args:
        num_tokens: of a layer that was not counted.
        counted: by layer; None: nothing was counted, and every layer meets each token once.
    """

    num_tokens: int
    counted: Mapping[str, int] | None

    def of(self, layer: str) -> int:
        return self.num_tokens if self.counted is None else self.counted.get(layer, self.num_tokens)


def make_plan(
    recipe: Recipe,
    structure: Structure,
    *,
    num_samples: int = 128,
    sequence_length: int = 512,
    bfloat16: bool = True,
    rates: Rates | None = None,
    num_rows: Mapping[str, int] | None = None,
) -> Plan:
    """Say what a recipe will do to a model, how large the result will be, and what the run will take.

    Args:
        recipe: the recipe.
        structure: the model's blocks and layers.
        num_samples: windows of calibration data.
        sequence_length: tokens of a window.
        bfloat16: whether forward passes compute in bfloat16.
        rates: of this machine; None: measured now.
        num_rows: rows of inputs that each layer meets in all calibration data; None: its tokens.

    Raises:
        RecipeError: the recipe does not fit the model.
    """
    layers = resolve(recipe, structure)
    float_format: FloatFormat = "bf16" if recipe.rest_dtype == "bfloat16" else "f32"
    refs = {layer.name: layer for layer in structure.layers}
    looking = {place for place, step in enumerate(recipe.steps) if isinstance(step.allocation, ModelAllocation)}
    planned = tuple(
        _planned(layer, refs[layer.layer], float_format, is_mean=not looking.isdisjoint(layer.places))
        for layer in layers
    )
    targeted = {layer.layer for layer in layers}
    why = left_alone(recipe, structure)
    untouched = tuple(
        UntouchedRow(layer.name, layer.kind, _num_bytes(layer), layer.reason or why.get(layer.name, UNTARGETED))
        for layer in structure.layers
        if layer.name not in targeted and layer.tied_to not in targeted
    )
    rest_bytes = sum(_rest_bytes(layer, layer.name in targeted, float_format) for layer in structure.layers)
    num_tensors = 3 * len(planned) + len(structure.layers)
    rates = rates or measure_rates()
    rows = _Rows(num_samples * sequence_length, num_rows)
    memory_parts = _memory(layers, structure, planned, rest_bytes, rows, bfloat16)
    gradients = gradient_costs(
        recipe,
        layers,
        structure,
        num_samples=num_samples,
        item_bytes=2 if bfloat16 else 4,
        rows_of=rows.of,
        pass_seconds=lambda own: _pass_seconds(own, rows, rates, bfloat16),
    )
    if gradients is not None:
        memory_parts["gradients"] = gradients.memory_bytes
    seconds_parts = _seconds(recipe, layers, structure, rows, rates, bfloat16)
    if gradients is not None:
        seconds_parts["gradients"] = gradients.seconds
    return Plan(
        layers=planned,
        untouched=untouched,
        input_bytes=sum(_num_bytes(layer) for layer in structure.layers),
        disk_bytes=sum(layer.packed_bytes for layer in planned) + rest_bytes + num_tensors * _TENSOR_HEADER_BYTES,
        memory_bytes=sum(memory_parts.values()),
        memory_parts=memory_parts,
        seconds=sum(seconds_parts.values()),
        seconds_parts=seconds_parts,
        basis=(
            f"bytes: from shapes; time: on a quiet machine, from a matrix product timed on this one just now "
            f"({rates.float32_flops / 1e9:.0f} GFLOP/s float32, {rates.bfloat16_flops / 1e9:.0f} bfloat16), "
            + (
                f"operations counted for {num_samples} x {sequence_length} tokens"
                if num_rows is None
                else "operations counted in a call with the first example"
            )
        ),
        notes=(
            *notes(recipe, structure),
            *amounts_in_words(recipe, layers, final=False),
            *(() if gradients is None else gradients.notes),
        ),
        scratch_bytes=0 if gradients is None else gradients.scratch_bytes,
    )


def _planned(layer: LayerPlan, ref: LayerRef, float_format: FloatFormat, *, is_mean: bool) -> PlannedLayer:
    pattern: Pattern | None = None
    grid: IntGrid | None = None
    num_patterns = 0
    rank: int | TapRanks | None = None
    factor_grid: IntGrid | None = None
    by_energy = False
    for _, method in layer.steps:
        wanted_rank = getattr(method, "rank", None)
        if isinstance(wanted_rank, Rank):
            most_ranks = getattr(method, "most_ranks", None)
            rank = wanted_rank.most(layer.shape) if most_ranks is None else most_ranks(ref.shape)
            by_energy = wanted_rank.energy is not None
            if pattern is None and grid is None and getattr(method, "remainder", "keep") == "drop":
                pattern = Unstructured(1.0)
        wanted = getattr(method, "pattern", None)
        if isinstance(wanted, Lines):
            wanted = wanted.fit(layer.shape)
        if isinstance(wanted, NM | Unstructured | Blocks):
            num_patterns += 1
            pattern = sparser(pattern, wanted)
        values = getattr(method, "values", None)
        if isinstance(values, IntGrid) and rank is not None and pattern == Unstructured(1.0):
            factor_grid = values
        elif isinstance(values, IntGrid):
            grid = values
    name, num_bytes = choose_format(
        layer.shape, pattern, grid, rank=rank, factor_grid=factor_grid, float_format=float_format
    )
    rows, width = layer.shape
    return PlannedLayer(
        name=layer.layer,
        shape=layer.shape,
        steps=tuple(name for name, _ in layer.steps),
        format=name,
        input_bytes=_weight_bytes(ref, rows * width),
        packed_bytes=num_bytes,
        exact=num_patterns < 2
        and not by_energy
        and not is_mean
        and (not isinstance(pattern, Blocks) or pattern.is_even(layer.shape)),
        is_mean=is_mean,
    )


def _num_bytes(layer: LayerRef) -> int:
    return int(getattr(layer, "num_bytes", 0))


def _num_weights(layer: LayerRef) -> int:
    return prod(layer.shape) if layer.shape else 0


def _item_bytes(layer: LayerRef) -> int | None:
    return _ITEM_BYTES.get(str(getattr(layer, "dtype", "")))


def _weight_bytes(layer: LayerRef, num_weights: int) -> int:
    """Bytes of the weight alone; of a type with blocks (GGUF) those of the whole layer, which has no bias then."""
    item = _item_bytes(layer)
    return _num_bytes(layer) if item is None else num_weights * item


def _rest_bytes(layer: LayerRef, targeted: bool, float_format: FloatFormat) -> int:
    """Bytes that will be written of a layer outside of its layout: matrices in rest_dtype, vectors in float32."""
    if layer.tied_to is not None and _num_bytes(layer) == 0:
        return 0
    item = _item_bytes(layer)
    num_weights = _num_weights(layer)
    num_others = 0 if item is None else max(0, _num_bytes(layer) // item - num_weights)
    matrix_item = 2 if float_format == "bf16" and len(layer.shape) >= 2 else 4
    return 4 * num_others + (0 if targeted else matrix_item * num_weights)


def _block_weights(structure: Structure) -> dict[str, int]:
    sizes: dict[str, int] = defaultdict(int)
    for layer in structure.layers:
        sizes[layer.block or ""] += _num_weights(layer)
    return dict(sizes)


def _memory(
    layers: tuple[LayerPlan, ...],
    structure: Structure,
    planned: tuple[PlannedLayer, ...],
    rest_bytes: int,
    rows: _Rows,
    bfloat16: bool,
) -> dict[str, int]:
    blocks = _block_weights(structure)
    outside = blocks.pop("", 0)
    item = 2 if bfloat16 else 4
    needs_data = [layer for layer in layers if any(_reads_inputs(method) for _, method in layer.steps)]
    grams: dict[str, int] = defaultdict(int)
    block_of = {layer.name: layer.block or "" for layer in structure.layers}
    for layer in needs_data:
        if _needs_gram(layer):
            grams[block_of[layer.layer]] += 4 * layer.shape[1] ** 2
    widest = max((layer.shape[1] for layer in needs_data if _needs_gram(layer)), default=0)
    # what the first layer of a block is given; of a convolution a number for each channel, and not for each tap too
    first: dict[str, int] = {}
    for ref in structure.layers if needs_data else ():
        if len(ref.shape) >= 2:
            first.setdefault(ref.block or "", rows.of(ref.name) * ref.shape[1])
    outermost = first.pop("", 0)
    between = max(first.values(), default=outermost)
    # float32 matrices of a layer's size that its methods hold at once: a solver several, rounding by rows three
    held = max((layer.shape[0] * layer.shape[1] * (8 if _needs_gram(layer) else 3) for layer in layers), default=0)
    return {
        "libraries": _LIBRARY_BYTES,
        "one block": (4 + item) * max(blocks.values(), default=outside),
        "layers outside of the blocks": (item if blocks and needs_data else 0) * outside,
        "activations between blocks": 2 * item * between,
        "statistics of one block": max(grams.values(), default=0),
        "solver": 4 * held + 40 * widest**2,
        "result": sum(layer.packed_bytes for layer in planned) + rest_bytes,
    }


def _needs_gram(layer: LayerPlan) -> bool:
    return any(Gram() in method.needs() for _, method in layer.steps)


def _reads_inputs(method: LayerMethod) -> bool:
    return any(not isinstance(statistic, GradientStatistic) for statistic in method.needs())


def _pass_seconds(layers: Iterable[LayerRef], rows: _Rows, rates: Rates, bfloat16: bool) -> float:
    """Time of a forward pass through some layers."""
    speed = rates.bfloat16_flops if bfloat16 else rates.float32_flops
    return sum(2 * _num_weights(layer) * rows.of(layer.name) for layer in layers) / speed * _FORWARD_OVERHEAD


def _seconds(
    recipe: Recipe,
    layers: tuple[LayerPlan, ...],
    structure: Structure,
    rows: _Rows,
    rates: Rates,
    bfloat16: bool,
) -> dict[str, float]:
    needs_data = any(_reads_inputs(method) for layer in layers for _, method in layer.steps)
    speed = rates.bfloat16_flops if bfloat16 else rates.float32_flops
    one_pass = _pass_seconds((layer for layer in structure.layers if layer.block), rows, rates, bfloat16)
    num_walks_in_all = sum(num_walks(step.looks_at()) for step in recipe.steps)
    grams = {
        (layer.layer.rpartition(".")[0], layer.shape[1]): rows.of(layer.layer) for layer in layers if _needs_gram(layer)
    }
    return {
        # over each block: one to collect statistics, one to pass on what the compressed block computes
        "forward passes": 2 * one_pass if needs_data else 0.0,
        "allocation": num_walks_in_all * one_pass,
        "statistics": sum(gram_seconds(width, num_rows, speed) for (_, width), num_rows in grams.items()),
        "solving": sum(solve_seconds(layer, rates) for layer in layers),
    }
