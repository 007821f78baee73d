"""One pass forward and one backward over a model's blocks, for statistics of gradients; see `gradients.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from rarefy.calibrate.calls import Call, Place, leaves, substitute
from rarefy.calibrate.gradient_sums import GradientSums, Wanted, chunks_of, requiring
from rarefy.calibrate.losses import Loss, negative_log_likelihood
from rarefy.calibrate.precision import cast_parameters, modules_outside
from rarefy.calibrate.replay import Replay, UnlikeCallsError
from rarefy.calibrate.samples import Sample
from rarefy.calibrate.scratch import Scratch, Stored
from rarefy.calibrate.statistics import GradientStatistic, Statistic
from rarefy.core.errors import NonFiniteError
from rarefy.models.loaded import LoadedModel
from rarefy.models.memory import release_freed_memory
from rarefy.nn import Weight


@final
class GradientPass:
    """One pass forward and one backward: what all of its steps need at hand."""

    def __init__(
        self,
        loaded: LoadedModel,
        replay: Replay,
        wanted: Wanted,
        weights: Mapping[str, Weight],
        dtype: torch.dtype,
        budget: int,
        scratch: Scratch,
        tick: Callable[[int, int, str], None],
    ) -> None:
        self._loaded, self._model, self._replay = loaded, loaded.model, replay
        self._weights, self._dtype, self._budget = weights, dtype, budget
        self._keep_values = not loaded.streams
        self._scratch = scratch
        self._places: dict[str, dict[Statistic, Stored]] = {}
        self._numbers = range(len(replay.samples))
        self._inside: dict[str, dict[str, Sequence[GradientStatistic]]] = {}
        self._outside: dict[str, Sequence[GradientStatistic]] = {}
        for layer, statistics in wanted.items():
            block = block_of(layer, replay.blocks)
            (self._outside if block is None else self._inside.setdefault(block, {}))[layer] = statistics
        # Weights outside of the blocks that are used before some of them, and the arguments of these that tell of it;
        # what comes back to those arguments is kept until the end.
        self._early: set[int] = set()
        self._from_early: dict[str, list[Place]] = {}
        self._kept: dict[tuple[str, Place, int], Stored] = {}
        self._tick_of, self._done = tick, 0
        self._total = len(self._numbers) * (2 * len(replay.blocks) + 1)

    def run(self, loss: Loss | None, seed: int) -> dict[str, dict[Statistic, Stored]]:
        """Go through all blocks and back; where the statistics are of each layer that got a gradient."""
        blocks = self._replay.blocks
        outside = modules_outside(self._model, blocks)
        self._loaded.materialize("", without=frozenset(blocks), dtype=self._dtype)
        try:
            with (
                cast_parameters(outside, self._dtype, restore=self._keep_values, recurse=False),
                self._replay.active(),
            ):
                while self._numbers and self._forward_through_next():
                    pass
                losses = _Losses(self._model, self._replay.samples, loss, seed)
                self._backward_to_blocks(losses)
                for name in reversed(self._replay.order):
                    if name in self._replay.through:
                        self._backward_through(name)
                self._backward_before_blocks(losses)
        finally:
            self._loaded.release("")
        return self._places

    def _forward_through_next(self) -> bool:
        """Store what the next block returns for every sample; False where there is none."""
        replay = self._replay
        if len(replay.order) == len(replay.blocks):
            return False
        with torch.enable_grad(), requiring([self._weights[layer].parameter for layer in self._outside]):
            reached = replay.next_block(0)
        if reached is None:
            return False
        name, call = reached
        self._trace(name, call)
        with self._in_memory(name) as block:
            for number in self._numbers:
                if number:
                    reached = replay.next_block(number)
                    if reached is None or reached[0] != name:
                        raise UnlikeCallsError
                    call = reached[1]
                replay.keep(name, block(*call.args, **call.kwargs))
                self._tick(name)
        replay.order.append(name)
        if len(replay.order) == 1:
            replay.scratch.check_room(replay.scratch.num_bytes * (len(replay.blocks) - 1), "hidden states")
        return True

    def _trace(self, name: str, call: Call) -> None:
        """Note what a block's arguments depend on: it shows in those of the first sample."""
        follows = [(path, leaf) for path, leaf in call.leaves().items() if isinstance(leaf, Tensor)]
        follows = [(path, leaf) for path, leaf in follows if leaf.requires_grad]
        outside = {id(self._weights[layer].parameter) for layer in self._outside}
        for path, leaf in follows:
            found = _leads_to(leaf) & outside
            if found:
                self._early |= found
                self._from_early.setdefault(name, []).append(path)
        if follows or name in self._inside:
            self._replay.through.add(name)

    def _backward_to_blocks(self, losses: _Losses) -> None:
        """From the loss to the last blocks, and to weights that are used after the blocks alone."""
        late = {layer: own for layer, own in self._outside.items() if not self._is_early(layer)}
        if not late and not self._replay.through:
            return
        for first, _, sums in self._sums(late):
            self._replay.following = first
            losses.restart()
            with torch.enable_grad(), sums.adding():
                for number in self._numbers:
                    value = losses.of(number, self._replay.output(number))
                    if value.requires_grad:
                        value.backward()  # type: ignore[no-untyped-call]
                    self._tick("loss")

    def _backward_through(self, name: str) -> None:
        """Through one block, for every sample."""
        with self._in_memory(name) as block:
            for first, last, sums in self._sums(self._inside.get(name, {})):
                with torch.enable_grad(), sums.adding():
                    for number in self._numbers:
                        gradients = self._replay.take_gradients(name, number, last=last)
                        if gradients:
                            self._backward_sample(name, block, number, gradients, hand_down=first)
                        self._tick(name)

    def _backward_sample(
        self, name: str, block: nn.Module, number: int, gradients: Mapping[Place, Tensor], *, hand_down: bool
    ) -> None:
        """One sample through one block; gradients go on to what the block was given in the first pass alone."""
        self._replay.following = hand_down
        call = self._replay.reach(number, name)
        given = {path: leaf for path, leaf in call.leaves().items() if isinstance(leaf, Tensor)}
        from_early = self._from_early.get(name, [])
        ways = {path: leaf for path, leaf in given.items() if hand_down and (leaf.requires_grad or path in from_early)}
        # one for each tensor, however often the block is given it
        entries = {id(leaf): leaf.detach().requires_grad_() for leaf in ways.values()}
        copies = {key: entry.clone() for key, entry in entries.items()}  # which a block may change in place
        substitutes = {path: copies[id(leaf)] for path, leaf in ways.items()}
        args, kwargs = substitute((call.args, call.kwargs), substitutes)
        found = dict(leaves(block(*args, **kwargs)))
        ends = [(found[path], gradient) for path, gradient in gradients.items() if found[path].requires_grad]
        if not ends:
            return
        _backward(ends)
        for path in from_early if hand_down else ():
            gradient = entries[id(ways[path])].grad
            if gradient is not None:
                self._kept[name, path, number] = self._replay.scratch.put(gradient)
        leaf_of = {id(leaf): leaf for leaf in ways.values()}
        _backward(
            [
                (leaf_of[key], entry.grad)
                for key, entry in entries.items()
                if leaf_of[key].requires_grad and entry.grad is not None
            ]
        )

    def _backward_before_blocks(self, losses: _Losses) -> None:
        """To weights that are used before blocks: all that a sample gives them, from everywhere, at once."""
        early = {layer: own for layer, own in self._outside.items() if self._is_early(layer)}
        if not early:
            return
        self._replay.following = False
        ids = {id(self._weights[layer].parameter) for layer in early}
        for _, _, sums in self._sums(early):
            losses.restart()
            with torch.enable_grad(), sums.adding():
                for number in self._numbers:
                    ends: list[tuple[Tensor, Tensor]] = []

                    def watch(name: str, call: Call, number: int = number, ends: list[Any] = ends) -> None:
                        given = call.leaves()
                        for path in self._from_early.get(name, ()):
                            stored = self._kept.get((name, path, number))
                            if stored is not None and given[path].requires_grad:
                                ends.append((given[path], self._replay.scratch.get(stored)))

                    output = self._replay.output(number, watch)
                    tensors = [leaf for _, leaf in leaves(output) if isinstance(leaf, Tensor)]
                    if any(_leads_to(leaf) & ids for leaf in tensors):
                        value = losses.of(number, output)
                        ends.append((value, torch.ones_like(value)))
                    _backward(ends)
                    self._tick("loss")

    def _is_early(self, layer: str) -> bool:
        return id(self._weights[layer].parameter) in self._early

    def _sums(self, wanted: Wanted) -> Iterator[tuple[bool, bool, GradientSums]]:
        """The sums of some layers, as many at once as the budget allows: whether they are the first, the last ones.

        When the next are asked for, these are finished and go to disk.
        """
        chunks = chunks_of(wanted, {layer: self._weights[layer].matrix.shape for layer in wanted}, self._budget) or [[]]
        self._total += (len(chunks) - 1) * len(self._numbers)
        for number, chunk in enumerate(chunks):
            sums = GradientSums({layer: wanted[layer] for layer in chunk}, self._weights)
            yield number == 0, number == len(chunks) - 1, sums
            for layer, found in sums.finished():
                self._places[layer] = {statistic: self._scratch.put(value) for statistic, value in found.items()}
            release_freed_memory()

    @contextmanager
    def _in_memory(self, name: str) -> Iterator[nn.Module]:
        self._loaded.materialize(name, dtype=self._dtype)
        block = self._model.get_submodule(name)
        with cast_parameters([block], self._dtype, restore=self._keep_values):
            yield block
        self._loaded.release(name)
        release_freed_memory()

    def _tick(self, what: str) -> None:
        self._done += 1
        self._tick_of(min(self._done, self._total), self._total, what)


