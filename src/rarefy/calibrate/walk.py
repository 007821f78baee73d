"""Run a model one block at a time.

The model's own forward pass decides what a block is given: it runs with every finished block replaced by its stored
output, up to the first block that is not finished. So masks, positions and the bridge from encoder to decoder are the
model's business, and the order of the blocks is the order in which the model calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from rarefy.calibrate.calls import Call, Place, leaves, same, substitute
from rarefy.core.errors import UnsupportedModelError


class Reached(BaseException):
    """Stops the model's forward pass at the block it has reached. Not an Exception: no model may swallow it."""

    def __init__(self, name: str, call: Call) -> None:
        self.name = name
        self.call = call


@contextmanager
def intercepted(
    model: nn.Module, names: Iterable[str], answer: Callable[[str, Callable[..., Any], Call], Any]
) -> Iterator[None]:
    """Let something else answer where a model calls some of its modules.

    Args:
        model: the module.
        names: of the modules inside it.
        answer: given a module's name, its own forward method and the arguments; it returns what the call does.
    """
    modules = {name: model.get_submodule(name) for name in names}

    def forward_of(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: answer(name, original, Call(args, kwargs))

    for name, module in modules.items():
        # An instance attribute shadows the class's forward; the block keeps its own attributes, which models read.
        module.forward = forward_of(name, module.forward)
    try:
        yield
    finally:
        for module in modules.values():
            del module.__dict__["forward"]


@final
class BlockWalk:
    """Walks a model's blocks in the order in which its forward pass calls them.

    Args:
        model: the module.
        blocks: names of the blocks, and for each the stack it belongs to.
        batches: the arguments of the model, one entry per batch.
        checks: whether to make sure that the model uses no block's output after those of later blocks of its stack,
            which alone are kept.

    Use as a context manager: inside it the blocks' `forward` is replaced; afterwards it is as before.
    """

    def __init__(
        self, model: nn.Module, blocks: Mapping[str, str], batches: Sequence[Call], *, checks: bool = False
    ) -> None:
        self._model = model
        self._checks = checks
        self._unknown = False
        self._stack_of = dict(blocks)
        self._batches = list(batches)
        self._replaced = intercepted(model, blocks, self._answer)
        self._outputs: dict[str, list[Any]] = {}
        self._finished: list[str] = []
        self._calls: list[Call] = []
        self._next: str | None = None
        self._batch = 0
        self._called: set[str] = set()
        self._active = False

    def __enter__(self) -> BlockWalk:
        self._replaced.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._replaced.__exit__(None, None, None)

    @property
    def unreached(self) -> tuple[str, ...]:
        """Blocks that the model has not called."""
        return tuple(name for name in self._stack_of if name not in self._finished)

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

    def check_rest(self) -> None:
        """Make sure that the model's output in the first batch needs the last blocks of stacks alone.

        Raises:
            UnsupportedModelError: it needs others.
        """
        self._unknown = True
        try:
            blind = dict(leaves(self.run_rest(0)))
        finally:
            self._unknown = False
        if not _agree(blind, dict(leaves(self.run_rest(0)))):
            raise _reads_earlier_ones("the model's output")

    def _advance(self) -> None:
        reached = self._run_model(0) if self.unreached else None
        if reached is not None and self._checks:
            self._unknown = True
            try:
                blind = self._run_model(0)
            finally:
                self._unknown = False
            if blind is None or blind.name != reached.name or not _agree(blind.call.leaves(), reached.call.leaves()):
                raise _reads_earlier_ones(f"block {reached.name}")
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

    def _run_model(self, batch: int) -> Reached | None:
        try:
            self.run_rest(batch)
        except Reached as reached:
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
        produced = {id(leaf): path for path, leaf in leaves(outputs[0]) if isinstance(leaf, Tensor)}
        before, now = self._calls[0].leaves(), first.leaves()
        if now.keys() != before.keys():
            return None
        replaced: dict[Place, Place] = {}
        for path, leaf in now.items():
            if isinstance(leaf, Tensor) and id(leaf) in produced:
                replaced[path] = produced[id(leaf)]
            elif not same(leaf, before[path]):
                return None
        if not replaced:
            return None
        calls = [first]
        for call, output in zip(self._calls[1:], outputs[1:], strict=True):
            values = dict(leaves(output))
            substitutes = {path: values[source] for path, source in replaced.items()}
            args, kwargs = substitute((call.args, call.kwargs), substitutes, ())
            calls.append(Call(args, kwargs))
        return calls

    def _answer(self, name: str, original: Callable[..., Any], call: Call) -> Any:
        if not self._active:
            return original(*call.args, **call.kwargs)
        if name not in self._finished:
            raise Reached(name, call)
        if name in self._called:
            raise UnsupportedModelError(
                f"block {name}", "the model calls it more than once", allowed="blocks called once per forward pass"
            )
        self._called.add(name)
        stack = self._stack_of[name]
        output = self._outputs[stack][self._batch]
        last = next(each for each in reversed(self._finished) if self._stack_of[each] == stack)
        if not self._unknown or name == last:
            return output
        numbers = {path: leaf for path, leaf in leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()}
        return substitute(output, {path: torch.full_like(leaf, torch.nan) for path, leaf in numbers.items()})


def _agree(one: Mapping[Place, Any], other: Mapping[Place, Any]) -> bool:
    """Whether two calls or outputs have the same values, NaN where the other has NaN, or no tensor."""
    return one.keys() == other.keys() and all(
        isinstance(leaf, Tensor) == isinstance(other[path], Tensor)
        and (not isinstance(leaf, Tensor) or torch.allclose(leaf, other[path], rtol=0, atol=0, equal_nan=True))
        for path, leaf in one.items()
    )


def _reads_earlier_ones(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(what, "it needs outputs of blocks after later ones of the same list have run")
