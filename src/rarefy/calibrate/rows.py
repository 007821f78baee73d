"""How many rows of inputs layers meet: a convolution one for each position of its output, which no weight tells."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibrate.calls import Call, calibration_mode
from rarefy.calibrate.inputs import num_rows
from rarefy.nn.matrices import Kind
from rarefy.nn.replace import all_weights


def count_rows(model: nn.Module, calls: Sequence[Call]) -> dict[str, int] | None:
    """Count the rows that each layer meets in all calls; the first of them is run, and stands for the others.

    Args:
        model: the module; where its weights are not in memory (on torch's meta device), shapes alone are run.
        calls: its arguments for each batch; at least one.

    Returns:
        Rows by layer; of a matrix whose rows meet inputs of their own in groups, those of one group. A layer that the
        model does not call has 0. None where shapes alone do not show it, for the model looks at values.
    """
    first = calls[0]
    if all(parameter.is_meta for parameter in model.parameters()):
        model = copy.deepcopy(model).to("meta")
        first = Call(
            tuple(_without_values(each) for each in first.args),
            {key: _without_values(each) for key, each in first.kwargs.items()},
        )
        try:
            counts = _count(model, first)
        except RuntimeError:  # also NotImplementedError, where an operation has no shapes alone
            return None
    else:
        counts = _count(model, first)
    share = sum(map(num_rows, calls)) / max(1, num_rows(first))
    return {layer: round(count * share) for layer, count in counts.items()}


def _without_values(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def count_tokens(calls: Sequence[Call]) -> int | None:
    """The tokens of all calls, where token ids are what they have."""
    ids = [call.kwargs.get("input_ids", next(iter(call.args), None)) for call in calls]
    counts = [each.numel() for each in ids if isinstance(each, Tensor) and each.dtype in (torch.int64, torch.int32)]
    return sum(counts) if len(counts) == len(calls) else None


def _count(model: nn.Module, call: Call) -> Counter[str]:
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
            model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return counts