@final
class _Losses:
    """The loss of each sample, in their order; labels that are drawn are the same after every `restart`."""

    def __init__(self, model: nn.Module, samples: Sequence[Sample], loss: Loss | None, seed: int) -> None:
        self._model, self._samples, self._loss, self._seed = model, samples, loss, seed
        self._generator = torch.Generator()

    def restart(self) -> None:
        """Begin with the first sample again."""
        self._generator.manual_seed(self._seed)

    def of(self, number: int, output: Any) -> Tensor:
        """The loss of a sample.

        Raises:
            NonFiniteError: it is NaN or infinite.
        """
        sample = self._samples[number]
        if self._loss is None:
            value = negative_log_likelihood(self._model, sample.call, output, sample.labels, self._generator)
        else:
            value = self._loss(output, sample.labels)
        if not bool(torch.isfinite(value.detach())):
            raise NonFiniteError(
                f"calibration sample {number}", "its loss is NaN or infinite", hint="look at the model's outputs"
            )
        return value


def _backward(ends: Sequence[tuple[Tensor, Tensor]]) -> None:
    if ends:
        torch.autograd.backward([tensor for tensor, _ in ends], [gradient for _, gradient in ends])


def _leads_to(tensor: Tensor) -> set[int]:
    """The leaves of autograd's graph that a tensor was made of, by id."""
    if tensor.grad_fn is None:
        return {id(tensor)}
    found: set[int] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting.extend(each for each, _ in node.next_functions)
    return found


def block_of(name: str, blocks: Sequence[str]) -> str | None:
    """The block that a module is in."""
    return next((block for block in blocks if name == block or name.startswith(f"{block}.")), None)
