"""Amounts of zeros that take a look at the dense model: one more walk through its blocks, before the pass."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from rarefy.calibrate.calls import Call, calibration_mode
from rarefy.calibrate.collect import collect_statistics
from rarefy.calibrate.gradients import Gradients
from rarefy.calibrate.inputs import cast_inputs, without_cache
from rarefy.calibrate.precision import cast_parameters, modules_outside
from rarefy.calibrate.statistics import GradientStatistic, InputStatistic, Statistic
from rarefy.calibrate.walk import BlockWalk
from rarefy.checkpoint import Checkpoint
from rarefy.methods.allocation import DenseLayer, ModelAllocation
from rarefy.models.loaded import LoadedModel
from rarefy.models.memory import release_freed_memory
from rarefy.models.structure import Structure
from rarefy.nn import find_weight
from rarefy.recipe import LayerPlan, Recipe, shapes_of, sparsity_of, with_amounts
from rarefy.solve import Progress

_Stats = Mapping[Statistic, Tensor]


def allocate(
    loaded: LoadedModel,
    structure: Structure,
    recipe: Recipe,
    plans: Sequence[LayerPlan],
    calls: Sequence[Call],
    *,
    dtype: torch.dtype = torch.float32,
    gradients: Gradients | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> tuple[LayerPlan, ...]:
    """Give every layer its own amount of zeros where a step's allocation asks for a look at the dense model.

    Args:
        loaded: the model, as it is before any step; it stays so.
        structure: of the model.
        recipe: the recipe.
        plans: what `resolve` made of it.
        calls: the model's arguments, one entry per batch; not needed where no statistics are read.
        dtype: of the forward passes.
        gradients: of the dense model, where a saliency reads any.
        checkpoint: gives the amounts that an interrupted run had found, and keeps those that this one finds.
        progress: told about every batch.

    Raises:
        NonFiniteError: a weight or an activation is NaN or infinite.
    """

    def tick(done: int, total: int, detail: str) -> None:
        if progress is not None:
            progress("allocate", done, total, detail)

    allocated = tuple(plans)
    kept = {} if checkpoint is None else checkpoint.amounts()
    for place, step in enumerate(recipe.steps):
        shapes = shapes_of(place, plans, structure)
        if not isinstance(step.allocation, ModelAllocation) or not shapes:
            continue
        amounts = kept.get(str(place))
        if amounts is None:
            names = [layer.name for layer in shapes]
            reads_gradients = any(isinstance(statistic, GradientStatistic) for statistic in step.looks_at())
            own = gradients if reads_gradients else None
            with Dense(loaded, structure, names, calls, dtype, tick, own) as dense:
                amounts = step.allocation.measured_amounts(sparsity_of(step), shapes, step.method, dense)
        kept[str(place)] = amounts
        allocated = with_amounts(allocated, place, step, shapes, amounts)
    if checkpoint is not None:
        checkpoint.keep_amounts(kept)
    return allocated


@final
class Dense:
    """Some layers of a model before any step; see `DenseModel`. One block of it is in memory at a time.

    Statistics of a few numbers for each input are kept, so that a second look at them takes no forward pass; matrices
    are collected again.

    Args:
        loaded: the model.
        structure: of the model.
        layers: the layers.
        calls: the model's arguments, one entry per batch.
        dtype: of the forward passes.
        tick: told of every batch: how many are done, of how many, and which block is at work.
        gradients: those of its statistics that are of gradients.

    Use as a context manager, which ends walks that were not gone to their end.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        structure: Structure,
        layers: Sequence[str],
        calls: Sequence[Call],
        dtype: torch.dtype,
        tick: Callable[[int, int, str], None],
        gradients: Gradients | None = None,
    ) -> None:
        self._loaded = loaded
        self._model = loaded.model
        self._structure = structure
        self._calls = cast_inputs(calls, dtype)
        self._dtype = dtype
        self._tick = tick
        self._gradients = gradients
        self._done = 0
        self._walks: list[Generator[list[DenseLayer], None, None]] = []
        self._vectors: dict[str, dict[Statistic, Tensor]] = {}
        self._walked: set[Statistic] = set()  # those that `_vectors` has of every layer that an input reaches
        block_of = {layer.name: layer.block for layer in structure.layers}
        several = not structure.in_one_pass
        self._inside: dict[str, list[str]] = {block.name: [] for block in structure.blocks} if several else {}
        self._outside: list[str] = []
        for layer in layers:
            block = block_of[layer]
            (self._outside if block is None or not several else self._inside[block]).append(layer)

    def __enter__(self) -> Dense:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for walk in self._walks:
            walk.close()

    def blocks(self, statistics: Sequence[Statistic]) -> Iterator[list[DenseLayer]]:
        """See `DenseModel.blocks`."""
        self._done = 0
        inputs = [statistic for statistic in statistics if not isinstance(statistic, GradientStatistic)]
        if self._walked.issuperset(inputs):
            walk = self._weights(inputs)
        elif self._inside:
            walk = self._block_by_block(inputs)
        else:
            walk = self._whole_model(inputs)
        self._walks.append(walk)
        return walk

    def _weights(self, statistics: Sequence[InputStatistic]) -> Generator[list[DenseLayer], None, None]:
        """The weights alone, with statistics that are known already."""
        for layers in (*self._inside.values(), *([layer] for layer in self._outside)):
            known = {layer: self._vectors.get(layer, {}) for layer in layers}
            seen = {layer: own for layer, own in known.items() if own.keys() >= set(statistics)}
            yield from self._read(seen)

    def _whole_model(self, statistics: Sequence[InputStatistic]) -> Generator[list[DenseLayer], None, None]:
        """One pass for all layers, as the solver makes one where a model has no row of blocks."""
        self._loaded.materialize("")
        with (
            calibration_mode(self._model),
            without_cache(self._model),
            cast_parameters([self._model], self._dtype, restore=not self._loaded.streams),
        ):
            stats = self._collect(self._model, self._calls, self._outside, statistics)
        self._loaded.release("")
        self._remember(stats)
        for layer, own in stats.items():
            yield from self._read({layer: own})
        self._end(statistics)

    def _block_by_block(self, statistics: Sequence[InputStatistic]) -> Generator[list[DenseLayer], None, None]:
        """Block after block, each on the outputs of the dense ones before it."""
        blocks = {block.name: block.stack for block in self._structure.blocks}
        keep = not self._loaded.streams
        self._loaded.materialize("", without=frozenset(blocks), dtype=self._dtype)
        others = modules_outside(self._model, blocks)
        with (
            calibration_mode(self._model),
            without_cache(self._model),
            cast_parameters(others, self._dtype, restore=keep, recurse=False),
            BlockWalk(self._model, blocks, self._calls) as walk,
        ):
            waiting = {name for name, own in self._inside.items() if own}
            while (waiting or self._outside) and (reached := walk.next_block()) is not None:
                name, calls = reached
                waiting.discard(name)
                block = self._model.get_submodule(name)
                outputs: list[Any] | None = [] if waiting or self._outside else None
                self._loaded.materialize(name)
                with cast_parameters([block], self._dtype, restore=keep):
                    stats = self._collect(block, calls, self._inside[name], statistics, outputs, name)
                self._loaded.release(name)
                self._remember(stats)
                yield from self._read(stats)
                if outputs is not None:
                    walk.finish(outputs)
                del calls, outputs, reached
                release_freed_memory()
            rest: dict[str, dict[Statistic, Tensor]] = {}
            if self._outside:
                batches = [Call((batch,), {}) for batch in range(len(self._calls))]
                rest = self._collect(walk.run_rest, batches, self._outside, statistics)
        self._loaded.release("")
        self._remember(rest)
        for layer, own in rest.items():
            yield from self._read({layer: own})
        self._end(statistics)

    def _collect(
        self,
        block: Callable[..., Any],
        calls: Sequence[Call],
        layers: Sequence[str],
        statistics: Sequence[InputStatistic],
        outputs: list[Any] | None = None,
        name: str = "",
    ) -> dict[str, dict[Statistic, Tensor]]:
        """The statistics of some layers of the dense model; those that no input reaches are left out."""

        def tick() -> None:
            self._done += 1
            total = len(self._calls) * (len(self._inside) + bool(self._outside))
            self._tick(min(self._done, total), total, name)

        readers = self._structure.readers()
        products = {layer: product for layer in layers if (product := readers[layer].product) is not None}
        weights = {layer: find_weight(self._model, product) for layer, product in products.items()}
        wanted = dict.fromkeys(products, tuple(statistics))
        return collect_statistics(block, calls, wanted, weights=weights, outputs=outputs, tick=tick)

    def _remember(self, stats: Mapping[str, _Stats]) -> None:
        """Keep the statistics that are a vector, or one for each group of rows."""
        for layer, own in stats.items():
            num_axes = 1 + (find_weight(self._model, layer).matrix.num_row_groups > 1)
            vectors = {statistic: value for statistic, value in own.items() if value.ndim <= num_axes}
            self._vectors.setdefault(layer, {}).update(vectors)

    def _end(self, statistics: Sequence[InputStatistic]) -> None:
        """Note that a walk has been gone to its end."""
        self._walked |= {
            statistic for statistic in statistics if any(statistic in own for own in self._vectors.values())
        }

    def _read(self, stats: Mapping[str, _Stats]) -> Iterator[list[DenseLayer]]:
        """The layers with all of their statistics, without those that no gradient reaches; nothing if none is left."""
        found = []
        for layer, of_inputs in stats.items():
            gradients = {} if self._gradients is None else self._gradients.of(layer)
            if gradients is None:
                continue
            own = {**of_inputs, **gradients}
            weight = find_weight(self._model, layer)
            matrix_OI = weight.matrix.of(self._loaded.read(weight.parameter_name)).contiguous().numpy()
            groups = weight.matrix.num_row_groups if own else 1
            found.append(DenseLayer(layer, np.asarray(matrix_OI, dtype=np.float32), own, groups))
        if found:
            yield found
