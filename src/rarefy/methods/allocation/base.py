"""What an allocation is: a rule for how many zeros each layer of a step gives, so that all together give what is asked.

Shape suffixes: O out, I in, G groups of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Protocol, final, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rarefy.calibrate.statistics import Statistic
from rarefy.methods.base import HasSaliency, LayerMethod


@final
@dataclass(frozen=True)
class LayerShape:
    """What is known of a layer before a weight is read.

    Args:
        name: of the layer.
        shape: of its weight: (O, I), or (O, I, *taps) for a convolution.
        matrix: (O, I) of the weight as methods see it; as many entries.
    """

    name: str
    shape: tuple[int, ...]
    matrix: tuple[int, int]

    @property
    def size(self) -> int:
        """How many weights it has."""
        return prod(self.matrix)


@final
@dataclass(frozen=True)
class DenseLayer:
    """A layer of the dense model.

    Args:
        name: of the layer.
        weight_OI: float32.
        stats: the finished statistics that were asked for.
        num_row_groups: so many parts of its rows, of equal size, meet inputs of their own; each statistic then has one
            of each along a first axis.
    """

    name: str
    weight_OI: npt.NDArray[np.float32]
    stats: Mapping[Statistic, Tensor]
    num_row_groups: int

    def saliency(self, method: HasSaliency) -> npt.NDArray[np.float32]:
        """What the method says that each weight matters, float32 (O, I)."""
        if self.num_row_groups == 1:
            return method.saliency(self.weight_OI, self.stats, layer=self.name)
        parts_G = np.split(self.weight_OI, self.num_row_groups)
        return np.concatenate(
            [
                method.saliency(part_OI, {key: value[group] for key, value in self.stats.items()}, layer=self.name)
                for group, part_OI in enumerate(parts_G)
            ]
        )


class DenseModel(Protocol):
    """The layers of a step in the dense model, which need not be in memory all at once."""

    def blocks(self, statistics: Sequence[Statistic]) -> Iterator[Sequence[DenseLayer]]:
        """Walk through the model and give the layers of one repeated block after the other.

        Layers outside of the blocks, and all layers of a model without any, come one by one. Those that no calibration
        input reaches are left out where statistics are asked for.
        """
        ...


class ShapeAllocation(Protocol):
    """A rule that follows from the layers' shapes; one frozen dataclass per rule."""

    paper: ClassVar[str]

    def amounts(self, sparsity: float, layers: Sequence[LayerShape]) -> dict[str, float]:
        """The fraction of zeros of every layer.

        Args:
            sparsity: what they are to have together: the mean over all weights.
            layers: all layers of the step.
        """
        ...


@runtime_checkable
class ModelAllocation(Protocol):
    """A rule that looks at the dense model; one frozen dataclass per rule."""

    paper: ClassVar[str]

    def needs(self, method: LayerMethod) -> tuple[Statistic, ...]:
        """The statistics of the dense model that it reads."""
        ...

    def measured_amounts(
        self, sparsity: float, layers: Sequence[LayerShape], method: LayerMethod, dense: DenseModel
    ) -> dict[str, float]:
        """The fraction of zeros of every layer; one that is left out has `sparsity`.

        Args:
            sparsity: what they are to have together: the mean over all weights.
            layers: all layers of the step.
            method: of the step.
            dense: the model before any step.
        """
        ...


Allocation = ShapeAllocation | ModelAllocation
