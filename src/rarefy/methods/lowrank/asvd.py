"""ASVD: SVD aware of activations. Shape suffixes: O out, I in, K rank."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, final

from torch import Tensor

from rarefy.calibrate.statistics import AbsMean, Statistic
from rarefy.core.ranks import Rank
from rarefy.core.solution import Solution
from rarefy.methods.base import check_hyperparameters, finite_statistic, hyperparameter
from rarefy.methods.lowrank.svd import REMAINDER_DOC
from rarefy.methods.lowrank.truncate import Metric, Remainder, factorable_weight, truncate, with_factors

# A column that calibration never excites has this share of the mean scale, as in the authors' code.
_FLOOR = 1e-6


@final
@dataclass(frozen=True)
class ASVD:
    """Truncated SVD of the matrix with its columns scaled by the size of their inputs.

    References:
        Yuan et al., ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models,
        arXiv:2312.05821, equations 5 to 7 (W = (W S) S^-1), 8 (S_ii = mean |x_i|^alpha).

    Notes:
        The search for a rank of each layer (section 3.4) is not part of the method: `rank` says it.
    """

    paper: ClassVar[str] = "arXiv:2312.05821"
    rank: Rank = hyperparameter(MISSING, "how many columns the factors have")
    alpha: float = hyperparameter(0.5, "exponent of the inputs' sizes; 0: plain SVD", ge=0, le=2)
    remainder: Remainder = hyperparameter("drop", REMAINDER_DOC)

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """The mean magnitude of each input."""
        return (AbsMean(),)

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Factorize one layer; see `LayerMethod.compress`."""
        weight_OI = factorable_weight(solution, layer)
        size_I = finite_statistic(stats, AbsMean(), (weight_OI.shape[1],), layer).double()
        scale_I = size_I.pow(self.alpha)  # equation 8
        scale_I = scale_I.clamp(min=max(_FLOOR * float(scale_I.mean()), 1e-30))
        factors = truncate(weight_OI, self.rank, Metric(scale_I, 1 / scale_I))
        return with_factors(solution, factors, self.remainder)
