"""Statistics of gradients of the dense model: one pass forward and one backward, a block at a time.

Forward, every block's outputs go to disk, for each sample. Backward, from the last block to the first, each block is
computed again from what it was given, with the gradients that came back to its outputs; they go on to its inputs, and
from those of its weights the statistics are made, which go to disk too when the block is done. What is in memory is one
block, the sums of its statistics, and the gradients of all samples between two blocks. A model that is no row of blocks
is one block: the same passes, with the whole of it in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from rarefy.calibrate.backward import GradientPass, block_of
from rarefy.calibrate.calls import Call, calibration_mode
from rarefy.calibrate.data import CalibrationData
from rarefy.calibrate.gradient_statistics import result_bytes
from rarefy.calibrate.gradient_sums import Wanted, chunks_of, most_bytes, without_gradients
from rarefy.calibrate.inputs import cast_inputs, without_cache
from rarefy.calibrate.losses import Loss
from rarefy.calibrate.replay import Replay, UnlikeCallsError
from rarefy.calibrate.samples import samples_of
from rarefy.calibrate.scratch import Scratch, Stored
from rarefy.calibrate.statistics import GradientStatistic, Statistic
from rarefy.models.loaded import LoadedModel
from rarefy.models.memory import release_freed_memory
from rarefy.models.structure import Structure
from rarefy.nn import Weight, find_weight

Tick = Callable[[int, int, str], None]


@final
class Gradients:
    """The gradient statistics of a model's layers, on disk.

    Args:
        layers: all that wanted any.
        places: of those that got a gradient, where each statistic lies.
        scratch: the file.
    """

    def __init__(
        self, layers: Collection[str], places: Mapping[str, Mapping[Statistic, Stored]], scratch: Scratch
    ) -> None:
        self._layers = frozenset(layers)
        self._places = places
        self._scratch = scratch

    def of(self, layer: str) -> Mapping[Statistic, Tensor] | None:
        """The statistics of a layer; none where it wants none, and None where no gradient reached it."""
        if layer not in self._layers:
            return {}
        if layer not in self._places:
            return None
        self._scratch.forget()
        return {statistic: self._scratch.get(place) for statistic, place in self._places[layer].items()}


def collect_gradients(
    loaded: LoadedModel,
    blocks: Sequence[str],
    calls: Sequence[Call],
    labels: Sequence[Tensor | None],
    wanted: Wanted,
    *,
    dtype: torch.dtype = torch.float32,
    loss: Loss | None = None,
    seed: int = 0,
    directory: Path | None = None,
    budget_bytes: int | None = None,
    tick: Tick = lambda _done, _total, _what: None,
) -> Gradients:
    """Take the gradients of a model as it is.

    Args:
        loaded: the model, which is afterwards as before.
        blocks: names of its blocks; none: the whole of it is in memory at once, as it is where blocks share a wanted
            weight, or are not called once each in one order with tensors and plain values.
        calls: the model's arguments, one entry per batch.
        labels: of each batch, or None.
        wanted: for each layer its statistics.
        dtype: of the passes.
        loss: of the output and the labels of a sample, to a scalar; None: `losses.negative_log_likelihood`. It is asked
            twice where a weight is wanted that is used before the blocks and after them.
        seed: of labels that are drawn.
        directory: where scratch files lie; None: where temporary files do.
        budget_bytes: for the sums that are held at once; None: a quarter of the machine's memory, at most 2 GiB. A
            block whose sums are more is computed several times.
        tick: told how many samples of a block are done, of how many, and of which block.

    Raises:
        UsageError: the Fisher blocks of one layer alone are more than the budget.
        NonFiniteError: a loss or a layer's gradient is NaN or infinite.
        OutputError: there is too little room for scratch files.
    """
    weights = {layer: find_weight(loaded.model, layer) for layer in wanted}
    shapes = {layer: weight.matrix.shape for layer, weight in weights.items()}
    budget = most_bytes() if budget_bytes is None else budget_bytes
    chunks_of(wanted, shapes, budget)  # refuses what is too large, before the work
    samples = samples_of(cast_inputs(calls, dtype), labels)
    scratch = Scratch(directory)
    results = sum(result_bytes(each, shapes[layer]) for layer in wanted for each in wanted[layer])
    scratch.check_room(results, "statistics of gradients")
    places: dict[str, dict[Statistic, Stored]] = {}
    in_blocks = len(blocks) > 1 and not _share(loaded.model, blocks, weights.values())
    with calibration_mode(loaded.model), without_cache(loaded.model), without_gradients(loaded.model):
        for own, derive in ((blocks, True), (blocks, False), ((), False)) if in_blocks else (((), False),):
            with Scratch(directory) as borders:
                replay = Replay(loaded.model, own, samples, borders, derive)
                try:
                    places = GradientPass(loaded, replay, wanted, weights, dtype, budget, scratch, tick).run(loss, seed)
                    break
                except UnlikeCallsError:
                    continue
    release_freed_memory()
    return Gradients(wanted, places, scratch)


def _share(model: nn.Module, blocks: Sequence[str], weights: Iterable[Weight]) -> bool:
    """Whether a weight is in more than one block, or in one and outside of them."""
    homes: dict[int, set[str | None]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            homes.setdefault(id(parameter), set()).add(block_of(name, blocks))
    return any(len(homes[id(weight.parameter)]) > 1 for weight in weights)


def dense_gradients(
    loaded: LoadedModel,
    structure: Structure,
    wanted: Mapping[str, Sequence[Statistic]],
    data: CalibrationData,
    *,
    dtype: torch.dtype,
    loss: Loss | None,
    seed: int,
    directory: Path | None,
    progress: Callable[[str, int, int, str], None] | None,
) -> Gradients | None:
    """The gradients of a model as it is now; None if no layer wants any."""
    chosen: dict[str, list[GradientStatistic]] = {}
    for layer, statistics in wanted.items():
        own = [statistic for statistic in dict.fromkeys(statistics) if isinstance(statistic, GradientStatistic)]
        if own:
            chosen[layer] = own
    if not chosen:
        return None

    def tick(done: int, total: int, what: str) -> None:
        if progress is not None:
            progress("gradients", done, total, what)

    return collect_gradients(
        loaded,
        [block.name for block in structure.blocks],
        data.calls,
        data.labels,
        chosen,
        dtype=dtype,
        loss=loss,
        seed=seed,
        directory=directory,
        tick=tick,
    )
