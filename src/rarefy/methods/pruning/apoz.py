"""APoZ: pruning what is seldom active. Shape suffixes: O out, I in."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rarefy.calibrate.statistics import Activity, Statistic
from rarefy.core.errors import PatternError
from rarefy.core.patterns import Lines, WantedPattern
from rarefy.core.solution import Solution
from rarefy.methods.base import check_hyperparameters, finite_statistic, hyperparameter, prunable_weight
from rarefy.methods.masks import pruned, select


@final
@dataclass(frozen=True)
class APoZ:
    """Drop the inputs (neurons of the layer before) that are zero for most tokens; no weight is changed.

    References:
        Hu et al., Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep Architectures,
        arXiv:1607.03250, equation 1 (average percentage of zeros).

    Notes:
        The paper removes neurons and trains again. Here the columns that read them become zero; of inputs that are
        active equally often, those with the smaller column of weights go first.
    """

    paper: ClassVar[str] = "arXiv:1607.03250"
    pattern: WantedPattern = hyperparameter(MISSING, "which columns may be zero: {axis: columns, sparsity: S}")
    threshold: float = hyperparameter(0.0, "magnitudes up to this count as zero", ge=0)

    def __post_init__(self) -> None:
        check_hyperparameters(self)
        if not isinstance(self.pattern, Lines) or self.pattern.axis != "columns":
            raise PatternError("APoZ.pattern", repr(self.pattern), allowed="{axis: columns, sparsity: S}")

    def needs(self) -> tuple[Statistic, ...]:
        """How often each input is active."""
        return (Activity(self.threshold),)

    def saliency(
        self, weight_OI: npt.NDArray[np.float32], stats: Mapping[Statistic, Tensor], *, layer: str
    ) -> npt.NDArray[np.float32]:
        """How often the input is active, 1 - APoZ of equation 1; see `HasSaliency.saliency`."""
        active_I = finite_statistic(stats, Activity(self.threshold), (weight_OI.shape[1],), layer).numpy()
        return np.broadcast_to(active_I, weight_OI.shape)

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Prune one layer; see `LayerMethod.compress`."""
        weight_OI = prunable_weight(solution, layer)
        width = weight_OI.shape[1]
        active_I = self.saliency(weight_OI[:1], stats, layer=layer)[0]
        size_I = np.square(weight_OI, dtype=np.float64).sum(axis=0)
        place_I = np.empty(width, dtype=np.float32)
        place_I[np.lexsort((size_I, active_I))] = np.arange(width)
        score_OI = np.broadcast_to(place_I, weight_OI.shape)
        # a column of zeros has nothing left to lose
        return pruned(solution, select(score_OI, self.pattern, solution.mask_OI, layer), self.pattern)
