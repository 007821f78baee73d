"""Statistics of gradients: forward and backward passes of the whole dense model, a sample at a time.

Shape suffixes: O outputs, I inputs.

A layer's gradient is added to its sums as soon as the backward pass has it, and freed: what is held at once are the
model, the activations of one sample, one gradient, and the sums. Where the sums of all layers are more than a budget,
the layers are taken in chunks, each with passes of its own, which go back to the first layer of the chunk only.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from rarefy.calibrate.calls import Call, calibration_mode
from rarefy.calibrate.data import CalibrationData
from rarefy.calibrate.gradient_statistics import FisherBlocks
from rarefy.calibrate.inputs import cast_inputs, without_cache
from rarefy.calibrate.losses import Loss, negative_log_likelihood
from rarefy.calibrate.precision import cast_parameters
from rarefy.calibrate.statistics import GradientStatistic, Statistic, Sum
from rarefy.core.errors import NonFiniteError, UsageError
from rarefy.models.loaded import LoadedModel
from rarefy.models.memory import release_freed_memory
from rarefy.models.structure import Structure
from rarefy.nn import Weight, find_weight

_MOST_BYTES = 4 << 30
_SHARE_OF_MEMORY = 4


@final
@dataclass(frozen=True)
class Sample:
    """What one gradient is of: a call, and the labels of what is in it."""

    call: Call
    labels: Tensor | None = None


def samples_of(calls: Sequence[Call], labels: Sequence[Tensor | None]) -> list[Sample]:
    """Cut batches into samples, where it is known what a sample is; else a batch is one.

    It is known of token ids and wherever there are labels: both have an entry for each sample along their first axis,
    and so have then those arguments that are as long.
    """
    samples = []
    for call, own in zip(calls, labels, strict=True):
        ids = call.kwargs.get("input_ids")
        counted = own if own is not None else ids if isinstance(ids, Tensor) and ids.ndim > 1 else None
        if counted is None or counted.ndim == 0:
            samples.append(Sample(call, own))
            continue
        count = counted.shape[0]
        for row in range(count):
            args = tuple(_row(value, row, count) for value in call.args)
            kwargs = {key: _row(value, row, count) for key, value in call.kwargs.items()}
            samples.append(Sample(Call(args, kwargs), None if own is None else own[row : row + 1]))
    return samples


def _row(value: Any, row: int, count: int) -> Any:
    has_rows = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == count
    return value[row : row + 1] if has_rows else value


def collect_gradients(
    model: nn.Module,
    samples: Sequence[Sample],
    wanted: Mapping[str, Sequence[GradientStatistic]],
    weights: Mapping[str, Weight],
    *,
    loss: Loss | None = None,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, dict[Statistic, Tensor]]:
    """Run a model forward and backward over all samples and return the finished statistics of its layers.

    Args:
        model: the module, in evaluation mode; its parameters are as before afterwards.
        samples: one gradient is taken of each.
        wanted: for each layer name the statistics to collect.
        weights: the matrix of each layer.
        loss: of the output and the labels, to a scalar; None: see `losses.negative_log_likelihood`.
        seed: of labels that are drawn.
        tick: called after each sample.

    Returns:
        For each layer that got a gradient, each statistic; of a matrix whose rows meet inputs of their own in groups,
        one for each group, along a first axis.

    Raises:
        NonFiniteError: a loss or a layer's gradient is NaN or infinite.
    """
    states = {
        layer: {statistic: statistic.init(weights[layer].matrix.shape) for statistic in statistics}
        for layer, statistics in wanted.items()
    }
    seen: set[str] = set()
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad(), _hooks(model, states, weights, seen):
        for number, sample in enumerate(samples):
            output = model(*sample.call.args, **sample.call.kwargs)
            if loss is None:
                value = negative_log_likelihood(model, sample.call, output, sample.labels, generator)
            else:
                value = loss(output, sample.labels)
            if not bool(torch.isfinite(value.detach())):
                raise NonFiniteError(
                    f"calibration sample {number}", "its loss is NaN or infinite", hint="look at the model's outputs"
                )
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]
            tick()
    return {layer: _finished(layer, weights[layer], states.pop(layer)) for layer in wanted if layer in seen}


@contextmanager
def _hooks(
    model: nn.Module,
    states: Mapping[str, Mapping[GradientStatistic, Sum]],
    weights: Mapping[str, Weight],
    seen: set[str],
) -> Iterator[None]:
    """Let backward passes compute the gradients of the wanted layers alone, and add each at once to its sums."""
    layers_of: dict[int, list[str]] = {}
    for layer in states:
        layers_of.setdefault(id(weights[layer].parameter), []).append(layer)

    def add(parameter: Tensor) -> None:
        gradient = parameter.grad
        parameter.grad = None
        assert gradient is not None
        for layer in layers_of[id(parameter)]:
            gradient_OI = weights[layer].matrix.of(gradient)
            for statistic, state in states[layer].items():
                statistic.add_gradient(state, gradient_OI)
            seen.add(layer)

    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    handles = []
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in layers_of)
            if id(parameter) in layers_of:
                handles.append(parameter.register_post_accumulate_grad_hook(add))  # type: ignore[no-untyped-call]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _finished(layer: str, weight: Weight, states: Mapping[GradientStatistic, Sum]) -> dict[Statistic, Tensor]:
    finished: dict[Statistic, Tensor] = {}
    for statistic, state in states.items():
        value = statistic.finish(state)
        if not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"layer {layer}",
                f"its gradients are NaN or infinite ({type(statistic).__name__})",
                hint="the backward pass overflows on this calibration data; try compute_dtype float32, or other data",
            )
        num_groups = weight.matrix.num_row_groups
        finished[statistic] = value if num_groups == 1 else value.view(num_groups, -1, *value.shape[1:])
    return finished


@final
class Gradients:
    """The gradient statistics of a model's layers as it was given, collected when a layer's are asked for.

    Args:
        loaded: the model; a copy of it is held until the statistics of all layers are there or, where they do not fit
            the budget at once, as long as this object is. One of a streaming model is in memory in passes only.
        calls: the model's arguments, one entry per batch.
        labels: of each batch, or None.
        wanted: for each layer the statistics, in the order in which they will be asked for.
        dtype: of the passes.
        loss: see `collect_gradients`.
        seed: of labels that are drawn.
        budget_bytes: for the sums that are held at once; None: a quarter of the machine's memory, at most 4 GiB.
        tick: told how many samples are done, of how many.

    Raises:
        UsageError: the blocks of one layer alone are more than the budget.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        calls: Sequence[Call],
        labels: Sequence[Tensor | None],
        wanted: Mapping[str, Sequence[GradientStatistic]],
        *,
        dtype: torch.dtype = torch.float32,
        loss: Loss | None = None,
        seed: int = 0,
        budget_bytes: int | None = None,
        tick: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        self._loaded: LoadedModel | None = dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))
        self._samples = samples_of(cast_inputs(calls, dtype), labels)
        self._wanted = dict(wanted)
        self._dtype, self._loss, self._seed = dtype, loss, seed
        budget = most_bytes() if budget_bytes is None else budget_bytes
        shapes = {layer: find_weight(loaded.model, layer).matrix.shape for layer in wanted}
        self._chunks = chunks_of(wanted, shapes, budget)
        self._chunk = -1
        self._found: dict[str, dict[Statistic, Tensor]] = {}
        self._tick = tick
        self._done = 0

    def of(self, layer: str) -> Mapping[Statistic, Tensor] | None:
        """The statistics of a layer; none where it wants none, and None where no gradient reached it."""
        if layer not in self._wanted:
            return {}
        chunk = next(number for number, layers in enumerate(self._chunks) if layer in layers)
        if chunk != self._chunk:
            self._collect(chunk)
        return self._found.get(layer)

    def _collect(self, chunk: int) -> None:
        assert self._loaded is not None
        self._found.clear()
        release_freed_memory()
        loaded, model = self._loaded, self._loaded.model
        wanted = {layer: self._wanted[layer] for layer in self._chunks[chunk]}
        total = len(self._samples) * len(self._chunks)

        def tick() -> None:
            self._done += 1
            self._tick(min(self._done, total), total)

        loaded.materialize("", dtype=self._dtype)
        weights = {layer: find_weight(model, layer) for layer in wanted}
        with (
            calibration_mode(model),
            without_cache(model),
            cast_parameters([model], self._dtype, restore=False),
        ):
            self._found = collect_gradients(
                model, self._samples, wanted, weights, loss=self._loss, seed=self._seed, tick=tick
            )
        loaded.release("")
        self._chunk = chunk
        if len(self._chunks) == 1:
            self._loaded = None
        release_freed_memory()


