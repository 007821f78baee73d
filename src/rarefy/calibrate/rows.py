"""How many rows of inputs layers meet: a convolution one for each position of its output, which no weight tells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from rarefy.calibrate.calls import Call, calibration_mode
from rarefy.calibrate.inputs import num_rows
from rarefy.nn.matrices import Kind
from rarefy.nn.replace import all_weights


def count_rows(model: nn.Module, calls: Sequence[Call]) -> dict[str, int]:
    """Count the rows that each layer meets in all calls; the first of them is run, and stands for the others.

    Args:
        model: the module, with its weights in memory.
        calls: its arguments for each batch; at least one.

    Returns:
        Rows by layer; of a matrix whose rows meet inputs of their own in groups, those of one group. A layer that the
        model does not call has 0.
    """
    counts: Counter[str] = Counter()
    watched: dict[int, tuple[nn.Module, Kind, dict[str, str]]] = {}
    for weight in all_weights(model):
        counts[weight.layer] = 0
        _, _, layers = watched.setdefault(id(weight.module), (weight.module, weight.kind, {}))
        layers[weight.matrix.name] = weight.layer

    def hook(kind: Kind, layers: dict[str, str]) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for name, group, rows_TI in kind.rows(module, args, kwargs, tuple(layers)):
                counts[layers[name]] += rows_TI.shape[0] if group == 0 else 0

        return before

    handles = [
        module.register_forward_pre_hook(hook(kind, layers), with_kwargs=True)
        for module, kind, layers in watched.values()
    ]
    try:
        with calibration_mode(model):
            model(*calls[0].args, **calls[0].kwargs)
    finally:
        for handle in handles:
            handle.remove()
    share = sum(map(num_rows, calls)) / max(1, num_rows(calls[0]))
    return {layer: round(count * share) for layer, count in counts.items()}
