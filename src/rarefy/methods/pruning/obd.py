"""OBD: pruning by a diagonal second-order model of the loss. Shape suffixes: O out, I in."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rarefy.calibrate.gradient_statistics import FisherDiagonal
from rarefy.calibrate.statistics import Statistic
from rarefy.core.patterns import WantedPattern
from rarefy.core.solution import Solution
from rarefy.methods.base import check_hyperparameters, finite_statistic, hyperparameter, prunable_weight
from rarefy.methods.masks import pruned, select


@final
@dataclass(frozen=True)
class OBD:
    """Keep the weights with the largest w^2 F / 2, where F is the diagonal of the Fisher matrix; no weight is changed.

    References:
        LeCun, Denker and Solla, Optimal Brain Damage, NIPS 1989, section 2.2, step 4: the saliency h_kk u_k^2 / 2.

    Notes:
        Deviations: the paper computes the diagonal of the Hessian by a second backward pass; here it is
        that of the empirical Fisher matrix, the mean of squared gradients, which equals the Hessian in expectation
        where the model predicts the data well. The paper trains again and repeats. Of a block, row or column the sum of
        its saliencies counts, which is the same model for it as for single weights.
    """

    paper: ClassVar[str] = "LeCun et al., Optimal Brain Damage, NIPS 1989"
    pattern: WantedPattern = hyperparameter(MISSING, "which entries may be zero")

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """The mean square of the gradient of each weight."""
        return (FisherDiagonal(),)

    def saliency(
        self, weight_OI: npt.NDArray[np.float32], stats: Mapping[Statistic, Tensor], *, layer: str
    ) -> npt.NDArray[np.float32]:
        """w^2 F / 2; see `HasSaliency.saliency`."""
        fisher = finite_statistic(stats, FisherDiagonal(), weight_OI.shape, layer)
        score_OI: npt.NDArray[np.float32] = (np.square(weight_OI, dtype=np.float64) * fisher.numpy() / 2).astype(
            np.float32
        )
        return score_OI

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Prune one layer; see `LayerMethod.compress`."""
        score_OI = self.saliency(prunable_weight(solution, layer), stats, layer=layer)
        return pruned(solution, select(score_OI, self.pattern, solution.mask_OI, layer), self.pattern)
