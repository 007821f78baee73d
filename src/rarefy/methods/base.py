"""What a layer method is: a frozen dataclass of hyperparameters with `needs` and `compress`.

Shape suffixes: O out, I in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, get_args, get_origin, get_type_hints, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rarefy.calibrate.statistics import Statistic
from rarefy.core.errors import NonFiniteError, PatternError, UsageError
from rarefy.core.solution import Solution


class LayerMethod(Protocol):
    """A point in the space "minimise ||(W - V) X||_F^2 subject to V in C"; one frozen dataclass per method."""

    paper: ClassVar[str]

    def needs(self) -> tuple[Statistic, ...]:
        """Statistics of the layer's inputs that `compress` reads; empty for a method that needs no data."""
        ...

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Return a cheaper solution that keeps every zero and every grid of the one given.

        Args:
            solution: the matrix as earlier steps left it, `Solution.dense(weight_OI)` at first. It is not modified.
            stats: for every entry of `needs()` its finished tensor.
            layer: the name that error messages carry.

        Raises:
            NonFiniteError: a weight or statistic is NaN or infinite.
            PatternError: the pattern or grid does not fit the layer.
        """
        ...


@runtime_checkable
class HasSaliency(LayerMethod, Protocol):
    """A method that can say what each weight matters, so that weights of several layers can compete."""

    def saliency(
        self, weight_OI: npt.NDArray[np.float32], stats: Mapping[Statistic, Tensor], *, layer: str
    ) -> npt.NDArray[np.float32]:
        """The importance of every weight, comparable between layers.

        Args:
            weight_OI: float32, the finite weights of the dense model.
            stats: for every entry of `needs()` its finished tensor.
            layer: the name that error messages carry.

        Returns:
            float32 (O, I), finite: what pruning the entry costs; the lowest go first. Of a block the sum counts.

        Raises:
            NonFiniteError: a statistic is NaN or infinite.
        """
        ...


def hyperparameter(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
) -> Any:
    """Declare a field of a method: its default, one line of documentation, and its bounds.

    The bounds are checked at construction, and the recipe schema repeats them.
    """
    bounds = {"ge": ge, "gt": gt, "le": le}
    metadata = {"doc": doc, **{key: value for key, value in bounds.items() if value is not None}}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_hyperparameters(method: object) -> None:
    """Check every scalar field of a method against its annotation and bounds; called from `__post_init__`.

    Raises:
        UsageError: a field has the wrong type or is out of bounds.
    """
    name = type(method).__name__
    hints = get_type_hints(type(method))
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        value = getattr(method, field.name)
        kind = hints[field.name]
        where = f"{name}.{field.name}"
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                allowed = ", ".join(repr(choice) for choice in get_args(kind))
                raise UsageError(where, repr(value), allowed=allowed)
        elif kind is bool:
            if not isinstance(value, bool):
                raise UsageError(where, repr(value), allowed="true or false")
        elif kind in (int, float):
            number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not _in_bounds(value, field.metadata):
                raise UsageError(where, repr(value), allowed=describe_bounds(kind, field.metadata))
        elif not isinstance(value, kind):
            raise UsageError(where, repr(value), allowed=getattr(kind, "__name__", str(kind)))


def describe_bounds(kind: type, metadata: Mapping[str, Any]) -> str:
    """Say in words what a number field accepts."""
    signs = {"ge": ">=", "gt": ">", "le": "<="}
    words = [f"{sign} {metadata[key]:g}" for key, sign in signs.items() if key in metadata]
    noun = "an integer" if kind is int else "a number"
    return noun if not words else f"{noun} {' and '.join(words)}"


def _in_bounds(value: float, metadata: Mapping[str, Any]) -> bool:
    return (
        ("ge" not in metadata or value >= metadata["ge"])
        and ("gt" not in metadata or value > metadata["gt"])
        and ("le" not in metadata or value <= metadata["le"])
    )


def check_finite_weight(weight_OI: npt.NDArray[np.float32], layer: str) -> None:
    """Refuse a matrix with NaN or infinity.

    Raises:
        NonFiniteError: naming the layer and how many entries are bad.
    """
    num_bad = int(weight_OI.size - np.count_nonzero(np.isfinite(weight_OI)))
    if num_bad:
        raise NonFiniteError(
            f"layer {layer}",
            f"{num_bad} of {weight_OI.size} weights are NaN or infinite",
            hint="the input model is damaged; run `rarefy inspect` on it, or exclude the layer",
        )


def prunable_weight(solution: Solution, layer: str) -> npt.NDArray[np.float32]:
    """The matrix of a solution for a method that makes zeros in it.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
        PatternError: an earlier step left nothing but factors, which are stored whole.
    """
    if solution.only_factors:
        raise PatternError(
            f"layer {layer}",
            "an earlier step left nothing but factors, which are stored without zeros",
            hint="let that step keep what its factors do not hold (remainder: keep), or exclude the layer",
        )
    check_finite_weight(solution.weight_OI, layer)
    return solution.weight_OI


def finite_statistic(
    stats: Mapping[Statistic, Tensor], statistic: Statistic, shape: tuple[int, ...], layer: str
) -> Tensor:
    """Fetch a statistic and check it.

    Raises:
        UsageError: the statistic was not collected, or has another shape than the layer.
        NonFiniteError: it is NaN or infinite.
    """
    value = stats.get(statistic)
    if value is None:
        raise UsageError(f"layer {layer}", f"no statistic {statistic}", hint="pass what the method's needs() lists")
    if tuple(value.shape) != shape:
        raise UsageError(f"layer {layer}", f"{statistic} of shape {tuple(value.shape)}", allowed=str(shape))
    if not bool(value.isfinite().all()):
        raise NonFiniteError(
            f"layer {layer}",
            f"{statistic} is NaN or infinite",
            hint="activations overflow: check the model's outputs before compression, or use another calibration text",
        )
    return value


def cut(width: int, size: int) -> list[tuple[int, int]]:
    """Cut range(width) into ranges of `size`; the last may be shorter."""
    return [(start, min(start + size, width)) for start in range(0, width, size)]
