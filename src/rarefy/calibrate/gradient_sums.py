"""The sums of gradient statistics while passes run: which fit together, and how gradients get into them.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rarefy.calibrate.gradient_statistics import FisherBlocks
from rarefy.calibrate.statistics import GradientStatistic, Statistic, Sum
from rarefy.core.errors import NonFiniteError, UsageError
from rarefy.nn import Weight

_MOST_BYTES = 2 << 30
_SHARE_OF_MEMORY = 4

Wanted = Mapping[str, Sequence[GradientStatistic]]


@final
class GradientSums:
    """The sums of some layers. A layer's gradient is added as soon as a backward pass has all of it, and dropped.

    Args:
        wanted: for each layer its statistics.
        weights: the matrix of each of these layers.
    """

    def __init__(self, wanted: Wanted, weights: Mapping[str, Weight]) -> None:
        self._weights = weights
        self._states: dict[str, dict[GradientStatistic, Sum]] = {}
        self._layers_of: dict[int, list[str]] = {}
        self._seen: set[str] = set()
        for layer, statistics in wanted.items():
            matrix = weights[layer].matrix
            self._states[layer] = {each: each.init(matrix.shape, math.prod(matrix.taps)) for each in statistics}
            self._layers_of.setdefault(id(weights[layer].parameter), []).append(layer)

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Let backward passes compute the gradients of these layers, and add them."""
        chosen = {id(parameter): parameter for parameter in (self._weights[layer].parameter for layer in self._states)}
        handles: list[RemovableHandle] = []
        with requiring(chosen.values()):
            try:
                for parameter in chosen.values():
                    handles.append(parameter.register_post_accumulate_grad_hook(self._add))  # type: ignore[no-untyped-call]
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def finished(self) -> Iterator[tuple[str, dict[Statistic, Tensor]]]:
        """The statistics of each layer that got a gradient, whose sums are then not held any longer.

        Of a matrix whose rows meet inputs of their own in groups there is one of each group, along a first axis.

        Raises:
            NonFiniteError: a layer's gradient was NaN or infinite.
        """
        for layer in list(self._states):
            states = self._states.pop(layer)
            if layer in self._seen:
                yield layer, _finished(layer, self._weights[layer].matrix.num_row_groups, states)

    def _add(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        parameter.grad = None
        assert gradient is not None
        for layer in self._layers_of[id(parameter)]:
            gradient_OI = self._weights[layer].matrix.of(gradient)
            for statistic, state in self._states[layer].items():
                statistic.add_gradient(state, gradient_OI)
            self._seen.add(layer)


def _finished(layer: str, num_groups: int, states: Mapping[GradientStatistic, Sum]) -> dict[Statistic, Tensor]:
    finished: dict[Statistic, Tensor] = {}
    for statistic, state in states.items():
        value = statistic.finish(state)
        if not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"layer {layer}",
                f"its gradients are NaN or infinite ({type(statistic).__name__})",
                hint="the backward pass overflows on this calibration data; try compute_dtype float32, or other data",
            )
        finished[statistic] = value if num_groups == 1 else value.view(num_groups, -1, *value.shape[1:])
    return finished


@contextmanager
def requiring(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Let some parameters require gradients, where no other does."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Let no parameter that a model holds require a gradient, and put back what there was afterwards."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def most_bytes() -> int:
    """What the sums of gradient statistics may take at once on this machine."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(_MOST_BYTES, physical // _SHARE_OF_MEMORY)


def chunks_of(wanted: Wanted, shapes: Mapping[str, tuple[int, int]], budget: int) -> list[list[str]]:
    """Runs of layers whose sums fit a budget together: as few as there can be, and of those with the smallest largest.

    Raises:
        UsageError: the blocks of one layer alone are more than the budget.
    """
    size_of: dict[str, int] = {}
    for layer, statistics in wanted.items():
        size_of[layer] = sum(sum_bytes(statistic, shapes[layer]) for statistic in statistics)
        for statistic in statistics:
            if isinstance(statistic, FisherBlocks) and sum_bytes(statistic, shapes[layer]) > budget:
                raise _too_large(layer, statistic, shapes[layer], budget)
    chunks = _runs(size_of, budget)
    low, high = 0, budget
    while high - low > 1:
        middle = (low + high) // 2
        tighter = _runs(size_of, middle)
        if len(tighter) > len(chunks):
            low = middle
        else:
            chunks, high = tighter, middle
    return chunks


def _runs(size_of: Mapping[str, int], most: int) -> list[list[str]]:
    """Runs of layers that are at most so large, or have one layer that is larger alone."""
    runs: list[list[str]] = []
    used = 0
    for layer, size in size_of.items():
        if not runs or used + size > most:
            runs.append([])
            used = 0
        runs[-1].append(layer)
        used += size
    return runs


def sum_bytes(statistic: GradientStatistic, shape: tuple[int, int]) -> int:
    """Bytes of the sum of a statistic for a matrix."""
    return 4 * statistic.num_floats(shape)


def _too_large(layer: str, statistic: FisherBlocks, shape: tuple[int, int], budget: int) -> UsageError:
    fits = statistic.block_size
    while fits > 1 and sum_bytes(FisherBlocks(fits), shape) > budget:
        fits -= 1
    needed = sum_bytes(statistic, shape)
    return UsageError(
        f"layer {layer}",
        f"its Fisher blocks of {statistic.block_size} columns take {needed} bytes",
        allowed=f"{budget} bytes",
        hint=f"block_size: {fits} fits"
        if sum_bytes(FisherBlocks(fits), shape) <= budget
        else "exclude the layer, or use obd",
    )
