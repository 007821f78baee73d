"""SVD-LLM: truncation-aware data whitening. Shape suffixes: O out, I in, K rank."""

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
class SVDLLM:
    """Truncated SVD of W C with H = C C^T: the matrix of that rank with the least error in the layer's outputs.

    References:
        Wang et al., SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression,
        arXiv:2403.07378, section 3.1 (whitening: S is the Cholesky factor of X X^T), algorithm 1, theorem 3.2.

    Notes:
        A fraction of the mean of diag(H) is added to its diagonal, as in the methods that prune; the paper adds what
        makes H positive definite only. The paper's update of one factor on new activations (section 3.2) needs
        nothing more here: blocks are solved in order, on the inputs that the compressed ones before them give.
    """

    paper: ClassVar[str] = "arXiv:2403.07378"
    rank: Rank = hyperparameter(MISSING, "how many columns the factors have")
    percent_damp: float = hyperparameter(0.001, "added to the diagonal of H, as a fraction of its mean", ge=0, le=1)
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
        factors = truncate(weight_OI, self.rank, whitening(gram_II, self.percent_damp, layer))
        return with_factors(solution, factors, self.remainder)


def whitening(gram_II: Tensor, percent_damp: float, layer: str) -> Metric:
    """The Cholesky factor of the dampened H and its inverse.

    Raises:
        NonFiniteError: H cannot be factorized with any dampening up to the mean of its diagonal.
    """
    diagonal_I = gram_II.diagonal().double()
    mean = float(diagonal_I.mean())
    if mean <= 0.0:  # nothing is known of the inputs: every column counts the same
        one_I = torch.ones(diagonal_I.numel(), dtype=torch.float64)
        return Metric(one_I, one_I)
    damp = percent_damp
    while damp <= 1:
        dampened_II = gram_II.double()
        dampened_II.diagonal().add_(max(damp, 1e-12) * mean)
        lower_II, info = torch.linalg.cholesky_ex(dampened_II)
        if int(info) == 0:
            eye_II = torch.eye(lower_II.shape[0], dtype=torch.float64)
            return Metric(lower_II, torch.linalg.solve_triangular(lower_II, eye_II, upper=False))
        damp = max(10 * damp, 1e-6)
    raise NonFiniteError(
        f"layer {layer}", "the Gram matrix is not positive semi-definite", hint="use more calibration data"
    )
