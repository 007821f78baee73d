"""Wanda: prune by weights and activations. Shape suffixes: O out, I in."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rarefy.calibrate.statistics import SquaredNorm, Statistic
from rarefy.core.patterns import WantedPattern
from rarefy.core.solution import Solution
from rarefy.methods.base import check_hyperparameters, finite_statistic, hyperparameter, prunable_weight
from rarefy.methods.masks import pruned, select


@final
@dataclass(frozen=True)
class Wanda:
    """Keep the weights with the largest |w_oi| * ||x_i||_2, compared within each output row; no weight is changed.

    References:
        Sun et al., A Simple and Effective Pruning Approach for Large Language Models, arXiv:2306.11695, equation 1
        (score) and section 3 (comparison group: the row).

    Notes:
        ||x_i||_2 is taken as the root of the mean square over tokens: the same order, whatever their number. Where
        the sparsity of a row is no whole number of entries, some rows lose one more, so that the total is exact.
        Blocks, which the paper does not have, compare the sums of their scores within a row of blocks.
    """

    paper: ClassVar[str] = "arXiv:2306.11695"
    pattern: WantedPattern = hyperparameter(MISSING, "which entries may be zero")

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """The mean square of each input."""
        return (SquaredNorm(),)

    def saliency(
        self, weight_OI: npt.NDArray[np.float32], stats: Mapping[Statistic, Tensor], *, layer: str
    ) -> npt.NDArray[np.float32]:
        """|w_oi| ||x_i||, equation 1; see `HasSaliency.saliency`."""
        square_I = finite_statistic(stats, SquaredNorm(), (weight_OI.shape[1],), layer)
        norm_I = square_I.clamp(min=0).sqrt().cpu().numpy().astype(np.float32)
        score_OI: npt.NDArray[np.float32] = np.abs(weight_OI) * norm_I
        return score_OI

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Prune one layer; see `LayerMethod.compress`."""
        score_OI = self.saliency(prunable_weight(solution, layer), stats, layer=layer)
        kept_OI = select(score_OI, self.pattern, solution.mask_OI, layer, per_row=True)
        return pruned(solution, kept_OI, self.pattern)