def dense_gradients(
    loaded: LoadedModel,
    structure: Structure,
    wanted: Mapping[str, Sequence[Statistic]],
    data: CalibrationData,
    *,
    dtype: torch.dtype,
    loss: Loss | None,
    seed: int,
    progress: Callable[[str, int, int, str], None] | None,
) -> Gradients | None:
    """The gradients of a model as it is now, in the order in which layers are solved; None if no layer wants any."""
    outside = {layer.name for layer in structure.layers if layer.block is None}
    chosen: dict[str, list[GradientStatistic]] = {}
    for layer in sorted(wanted, key=lambda layer: layer in outside):
        own = [statistic for statistic in dict.fromkeys(wanted[layer]) if isinstance(statistic, GradientStatistic)]
        if own:
            chosen[layer] = own
    if not chosen:
        return None

    def tick(done: int, total: int) -> None:
        if progress is not None:
            progress("gradients", done, total, "")

    return Gradients(loaded, data.calls, data.labels, chosen, dtype=dtype, loss=loss, seed=seed, tick=tick)


def most_bytes() -> int:
    """What the sums of gradient statistics may take at once on this machine."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(_MOST_BYTES, physical // _SHARE_OF_MEMORY)


def chunks_of(
    wanted: Mapping[str, Sequence[GradientStatistic]], shapes: Mapping[str, tuple[int, int]], budget: int
) -> list[list[str]]:
    """Runs of layers whose sums fit a budget together.

    Raises:
        UsageError: the blocks of one layer alone are more than the budget.
    """
    chunks: list[list[str]] = []
    used = 0
    for layer, statistics in wanted.items():
        num_bytes = sum(sum_bytes(statistic, shapes[layer]) for statistic in statistics)
        for statistic in statistics:
            if isinstance(statistic, FisherBlocks) and sum_bytes(statistic, shapes[layer]) > budget:
                raise _too_large(layer, statistic, shapes[layer], budget)
        if not chunks or used + num_bytes > budget:
            chunks.append([])
            used = 0
        chunks[-1].append(layer)
        used += num_bytes
    return chunks


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
