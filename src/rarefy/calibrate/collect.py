"""Run a model one block at a time, and collect statistics of the inputs of its layers on the way.

Shape suffixes: T tokens, I inputs of a layer.

The model's own forward pass decides what a block is given: it runs with every finished block replaced by its stored
output, up to the first block that is not finished. So masks, positions and the bridge from encoder to decoder are the
model's business, and the order of the blocks is the order in which the model calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from rarefy.calibrate.statistics import InputStatistic, Statistic, Sum
from rarefy.core.errors import NonFiniteError, UnsupportedModelError
from rarefy.nn.matrices import Kind, Matrix, Weight, first_input


@final
@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module, for one batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def leaves(self) -> dict[tuple[str | int, ...], Any]:
        """Every value in the arguments that is no container, by its path."""
        return dict(_leaves((self.args, self.kwargs)))


class _Reached(BaseException):
    """Stops the model's forward pass at the block it has reached. Not an Exception: no model may swallow it."""

    def __init__(self, name: str, call: Call) -> None:
        self.name = name
        self.call = call


class _Finished(BaseException):
    """Stops a block's forward pass when its last wanted layer has seen its input."""


@final
class BlockWalk:
    """Walks a model's blocks in the order in which its forward pass calls them.

    Args:
        model: the module.
        blocks: names of the blocks, and for each the stack it belongs to.
        batches: the arguments of the model, one entry per batch.

    Use as a context manager: inside it the blocks' `forward` is replaced; afterwards it is as before.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, str], batches: Sequence[Call]) -> None:
        self._model = model
        self._stack_of = dict(blocks)
        self._batches = list(batches)
        self._modules = {name: model.get_submodule(name) for name in blocks}
        self._outputs: dict[str, list[Any]] = {}
        self._finished: list[str] = []
        self._calls: list[Call] = []
        self._next: str | None = None
        self._batch = 0
        self._called: set[str] = set()
        self._active = False

    def __enter__(self) -> BlockWalk:
        for name, module in self._modules.items():
            # An instance attribute shadows the class's forward; the block keeps its own attributes, which models read.
            module.forward = self._interceptor(name, module.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for module in self._modules.values():
            del module.__dict__["forward"]

    @property
    def unreached(self) -> tuple[str, ...]:
        """Blocks that the model has not called."""
        return tuple(name for name in self._modules if name not in self._finished)

    def next_block(self) -> tuple[str, list[Call]] | None:
        """The next block that the model calls, with its arguments in every batch; None when the model is through."""
        if not self._calls:
            self._advance()
        return None if self._next is None else (self._next, self._calls)

    def finish(self, outputs: list[Any]) -> None:
        """Store what the block of `next_block` returned in each batch; from now on the model is given that."""
        assert self._next is not None
        self._outputs[self._stack_of[self._next]] = outputs
        self._finished.append(self._next)
        # Derived at once, so that the arguments of the finished block are not held any longer.
        self._advance()

    def run_rest(self, batch: int) -> Any:
        """The model's output for one batch, with every block's stored output in its place."""
        self._batch, self._called, self._active = batch, set(), True
        call = self._batches[batch]
        try:
            return self._model(*call.args, **call.kwargs)
        finally:
            self._active = False

    def _advance(self) -> None:
        reached = self._run_model(0) if self.unreached else None
        if reached is None:
            self._next = None
            return
        calls = self._derive_calls(reached.call)
        if calls is None:
            calls = [reached.call]
            for batch in range(1, len(self._batches)):
                other = self._run_model(batch)
                if other is None or other.name != reached.name:
                    raise UnsupportedModelError(
                        f"block {reached.name}", "the model calls its blocks in an order that depends on the data"
                    )
                calls.append(other.call)
        self._next, self._calls = reached.name, calls

    def _run_model(self, batch: int) -> _Reached | None:
        try:
            self.run_rest(batch)
        except _Reached as reached:
            return reached
        return None

    def _derive_calls(self, first: Call) -> list[Call] | None:
        """The calls in all batches from those of the block before, if the first batch shows how they follow.

        That is so when every argument either is an output of the block before, or equals what that block was given.
        It saves running the model up to here for every batch.
        """
        if not self._finished or self._stack_of[self._finished[-1]] not in self._outputs:
            return None
        outputs = self._outputs[self._stack_of[self._finished[-1]]]
        produced = {id(leaf): path for path, leaf in _leaves(outputs[0]) if isinstance(leaf, Tensor)}
        before, now = self._calls[0].leaves(), first.leaves()
        if now.keys() != before.keys():
            return None
        replaced: dict[tuple[str | int, ...], tuple[str | int, ...]] = {}
        for path, leaf in now.items():
            if isinstance(leaf, Tensor) and id(leaf) in produced:
                replaced[path] = produced[id(leaf)]
            elif not _same(leaf, before[path]):
                return None
        if not replaced:
            return None
        calls = [first]
        for call, output in zip(self._calls[1:], outputs[1:], strict=True):
            values = dict(_leaves(output))
            substitutes = {path: values[source] for path, source in replaced.items()}
            args, kwargs = _substitute((call.args, call.kwargs), substitutes, ())
            calls.append(Call(args, kwargs))
        return calls

    def _interceptor(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return original(*args, **kwargs)
            if name not in self._finished:
                raise _Reached(name, Call(args, kwargs))
            if name in self._called:
                raise UnsupportedModelError(
                    f"block {name}", "the model calls it more than once", allowed="blocks called once per forward pass"
                )
            self._called.add(name)
            return self._outputs[self._stack_of[name]][self._batch]

        return forward


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


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and none of torch's fused shortcuts that bypass the layers they are made of."""
    training = model.training
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        model.train(training)


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    else:
        yield path, value


def _substitute(value: Any, substitutes: Mapping[tuple[str | int, ...], Any], path: tuple[str | int, ...]) -> Any:
    if path in substitutes:
        return substitutes[path]
    if isinstance(value, tuple | list):
        items = [_substitute(item, substitutes, (*path, index)) for index, item in enumerate(value)]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, dict):
        return {key: _substitute(item, substitutes, (*path, key)) for key, item in value.items()}
    return value


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, str | int | float | bool | torch.dtype | torch.device) and type(a) is type(b):
        return bool(a == b)
    return False
