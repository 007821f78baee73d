"""A model's own forward pass with what its blocks returned in their places, up to any block.

So a block can run alone in either direction: forward, what the model gives a block follows from the outputs of those
before it; backward, gradients go from a block's arguments through whatever the model does between blocks to the outputs
that they were made of. What that is (a residual stream alone, or norms, biases of positions, the bridge from encoder to
decoder) is the model's business. A pass up to a block costs little where blocks are what costs, and still less where
arguments are those of the block before (`derived.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from rarefy.calibrate.calls import Call, Place, leaves, substitute
from rarefy.calibrate.derived import DerivedCalls
from rarefy.calibrate.samples import Sample
from rarefy.calibrate.scratch import Scratch, Stored
from rarefy.calibrate.walk import Reached, intercepted

_PLAIN = str | int | float | bool | torch.dtype | torch.device | None


class UnlikeCallsError(Exception):
    """The model is no row of blocks that it calls once each, in one order, with tensors and plain values."""


@final
@dataclass(frozen=True)
class _Output:
    """What a block returned for a sample: its containers, and where the tensors in them are."""

    value: Any
    places: Mapping[Place, Stored]


@final
@dataclass(frozen=True)
class _Handed:
    """A tensor that was handed out: how often it had been changed, where it lies, and which block returned it where."""

    tensor: Tensor
    version: int
    stored: Stored
    source: tuple[str, Place]


@final
@dataclass
class Replay:
    """A model whose blocks run one at a time. Inside `active` the blocks' `forward` is replaced.

    Args:
        model: the module, in evaluation mode.
        blocks: names of its blocks.
        samples: what the model is called with.
        scratch: holds what blocks return.
        derive: whether to derive calls from others where the first sample shows how they follow.
    """

    model: nn.Module
    blocks: Sequence[str]
    samples: Sequence[Sample]
    scratch: Scratch
    derive: bool = True
    # finished blocks in the order in which the model calls them; their outputs, one for each sample
    order: list[str] = field(default_factory=list)
    _outputs: dict[str, list[_Output]] = field(default_factory=dict)
    # finished blocks through whose outputs gradients go on, whether to follow these, and what has come back to them
    through: set[str] = field(default_factory=set)
    following: bool = True
    _gradients: dict[tuple[str, int], dict[Place, Tensor]] = field(default_factory=dict)
    _next: str = ""
    _sample: int = -1
    _until: str | None = None
    _called: set[str] = field(default_factory=set)
    _watch: Callable[[str, Call], None] = lambda _name, _call: None
    # of the run that is on, by id
    _handed: dict[int, _Handed] = field(default_factory=dict)
    _calls: DerivedCalls = field(init=False)
    _checks: bool = False

    def __post_init__(self) -> None:
        self._calls = DerivedCalls(len(self.samples), self._source_of)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let the model call this object in place of its blocks."""
        with intercepted(self.model, self.blocks, self._answer):
            yield

    def next_block(self, sample: int) -> tuple[str, Call] | None:
        """The first block that is not finished, and what a sample gives it; None where the model calls no more.

        Raises:
            UnlikeCallsError: the model calls a block twice, or with objects that may hide tensors.
        """
        if sample and self._next in self._calls:
            return self._next, self._derived(sample, self._next)
        reached = self._run(sample, None)
        if not isinstance(reached, Reached):
            return None
        _check(reached.call)
        self._next = reached.name
        if self.derive:
            self._calls.see(reached.name, sample, reached.call)
        return reached.name, reached.call

    def reach(self, sample: int, block: str) -> Call:
        """What a sample gives a finished block."""
        if block in self._calls:
            return self._derived(sample, block)
        reached = self._run(sample, block)
        assert isinstance(reached, Reached)
        return reached.call

    def output(self, sample: int, watch: Callable[[str, Call], None] = lambda _name, _call: None) -> Any:
        """What the model returns for a sample.

        Args:
            sample: number of the sample.
            watch: told what every block is given.

        Raises:
            UnlikeCallsError: the model calls other blocks than for other samples, or one twice, or with something else
                than was derived.
        """
        self._checks = True
        try:
            output = self._run(sample, None, watch)
        finally:
            self._checks = False
        if isinstance(output, Reached) or len(self._called) < len(self.order):
            raise UnlikeCallsError
        return output

    def keep(self, block: str, output: Any) -> None:
        """Store what a block returned for the sample of the run before, the samples in their order.

        Raises:
            UnlikeCallsError: there are objects in it that may hide tensors.
        """
        _check(output)
        tensors = {path: leaf for path, leaf in leaves(output) if isinstance(leaf, Tensor)}
        places = {path: self._place_of(leaf) or self.scratch.put(leaf) for path, leaf in tensors.items()}
        value = substitute(output, dict.fromkeys(places))
        self._outputs.setdefault(block, []).append(_Output(value, places))

    def take_gradients(self, block: str, sample: int, *, last: bool) -> dict[Place, Tensor]:
        """The gradients that have come back to what a block returned; they are kept for another time unless `last`."""
        return self._gradients.pop((block, sample), {}) if last else self._gradients.get((block, sample), {})

    def _run(
        self, sample: int, until: str | None, watch: Callable[[str, Call], None] = lambda _name, _call: None
    ) -> Any:
        self._begin(sample)
        self._until, self._called, self._watch = until, set(), watch
        call = self.samples[sample].call
        try:
            return self.model(*call.args, **call.kwargs)
        except Reached as reached:
            return reached
        finally:
            self._sample = -1

    def _derived(self, sample: int, block: str) -> Call:
        self._begin(sample)
        try:
            return self._calls.call(block, sample, self._tensor)
        finally:
            self._sample = -1

    def _begin(self, sample: int) -> None:
        self._sample = sample
        self._handed.clear()
        self.scratch.forget()

    def _answer(self, name: str, original: Callable[..., Any], call: Call) -> Any:
        if self._sample < 0:
            return original(*call.args, **call.kwargs)
        if name == self._until or name not in self.order:
            raise Reached(name, call)
        if name in self._called:
            raise UnlikeCallsError
        self._called.add(name)
        if self._checks and name in self._calls and not self._calls.agrees(name, self._sample, call):
            raise UnlikeCallsError
        self._watch(name, call)
        output = self._outputs[name][self._sample]
        return substitute(output.value, {path: self._tensor(name, path) for path in output.places})

    def _tensor(self, name: str, path: Place) -> Tensor:
        stored = self._outputs[name][self._sample].places[path]
        key = name, self._sample

        def receive(gradient: Tensor) -> None:
            before = self._gradients.setdefault(key, {}).get(path)
            self._gradients[key][path] = gradient if before is None else before + gradient

        if name in self.through and self.following and torch.is_grad_enabled() and stored.dtype.is_floating_point:
            anchor = torch.zeros((), requires_grad=True)
            tensor: Tensor = _Border.apply(anchor, lambda: self.scratch.get(stored), receive)  # type: ignore[no-untyped-call]
        else:
            tensor = self.scratch.get(stored)
        self._handed[id(tensor)] = _Handed(tensor, tensor._version, stored, (name, path))
        return tensor

    def _place_of(self, tensor: Tensor) -> Stored | None:
        """Where a tensor lies already that a block was given and handed on as it was."""
        return self._handed[id(tensor)].stored if self._source_of(tensor) is not None else None

    def _source_of(self, tensor: Tensor) -> tuple[str, Place] | None:
        """What a tensor is of that was handed out in this run and is as it was."""
        handed = self._handed.get(id(tensor))
        if handed is None or handed.tensor is not tensor or handed.version != tensor._version:
            return None
        return handed.source


class _Border(torch.autograd.Function):
    """A tensor that no operation made, whose gradient goes to whom it concerns."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, make: Callable[[], Tensor], receive: Callable[[Tensor], None]) -> Tensor:
        """The tensor; `anchor` makes autograd follow it."""
        del anchor
        ctx.receive = receive
        return make()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        """Hand the gradient over."""
        ctx.receive(gradients[0])
        return None, None, None


def _check(value: Any) -> None:
    inside = (value.args, value.kwargs) if isinstance(value, Call) else value
    if not all(isinstance(leaf, Tensor | _PLAIN) for _, leaf in leaves(inside)):
        raise UnlikeCallsError
