"""Taylor pruning: what the loss changes by, to first order, without a weight. Shape suffixes: O out, I in."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, Literal, final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rarefy.calibrate.gradient_statistics import GradientAbsMean, GradientMean
from rarefy.calibrate.statistics import Statistic
from rarefy.core.patterns import WantedPattern
from rarefy.core.solution import Solution
from rarefy.methods.base import check_hyperparameters, finite_statistic, hyperparameter, prunable_weight
from rarefy.methods.masks import pruned, select


@final
@dataclass(frozen=True)
class Taylor:
    """Keep the weights with the largest |w g|, where g is the gradient of the loss; no weight is changed.

    References:
        Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, arXiv:1611.06440,
        section 2.2. Molchanov et al., Importance Estimation for Neural Network Pruning, arXiv:1906.10771, section 3.1
        (weights instead of feature maps).

    Notes:
        Deviations: the papers remove feature maps in many small steps with training between; here the criterion chooses
        single weights, blocks, rows or columns at once. Of blocks, rows and columns the sum of their |w g| counts, not
        |sum of w g|. `average` says what is averaged over samples: `absolute` |g|, as in the first paper; `signed` g
        itself, which is close to zero where training has ended, and zero on average where labels are drawn from the
        model's prediction. The second paper averages (w g)^2, which is twice the saliency of `obd`.
    """

    paper: ClassVar[str] = "arXiv:1611.06440"
    pattern: WantedPattern = hyperparameter(MISSING, "which entries may be zero")
    average: Literal["absolute", "signed"] = hyperparameter("absolute", "what is averaged over samples: |g|, or g")

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """The mean gradient of each weight, or the mean of its size."""
        return (self._statistic(),)

    def saliency(
        self, weight_OI: npt.NDArray[np.float32], stats: Mapping[Statistic, Tensor], *, layer: str
    ) -> npt.NDArray[np.float32]:
        """|w g|; see `HasSaliency.saliency`."""
        gradient = finite_statistic(stats, self._statistic(), weight_OI.shape, layer)
        score_OI: npt.NDArray[np.float32] = np.abs(weight_OI * gradient.numpy())
        return score_OI

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Prune one layer; see `LayerMethod.compress`."""
        score_OI = self.saliency(prunable_weight(solution, layer), stats, layer=layer)
        return pruned(solution, select(score_OI, self.pattern, solution.mask_OI, layer), self.pattern)

    def _statistic(self) -> GradientMean | GradientAbsMean:
        return GradientAbsMean() if self.average == "absolute" else GradientMean()
