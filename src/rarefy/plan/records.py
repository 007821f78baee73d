"""The plan as data; `to_json` comes with the record."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from rarefy.core.results import Record


@final
@dataclass(frozen=True)
class PlannedLayer(Record):
    """What will become of one layer.

    Args:
        name: module name.
        shape: (O, I).
        steps: names of the methods, in order.
        format: storage format.
        input_bytes: of the weight as the input model stores it.
        packed_bytes: of the weight's layout: exact, unless `exact` is False.
        exact: False where earlier zeros decide how many are left; `packed_bytes` is then the most that it can be.
        is_mean: a look at the dense model will say how many zeros this layer gives; `packed_bytes` is that of the mean.
    """

    name: str
    shape: tuple[int, int]
    steps: tuple[str, ...]
    format: str
    input_bytes: int
    packed_bytes: int
    exact: bool
    is_mean: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Bits that the layout takes for each entry of the matrix."""
        return 8 * self.packed_bytes / max(1, self.shape[0] * self.shape[1])


@final
@dataclass(frozen=True)
class UntouchedRow(Record):
    """A layer that the recipe leaves alone."""

    name: str
    kind: str
    num_bytes: int
    reason: str


@final
@dataclass(frozen=True)
class Plan(Record):
    """What a run will do, take and give.

    Args:
        layers: in the order of the model.
        untouched: every other layer, with the reason.
        input_bytes: of all parameters as the input model stores them.
        disk_bytes: of all tensors that will be written, the layouts included; tokenizer and reports come on top.
        memory_bytes: estimate of the peak of memory in use.
        memory_parts: what it is made of.
        seconds: estimate of the time of the compression itself on a quiet machine; measuring comes on top.
        seconds_parts: what it is made of.
        basis: what the estimates rest on, in words.
        notes: what else a user should know, such as optional steps that match nothing.
        scratch_bytes: on disk while it runs, beside the output, else where temporary files are.
    """

    layers: tuple[PlannedLayer, ...]
    untouched: tuple[UntouchedRow, ...]
    input_bytes: int
    disk_bytes: int
    memory_bytes: int
    memory_parts: dict[str, int]
    seconds: float
    seconds_parts: dict[str, float]
    basis: str
    notes: tuple[str, ...]
    scratch_bytes: int = 0

    def table(self) -> list[tuple[str, ...]]:
        """Rows for people: header first; layers that differ only in the number of their block are one row."""
        rows: list[tuple[str, ...]] = [("layers", "number", "shape", "steps", "format", "bits", "bytes")]
        for pattern, members in _alike(self.layers):
            first = members[0]
            packed = sum(layer.packed_bytes for layer in members)
            rows.append(
                (
                    pattern,
                    str(len(members)),
                    f"{first.shape[0]} x {first.shape[1]}",
                    " + ".join(first.steps),
                    first.format,
                    f"{first.bits_per_weight:.2f}",
                    f"{packed}" if first.exact else f"~ {packed}" if first.is_mean else f"<= {packed}",
                )
            )
        return rows


def _alike(layers: tuple[PlannedLayer, ...]) -> Iterator[tuple[str, list[PlannedLayer]]]:
    groups: dict[tuple[object, ...], list[PlannedLayer]] = {}
    for layer in layers:
        pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", layer.name)
        key = (pattern, layer.shape, layer.steps, layer.format, layer.packed_bytes, layer.exact, layer.is_mean)
        groups.setdefault(key, []).append(layer)
    for group, members in groups.items():
        yield (str(group[0]) if len(members) > 1 else members[0].name), members
