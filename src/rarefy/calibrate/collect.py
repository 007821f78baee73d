"""Collect statistics of the inputs of layers while a block runs over all batches.

Shape suffixes: T tokens, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from rarefy.calibrate.calls import Call
from rarefy.calibrate.statistics import InputStatistic, Statistic, Sum
from rarefy.core.errors import NonFiniteError
from rarefy.nn.matrices import Kind, Matrix, Weight, first_input


class _Finished(BaseException):
    """Stops a block's forward pass when its last wanted layer has seen its input. Not an Exception: see `walk`."""


@final
@dataclass
class _Layer:
    """What is collected for one layer during a pass: for each statistic a sum for each part of its rows."""

    weight: Weight
    states: dict[InputStatistic, list[Sum]]
    leader: _Layer | None = None


@final
@dataclass
class _Module:
    """A module whose calls are watched, its layers, and what it was given last."""

    module: nn.Module
    kind: Kind
    layers: dict[str, _Layer] = field(default_factory=dict)
    key: Hashable = None
    leader: _Module | None = None
    last_input: Any = None
    num_calls: int = 0


class _SharingEndedError(Exception):
    """Two layers that were given one tensor in the first batch are given two in a later one."""


def collect_statistics(
    block: Callable[..., Any],
    calls: Sequence[Call],
    wanted: Mapping[str, Sequence[InputStatistic]],
    *,
    weights: Mapping[str, Weight],
    outputs: list[Any] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, dict[Statistic, Tensor]]:
    """Run a block over all batches and return the finished statistics of its layers.

    Layers that are given the same tensor (q, k and v of attention; gate and up of a gated MLP) share one collection.

    Args:
        block: the module (or function) to run.
        calls: its arguments, one entry per batch.
        wanted: for each layer name the statistics to collect.
        weights: the matrix of each layer.
        outputs: filled with what the block returns in each batch; None: it need not run to its end.
        tick: called after each batch.

    Returns:
        For each layer that saw an input, each statistic; of a matrix whose rows meet inputs of their own in groups, one
        for each group, along a first axis.

    Raises:
        NonFiniteError: a layer's input is NaN or infinite.
    """
    try:
        return _collect(block, calls, wanted, weights, outputs, tick, share=True)
    except _SharingEndedError:
        if outputs is not None:
            outputs.clear()
        return _collect(block, calls, wanted, weights, outputs, tick, share=False)


def _collect(
    block: Callable[..., Any],
    calls: Sequence[Call],
    wanted: Mapping[str, Sequence[InputStatistic]],
    weights: Mapping[str, Weight],
    outputs: list[Any] | None,
    tick: Callable[[], None],
    *,
    share: bool,
) -> dict[str, dict[Statistic, Tensor]]:
    layers = {
        name: _Layer(weights[name], {statistic: _sums(statistic, weights[name].matrix) for statistic in statistics})
        for name, statistics in wanted.items()
        if statistics
    }
    modules: dict[int, _Module] = {}
    for layer in layers.values():
        weight = layer.weight
        watched = modules.setdefault(id(weight.module), _Module(weight.module, weight.kind))
        watched.layers[weight.matrix.name] = layer
        watched.key = weight.kind.rows_key(weight.module)
    order: list[_Module] = []
    seen: set[int] = set()
    may_stop = False
    batch = 0

    def hook(watched: _Module) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_input(args, kwargs)
            order.append(watched)
            watched.num_calls += 1
            watched.last_input = x
            if batch == 0 and share and watched.num_calls == 1:
                watched.leader = _leader(modules.values(), watched, x)
            if watched.leader is not None:
                if watched.leader.last_input is not x or watched.leader.num_calls != watched.num_calls:
                    raise _SharingEndedError
            else:
                for name, group, rows_TI in watched.kind.rows(module, args, kwargs, tuple(watched.layers)):
                    for statistic, states in watched.layers[name].states.items():
                        statistic.update(states[group], rows_TI.detach())
            seen.add(id(module))
            if may_stop and len(order) == len(modules):
                raise _Finished

        return before

    handles = [
        watched.module.register_forward_pre_hook(hook(watched), with_kwargs=True) for watched in modules.values()
    ]
    try:
        for call in calls:
            for watched in modules.values():
                watched.num_calls = 0
            order.clear()
            with suppress(_Finished):
                output = block(*call.args, **call.kwargs)
                if outputs is not None:
                    outputs.append(output)
            if batch == 0:
                # Once every layer has been called exactly once, what follows the last of them need not be computed.
                called_once = len(order) == len(modules) == len({id(watched) for watched in order})
                may_stop = called_once and outputs is None
                _check_first_batch(modules.values())
            batch += 1
            tick()
    finally:
        for handle in handles:
            handle.remove()
        for watched in modules.values():
            watched.last_input = None
    found = {name: layer for name, layer in layers.items() if id(layer.weight.module) in seen}
    finished = {name: _finished(name, layer) for name, layer in found.items() if _leader_of(layer, modules) is None}
    names = {id(layer): name for name, layer in layers.items()}
    for name, layer in found.items():
        leader = _leader_of(layer, modules)
        if leader is not None:
            finished[name] = finished[names[id(leader)]]
    return {name: finished[name] for name in wanted if name in finished}


def _sums(statistic: InputStatistic, matrix: Matrix) -> list[Sum]:
    return [statistic.init(matrix.shape[1]) for _ in range(matrix.num_row_groups)]


def _finished(name: str, layer: _Layer) -> dict[Statistic, Tensor]:
    finished: dict[Statistic, Tensor] = {}
    for statistic, states in layer.states.items():
        values = [statistic.finish(state) for state in states]
        value = values[0] if len(values) == 1 else torch.stack(values)
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"layer {name}",
                f"its inputs are NaN or infinite ({type(statistic).__name__})",
                hint="the model overflows on this calibration text",
            )
        finished[statistic] = value
    return finished


def _leader_of(layer: _Layer, modules: Mapping[int, _Module]) -> _Layer | None:
    """The layer whose statistics are those of this one."""
    leader = modules[id(layer.weight.module)].leader
    return None if leader is None else leader.layers[layer.weight.matrix.name]


def _leader(modules: Iterable[_Module], watched: _Module, x: Any) -> _Module | None:
    """A module that was given the same tensor just before, meets the same rows, and collects at least the same."""
    for other in modules:
        if (
            other is not watched
            and other.leader is None
            and other.last_input is x
            and other.num_calls == 1
            and watched.key is not None
            and other.key == watched.key
            and all(
                name in other.layers and layer.states.keys() <= other.layers[name].states.keys()
                for name, layer in watched.layers.items()
            )
        ):
            return other
    return None


def _check_first_batch(modules: Iterable[_Module]) -> None:
    for watched in modules:
        if watched.leader is not None and watched.leader.num_calls != watched.num_calls:
            raise _SharingEndedError
