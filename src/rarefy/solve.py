"""The block-by-block pass: every layer gets its solution, from inputs that the solved blocks before it give.

Shape suffixes: O out, I in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final

import torch
from torch import Tensor

from rarefy.calibrate.calls import Call, calibration_mode
from rarefy.calibrate.collect import collect_statistics
from rarefy.calibrate.gradients import Gradients
from rarefy.calibrate.inputs import cast_inputs, without_cache
from rarefy.calibrate.precision import cast_parameters, modules_outside
from rarefy.calibrate.row_counts import RowCounts
from rarefy.calibrate.statistics import GradientStatistic, InputStatistic, Statistic, bfloat16_products
from rarefy.calibrate.walk import BlockWalk
from rarefy.checkpoint import Checkpoint, Finished
from rarefy.core.grids import Float32Array
from rarefy.core.results import LayerResult
from rarefy.core.solution import Solution
from rarefy.layouts import AnyLayout, FloatFormat, pack
from rarefy.methods.base import LayerMethod
from rarefy.methods.bias_correction import BiasCorrection
from rarefy.methods.closeness import relative_error
from rarefy.methods.row_groups import compress_in_groups
from rarefy.models.loaded import LoadedModel, check_finite
from rarefy.models.memory import release_freed_memory
from rarefy.models.structure import Readers, Structure
from rarefy.nn import Weight, find_weight
from rarefy.nn.biases import Corrections

# Stands for the layers outside of the blocks among the names of blocks, none of which is empty where there are several.
_OUTSIDE = ""


class Progress(Protocol):
    """Told how far a phase is; the units of `done` and `total` are the phase's own."""

    def __call__(self, phase: str, done: int, total: int, detail: str) -> None:
        """Report that `done` of `total` are done."""
        ...


@final
@dataclass(frozen=True)
class Task:
    """What is to be done to one layer: methods in order, each with the name that reports show."""

    layer: str
    steps: tuple[tuple[str, LayerMethod], ...]

    def needs(self) -> tuple[Statistic, ...]:
        """The statistics that any of the steps reads, each once."""
        return tuple(dict.fromkeys(statistic for _, method in self.steps for statistic in method.needs()))

    def needs_inputs(self) -> tuple[InputStatistic, ...]:
        """Those of them that are of the layer's inputs."""
        return tuple(statistic for statistic in self.needs() if not isinstance(statistic, GradientStatistic))

    def needs_of(self, readers: Readers) -> dict[str, tuple[InputStatistic, ...]]:
        """The same by the layer whose calls give them: counts come from lookups, the others from products."""
        by_layer: dict[str, tuple[InputStatistic, ...]] = {}
        for statistic in self.needs_inputs():
            name = (readers.lookup if isinstance(statistic, RowCounts) else readers.product) or self.layer
            by_layer[name] = (*by_layer.get(name, ()), statistic)
        return by_layer


@final
@dataclass
class Solved:
    """What the pass produced.

    Args:
        layouts: the packed weight of each compressed layer.
        results: what was done to it, and how well.
        skipped: layers of the plan that could not be solved, each with the reason.
        num_resumed: blocks that an interrupted run had solved.
        biases: corrected ones, of layers that had one and of layers that had none, by full name.
    """

    layouts: dict[str, AnyLayout] = field(default_factory=dict)
    results: dict[str, LayerResult] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    num_resumed: int = 0
    biases: dict[str, Tensor] = field(default_factory=dict)


def solve_model(
    loaded: LoadedModel,
    structure: Structure,
    tasks: Sequence[Task],
    calls: Sequence[Call],
    *,
    dtype: torch.dtype = torch.float32,
    float_format: FloatFormat = "bf16",
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    gradients: Gradients | None = None,
) -> Solved:
    """Solve every task; where the weights are held in memory, the model's own weights become the solutions.

    Args:
        loaded: the model. Streaming ones are materialised block by block, and released.
        structure: of the model.
        tasks: one per layer at most.
        calls: the model's arguments, one entry per batch; not needed when no method reads statistics.
        dtype: of the forward passes. Solutions are always computed from float32 weights.
        float_format: of dense layouts without a grid.
        progress: told about every batch and layer.
        checkpoint: gives the blocks that an interrupted run has finished, and keeps those that this one finishes; for
            streaming models with repeated blocks.
        gradients: of the dense model, where methods need any.

    Raises:
        NonFiniteError: a weight or an activation is NaN or infinite.
        PatternError: a pattern does not fit a layer.
    """
    by_name = {task.layer: task for task in tasks}
    ordered = [by_name[layer.name] for layer in structure.layers if layer.name in by_name]
    run = _Pass(loaded, structure, dtype, float_format, progress, checkpoint if loaded.streams else None, gradients)
    with calibration_mode(loaded.model), without_cache(loaded.model):
        if not any(task.needs_inputs() for task in ordered):
            run.without_data(ordered)
        elif structure.in_one_pass:
            run.whole_model(ordered, cast_inputs(calls, dtype))
        else:
            run.block_by_block(structure, ordered, cast_inputs(calls, dtype))
    return run.solved


