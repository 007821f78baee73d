"""Magnitude pruning: drop the weights of smallest absolute value. Shape suffixes: O out, I in."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, Literal, final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rarefy.calibrate.statistics import Statistic
from rarefy.core.patterns import WantedPattern
from rarefy.core.solution import Solution
from rarefy.methods.base import check_hyperparameters, hyperparameter, prunable_weight
from rarefy.methods.masks import pruned, select


@final
@dataclass(frozen=True)
class Magnitude:
    """Keep the weights with the largest |w|; no data needed.

    Unstructured zeros are chosen over the whole layer, N:M ones in each group. Blocks, rows and columns go by their
    norm: the sum of |w| (L1), or of w^2 (L2).

    References:
        Han et al., Learning both Weights and Connections for Efficient Neural Networks, arXiv:1506.02626, section 3.1.
        Of whole filters: Li et al., Pruning Filters for Efficient ConvNets, arXiv:1608.08710, section 3.1 (L1).

    Notes:
        The paper prunes against a threshold and retrains; here the threshold is what gives the sparsity asked for.
    """

    paper: ClassVar[str] = "arXiv:1506.02626"
    pattern: WantedPattern = hyperparameter(MISSING, "which entries may be zero")
    norm: Literal["l1", "l2"] = hyperparameter("l1", "by which blocks, rows and columns are compared")

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """Nothing: the weights say it all."""
        return ()

    def saliency(
        self, weight_OI: npt.NDArray[np.float32], stats: Mapping[Statistic, Tensor], *, layer: str
    ) -> npt.NDArray[np.float32]:
        """|w| or w^2; see `HasSaliency.saliency`."""
        del stats, layer  # none is needed
        return np.abs(weight_OI) if self.norm == "l1" else np.square(weight_OI)

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Prune one layer; see `LayerMethod.compress`."""
        score_OI = self.saliency(prunable_weight(solution, layer), stats, layer=layer)
        kept_OI = select(score_OI, self.pattern, solution.mask_OI, layer)
        return pruned(solution, kept_OI, self.pattern)
