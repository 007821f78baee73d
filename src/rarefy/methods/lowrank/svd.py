"""Truncated SVD. Shape suffixes: O out, I in, K rank."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, final

from torch import Tensor

from rarefy.calibrate.statistics import Statistic
from rarefy.core.ranks import Rank
from rarefy.core.solution import Solution
from rarefy.methods.base import check_hyperparameters, hyperparameter
from rarefy.methods.lowrank.truncate import Remainder, factorable_weight, truncate, with_factors

REMAINDER_DOC = "what the factors of a dense matrix do not hold: drop it, or keep it for a later step to prune or round"


@final
@dataclass(frozen=True)
class SVD:
    """Put the matrix into the factors of the leading singular values: the closest matrix of that rank; no data needed.

    After a step that made zeros or rounded, the factors hold the error that it left, beside its result.

    References:
        Eckart and Young, The approximation of one matrix by another of lower rank, Psychometrika 1 (1936), theorem;
        for neural networks Denton et al., Exploiting Linear Structure Within Convolutional Networks for Efficient
        Evaluation, arXiv:1404.0736, section 3.2.

    Notes:
        Both factors carry the root of the singular values, so that their numbers are of one size.
    """

    paper: ClassVar[str] = "arXiv:1404.0736"
    rank: Rank = hyperparameter(MISSING, "how many columns the factors have")
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
        return with_factors(solution, truncate(weight_OI, self.rank, None), self.remainder)