@final
class _Pass:
    """One pass over a model: what all of its steps need at hand."""

    def __init__(
        self,
        loaded: LoadedModel,
        structure: Structure,
        dtype: torch.dtype,
        float_format: FloatFormat,
        progress: Progress | None,
        checkpoint: Checkpoint | None,
        gradients: Gradients | None,
    ) -> None:
        self.loaded = loaded
        self.model = loaded.model
        self.dtype = dtype
        self.float_format = float_format
        self.solved = Solved()
        self._readers = structure.readers()
        self._corrections = Corrections(loaded.model, loaded.read)
        self.solved.biases = self._corrections.values
        self._progress = progress
        self._checkpoint = checkpoint
        self._gradients = gradients
        self._units: dict[str, str] = {}
        self._finished: dict[str, Finished] = {}
        self._done = 0
        self._total = 1

    def without_data(self, tasks: Sequence[Task]) -> None:
        """Solve layers whose methods look at no inputs."""
        self._total = len(tasks)
        for task in tasks:
            self._solve_if_seen(task, self._read(task.layer), {})

    def whole_model(self, tasks: Sequence[Task], calls: Sequence[Call]) -> None:
        """Collect for all layers in one pass: the model has no repeated blocks, or one that it uses repeatedly."""
        self._total = len(calls) + len(tasks)
        self.loaded.materialize("")
        wanted, weights = self._wanted(tasks)
        with cast_parameters([self.model], self.dtype, restore=not self.loaded.streams):
            stats = collect_statistics(self.model, calls, wanted, weights=weights, tick=self._ticker("collecting"))
        self.loaded.release("")
        for task in tasks:
            self._solve_if_seen(task, self._read(task.layer), stats)

    def block_by_block(self, structure: Structure, tasks: Sequence[Task], calls: Sequence[Call]) -> None:
        """Solve block after block, each on the outputs of the solved ones before it, then what lies outside of them."""
        blocks = {block.name: block.stack for block in structure.blocks}
        block_of = {layer.name: layer.block for layer in structure.layers}
        inside: dict[str, list[Task]] = {name: [] for name in blocks}
        outside: list[Task] = []
        for task in tasks:
            block = block_of[task.layer]
            (outside if block is None else inside[block]).append(task)
        self._units = {name: f"block-{number:04d}" for number, name in enumerate(blocks)} | {_OUTSIDE: "outside"}
        inside = {name: self._unfinished(name, own) for name, own in inside.items()}
        outside = self._unfinished(_OUTSIDE, outside)
        rest_needs_data = any(task.needs_inputs() for task in outside)
        self._total = len(tasks) + len(calls) * _num_passes(inside, rest_needs_data)
        for layer in (*self.solved.layouts, *self.solved.skipped):
            self._tick(layer)
        self.loaded.materialize("", without=frozenset(blocks), dtype=self.dtype)
        masters = {} if self.loaded.streams else self._masters(outside)
        keep = not self.loaded.streams
        with (
            cast_parameters(modules_outside(self.model, blocks), self.dtype, restore=keep, recurse=False),
            BlockWalk(self.model, blocks, calls) as walk,
        ):
            waiting = {name for name, own in inside.items() if own}
            while waiting and (reached := walk.next_block()) is not None:
                name, block_calls = reached
                waiting.discard(name)
                last = not waiting and not rest_needs_data
                outputs = self._solve_block(name, inside[name], block_calls, last=last)
                if not last:
                    walk.finish(outputs)
            if waiting:  # the model never calls them: there is nothing to run
                self._total = self._done + len(calls) * rest_needs_data + len(outside)
                self._total += sum(len(inside[name]) for name in waiting)
            for name in sorted(waiting):
                for task in inside[name]:
                    self._solve_if_seen(task, self._read(task.layer), {})
            stats: dict[str, dict[Statistic, Tensor]] = {}
            if rest_needs_data:
                while (reached := walk.next_block()) is not None:
                    walk.finish(self._solve_block(reached[0], [], reached[1], last=False))
                wanted, weights = self._wanted(outside)
                batches = [Call((batch,), {}) for batch in range(len(calls))]
                stats = collect_statistics(
                    walk.run_rest, batches, wanted, weights=weights, tick=self._ticker("layers outside of the blocks")
                )
        self.loaded.release("")
        for task in outside:
            weight = masters.get(task.layer)
            self._solve_if_seen(task, self._read(task.layer) if weight is None else weight, stats)
        self._keep(_OUTSIDE, outside, {})

    def _unfinished(self, name: str, tasks: list[Task]) -> list[Task]:
        """The tasks of a block, or none if an interrupted run has finished it: its results are then among ours."""
        if self._checkpoint is None or not tasks:
            return tasks
        found = self._checkpoint.load(self._units[name], [task.layer for task in tasks])
        if found is None:
            return tasks
        self._finished[name] = found
        self.solved.num_resumed += 1
        self.solved.layouts.update(found.layouts)
        self.solved.results.update(found.results)
        self.solved.skipped.update(found.skipped)
        self.solved.biases.update({key: torch.tensor(bias_O) for key, bias_O in found.biases.items()})
        return []

    def _keep(self, name: str, tasks: Sequence[Task], solutions: Mapping[str, Solution | None]) -> None:
        """Put a finished block where a later run finds it; `solutions` are those that later blocks are solved on."""
        layouts = {task.layer: self.solved.layouts[task.layer] for task in tasks if task.layer in self.solved.layouts}
        if self._checkpoint is None or not layouts:
            return
        results = {layer: self.solved.results[layer] for layer in layouts}
        skipped = {task.layer: self.solved.skipped[task.layer] for task in tasks if task.layer not in layouts}
        weights = {
            layer: solution.value_OI
            for layer, solution in solutions.items()
            if solution is not None and not self._gives_back(layouts[layer], solution)
        }
        biases = {key: bias_O.numpy() for key, bias_O in self._corrections.of(layouts).items()}
        self._checkpoint.save(self._units[name], Finished(layouts, results, skipped, weights, biases))

    def _gives_back(self, layout: AnyLayout, solution: Solution) -> bool:
        """Whether a layout has the very weights that the forward passes used."""
        weights = (torch.from_numpy(weight_OI).to(self.dtype) for weight_OI in (layout.to_dense(), solution.value_OI))
        return torch.equal(*weights)

    def _solve_block(self, name: str, tasks: Sequence[Task], calls: Sequence[Call], *, last: bool) -> list[Any]:
        """Solve the layers of one block and return what the solved block makes of its inputs (nothing if last)."""
        self.loaded.materialize(name)
        block = self.model.get_submodule(name)
        masters = self._masters(tasks)
        wanted, weights = self._wanted(tasks)
        outputs: list[Any] = []
        with cast_parameters([block], self.dtype, restore=not self.loaded.streams):
            stats: dict[str, dict[Statistic, Tensor]] = {}
            if wanted:
                stats = collect_statistics(block, calls, wanted, weights=weights, tick=self._ticker(name))
            solutions = {
                task.layer: self._solve_if_seen(task, masters.pop(task.layer), stats, in_block=True) for task in tasks
            }
            for layer, solution in solutions.items():
                if solution is not None:
                    self._set(layer, solution.value_OI)
            self._keep(name, tasks, solutions)
            if name in self._finished:
                for layer in self._finished[name].layouts:
                    self._set(layer, self._finished[name].weight(layer))
            corrected = [*solutions, *(self._finished[name].layouts if name in self._finished else ())]
            self._corrections.apply(corrected)
            if not last:
                for call in calls:
                    outputs.append(block(*call.args, **call.kwargs))
                    self._tick(name)
            self._corrections.withdraw(corrected)
        if not self.loaded.streams:
            for layer, solution in solutions.items():
                if solution is not None:
                    self._set(layer, solution.value_OI)
            self._corrections.apply(corrected)
        self.loaded.release(name)
        release_freed_memory()
        return outputs

    def _masters(self, tasks: Sequence[Task]) -> dict[str, Tensor]:
        """The float32 matrices of layers, held while the module itself computes in another type."""
        masters = {}
        for task in tasks:
            weight = find_weight(self.model, task.layer)
            masters[task.layer] = weight.read().to(torch.float32)
            self._corrections.hold(task.layer)
            check_finite(weight.parameter_name, masters[task.layer])
        return masters

    def _read(self, layer: str) -> Tensor:
        """The float32 matrix of a layer, from where the model's weights are."""
        weight = find_weight(self.model, layer)
        return weight.matrix.of(self.loaded.read(weight.parameter_name))

    def _set(self, layer: str, weight_OI: Float32Array) -> None:
        find_weight(self.model, layer).write(torch.from_numpy(weight_OI))

    def _wanted(self, tasks: Sequence[Task]) -> tuple[dict[str, tuple[InputStatistic, ...]], dict[str, Weight]]:
        wanted = {name: needs for task in tasks for name, needs in task.needs_of(self._readers[task.layer]).items()}
        return wanted, {name: find_weight(self.model, name) for name in wanted}

    def _solve_if_seen(
        self,
        task: Task,
        weight: Tensor,
        stats: Mapping[str, Mapping[Statistic, Tensor]],
        *,
        in_block: bool = False,
    ) -> Solution | None:
        own = {
            statistic: value
            for name in task.needs_of(self._readers[task.layer])
            for statistic, value in stats.get(name, {}).items()
        }
        gradients = self._gradients.of(task.layer) if self._gradients is not None else {}
        has_inputs = all(statistic in own for statistic in task.needs_inputs())
        if not has_inputs or gradients is None:
            kind = "gradient" if has_inputs else "calibration input"
            self.solved.skipped[task.layer] = f"no {kind} reached it, and its method needs some"
            self._tick(task.layer)
            return None
        return self._solve(task, weight, {**own, **gradients}, in_block=in_block)

    def _solve(
        self, task: Task, weight: Tensor, stats: Mapping[Statistic, Tensor], *, in_block: bool = False
    ) -> Solution:
        start = time.perf_counter()
        weight_OI = weight.contiguous().numpy()
        place = find_weight(self.model, task.layer)
        num_groups = place.matrix.num_row_groups
        solution = Solution.dense(weight_OI, place.matrix.taps)
        for _, method in task.steps:
            solution = compress_in_groups(method, solution, stats, num_groups, layer=task.layer)
        layout = pack(solution, float_format=self.float_format)
        # A figure for the report: rounding in the products moves it by far less than its last printed digit.
        with bfloat16_products(self.dtype == torch.bfloat16):
            error, error_metric = relative_error(weight, torch.from_numpy(solution.value_OI), stats, num_groups)
        grid = solution.value_grid
        self.solved.layouts[task.layer] = layout
        self.solved.results[task.layer] = LayerResult(
            name=task.layer,
            shape=solution.shape,
            format=layout.format,
            steps=self._steps_done(task, solution),
            sparsity=solution.sparsity,
            num_bits=None if grid is None else grid.num_bits,
            group_size=None if grid is None else grid.group_size,
            bits_per_weight=layout.nbytes * 8 / max(1, weight.numel()),
            error=error,
            error_metric=error_metric,
            dense_bytes=round(self.loaded.stored_bytes_of(place.parameter_name) * place.share()),
            packed_bytes=layout.nbytes,
            seconds=time.perf_counter() - start,
        )
        if not in_block and not self.loaded.streams:
            self._set(task.layer, solution.value_OI)
            self._corrections.apply([task.layer])
        self._tick(task.layer)
        return solution

    def _steps_done(self, task: Task, solution: Solution) -> tuple[str, ...]:
        """The names of the steps, without a correction of a bias that the layer cannot have."""
        if solution.bias_O is None or self._corrections.shift(task.layer, torch.from_numpy(solution.bias_O)):
            return tuple(name for name, _ in task.steps)
        return tuple(name for name, method in task.steps if not isinstance(method, BiasCorrection))

    def _ticker(self, detail: str) -> Callable[[], None]:
        return lambda: self._tick(detail)

    def _tick(self, detail: str) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress("compress", min(self._done, self._total), self._total, detail)


def _num_passes(inside: Mapping[str, Sequence[Task]], rest_needs_data: bool) -> int:
    """How often the batches go through a block: to collect statistics, and to give the next block its inputs."""
    with_tasks = [number for number, tasks in enumerate(inside.values()) if tasks]
    num_visited = len(inside) if rest_needs_data else max(with_tasks, default=-1) + 1
    num_collecting = sum(any(task.needs_inputs() for task in tasks) for tasks in inside.values())
    # Nothing follows the last block unless layers outside of the blocks need data, which is one more pass.
    return num_collecting + (num_visited + 1 if rest_needs_data else max(0, num_visited - 1))
