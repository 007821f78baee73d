"""RIA: relative importance and activations. Shape suffixes: O out, I in."""

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
class RIA:
    """Keep the weights that are large for their row and their column, times a power of their input's size.

    References:
        Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models,
        arXiv:2402.04902, equation 3 (relative importance) and 4 (with activations, a = 0.5).

    Notes:
        Scores are compared over the layer, as in the authors' code, N:M ones in each group. The paper's permutation of
        channels for N:M (section 4.2) would have to be undone at every product, and is left out.
    """

    paper: ClassVar[str] = "arXiv:2402.04902"
    pattern: WantedPattern = hyperparameter(MISSING, "which entries may be zero")
    power: float = hyperparameter(0.5, "of the inputs' sizes; 0: relative importance alone", ge=0, le=2)

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """The mean square of each input."""
        return (SquaredNorm(),)

    def saliency(
        self, weight_OI: npt.NDArray[np.float32], stats: Mapping[Statistic, Tensor], *, layer: str
    ) -> npt.NDArray[np.float32]:
        """Relative importance times a power of the input's size, equation 4; see `HasSaliency.saliency`."""
        square_I = finite_statistic(stats, SquaredNorm(), (weight_OI.shape[1],), layer)
        size_OI = np.abs(weight_OI.astype(np.float64))
        tiny = np.finfo(np.float64).tiny
        # equation 3: |W_oi| / sum_o |W_oi| + |W_oi| / sum_i |W_oi|
        relative_OI = size_OI / (size_OI.sum(axis=0) + tiny) + size_OI / (size_OI.sum(axis=1, keepdims=True) + tiny)
        norm_I = square_I.clamp(min=0).double().sqrt().pow(self.power).numpy()
        score_OI: npt.NDArray[np.float32] = (relative_OI * norm_I).astype(np.float32)  # equation 4
        return score_OI

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Prune one layer; see `LayerMethod.compress`."""
        score_OI = self.saliency(prunable_weight(solution, layer), stats, layer=layer)
        return pruned(solution, select(score_OI, self.pattern, solution.mask_OI, layer), self.pattern)
