"""What one gradient is of: a window of text, or an example that has a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from rarefy.calibrate.calls import Call


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
