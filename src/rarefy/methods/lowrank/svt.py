"""Singular value thresholding. Shape suffixes: O out, I in, K rank."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, final

from torch import Tensor

from rarefy.calibrate.statistics import Statistic
from rarefy.core.ranks import Rank
from rarefy.core.solution import Solution
from rarefy.methods.base import check_hyperparameters, hyperparameter
from rarefy.methods.lowrank.svd import REMAINDER_DOC
from rarefy.methods.lowrank.truncate import Remainder, factorable_weight, truncate, with_factors


@final
@dataclass(frozen=True)
class SVT:
    """Shrink all singular values by one amount, which makes the small ones zero: the nuclear norm's way to low rank.

    The result minimises 1/2 ||W - V||_F^2 + tau ||V||_* (theorem 2.1). At one rank it is further from W than the
    truncated SVD, and smaller; it is a baseline, and the proximal step of others.

    References:
        Cai, Candes and Shen, A Singular Value Thresholding Algorithm for Matrix Completion, arXiv:0810.3286,
        equation 2.2 (the operator), theorem 2.1.

    Notes:
        The threshold tau is not given but found: the first singular value that the rank leaves out.
    """

    paper: ClassVar[str] = "arXiv:0810.3286"
    rank: Rank = hyperparameter(MISSING, "how many singular values are left")
    remainder: Remainder = hyperparameter("drop", REMAINDER_DOC)

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """Nothing: the weights say it all."""
        return ()

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Factorize one layer; see `LayerMethod.compress`."""
        del stats  # none is needed
        weight_OI = factorable_weight(solution, layer)
        return with_factors(solution, truncate(weight_OI, self.rank, None, _threshold), self.remainder)


def _threshold(singular: Tensor, rank: int) -> Tensor:
    """D_tau, equation 2.2: sigma - tau for those above tau."""
    tau = singular[rank] if rank < singular.numel() else 0.0
    return (singular[:rank] - tau).clamp(min=0)
