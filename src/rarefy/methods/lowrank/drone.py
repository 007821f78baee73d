"""DRONE: data-aware low-rank factors. Shape suffixes: O out, I in, R rank of the data, K rank."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from rarefy.calibrate.statistics import Gram, Statistic
from rarefy.core.errors import NonFiniteError
from rarefy.core.ranks import Rank
from rarefy.core.solution import Solution
from rarefy.methods.base import check_hyperparameters, finite_statistic, hyperparameter
from rarefy.methods.lowrank.svd import REMAINDER_DOC
from rarefy.methods.lowrank.truncate import Metric, Remainder, factorable_weight, truncate, with_factors


@final
@dataclass(frozen=True)
class DRONE:
    """The matrix of a rank with the least error in the layer's outputs, on the subspace that the inputs span.

    Where H has full rank, this is the same matrix as that of SVD-LLM without dampening; where the inputs leave out some
    directions, V is zero on those.

    References:
        Chen et al., DRONE: Data-aware Low-rank Compression for Large NLP Models, NeurIPS 2021, equation 4 (the problem)
        and theorem 1 (its solution from the SVDs of W and of X).

    Notes:
        Theorem 1 goes through the SVDs of W and X, and Z = S_W V_W^T U_X S_X; here H = X X^T = U_X S_X^2 U_X^T is
        decomposed, and W U_X S_X, which has the same singular values and right vectors as Z. The paper's choice of a
        rank by the loss of accuracy that it costs (algorithm 2) is not part of the method: `rank` says it.
    """

    paper: ClassVar[str] = "DRONE (NeurIPS 2021)"
    rank: Rank = hyperparameter(MISSING, "how many columns the factors have")
    tolerance: float = hyperparameter(
        1e-6, "directions with less than this share of the largest second moment do not count", gt=0, le=0.1
    )
    remainder: Remainder = hyperparameter("drop", REMAINDER_DOC)

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """The second moments of the inputs, H."""
        return (Gram(),)

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Factorize one layer; see `LayerMethod.compress`."""
        weight_OI = factorable_weight(solution, layer)
        width = weight_OI.shape[1]
        gram_II = finite_statistic(stats, Gram(), (width, width), layer)
        squares_I, vectors_II = torch.linalg.eigh(gram_II.double())
        if float(squares_I[0]) < -0.1 * float(squares_I[-1]):
            raise NonFiniteError(f"layer {layer}", "the Gram matrix is not positive semi-definite")
        spanned_I = squares_I > self.tolerance * squares_I[-1]
        root_R, vectors_IR = squares_I[spanned_I].sqrt(), vectors_II[:, spanned_I]  # S_X, U_X
        metric = Metric(vectors_IR * root_R, (vectors_IR / root_R).T)
        return with_factors(solution, truncate(weight_OI, self.rank, metric), self.remainder)
