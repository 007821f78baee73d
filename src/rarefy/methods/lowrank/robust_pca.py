"""Robust PCA: low rank plus sparse by a convex problem. Shape suffixes: O out, I in."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from rarefy.calibrate.statistics import Statistic
from rarefy.core.patterns import WantedPattern
from rarefy.core.ranks import Rank
from rarefy.core.solution import Solution
from rarefy.methods.base import check_finite_weight, check_hyperparameters, hyperparameter
from rarefy.methods.lowrank.truncate import factorable_weight, is_dense, truncate
from rarefy.methods.masks import pattern_of, select

# Growth of the penalty and its first value, as in Lin, Chen and Ma's code for algorithm 5 of arXiv:1009.5055.
_GROWTH, _FIRST = 1.5, 1.25


@final
@dataclass(frozen=True)
class RobustPCA:
    """Split W = L + S with the least ||L||_* + lambda ||S||_1, then cut L to a rank and S to a pattern; no data needed.

    References:
        Candes, Li, Ma and Wright, Robust Principal Component Analysis?, arXiv:0912.3599, equation 1.1 and theorem 1.1
        (lambda = 1 / sqrt(max(O, I))); solved by Lin, Chen and Ma, The Augmented Lagrange Multiplier Method,
        arXiv:1009.5055, algorithm 5 (inexact ALM).

    Notes:
        The exact split W = L + S takes as many numbers as it takes; a layout has room for some. So of L the leading
        singular values are kept, and of W minus those the entries where S is largest. Each of the paper's iterations
        is an SVD, so that this method takes longer than SparseGPT.
    """

    paper: ClassVar[str] = "arXiv:0912.3599"
    rank: Rank = hyperparameter(MISSING, "how many columns the factors have")
    pattern: WantedPattern = hyperparameter(MISSING, "which entries of the sparse part may be zero")
    max_steps: int = hyperparameter(50, "iterations at most", ge=1)
    tolerance: float = hyperparameter(1e-4, "of ||W - L - S||_F / ||W||_F, at which they end", gt=0)

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """Nothing: the weights say it all."""
        return ()

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Split one layer; see `LayerMethod.compress`."""
        del stats  # none is needed
        factorable_weight(solution, layer)
        weight = torch.from_numpy(solution.weight_OI if is_dense(solution) else solution.target_OI)
        check_finite_weight(weight.numpy(), layer)
        low_OI, sparse_OI = principal_components(weight, self.max_steps, self.tolerance)
        kept_OI = select(sparse_OI.abs().numpy(), self.pattern, solution.mask_OI, layer)
        pattern = pattern_of(kept_OI, self.pattern, solution.pattern, solution.mask_OI)
        if solution.grid is not None:  # the values stay, and the factors hold what they leave
            matrix_OI = np.where(kept_OI, solution.weight_OI, np.float32(0))
            factors = truncate(weight - torch.from_numpy(matrix_OI), self.rank, None)
            return Solution(matrix_OI, kept_OI, pattern, solution.grid, factors, solution.original_OI)
        factors = truncate(low_OI, self.rank, None)
        matrix_OI = np.where(kept_OI, weight.numpy() - factors.product_OI, np.float32(0))
        return Solution(matrix_OI, kept_OI, pattern, None, factors, solution.original_OI)


def principal_components(weight: Tensor, max_steps: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Solve min ||L||_* + lambda ||S||_1 subject to L + S = W; returns L and S, float32 (O, I)."""
    share = 1 / max(weight.shape) ** 0.5  # lambda
    size = float(torch.linalg.matrix_norm(weight))
    sparse_OI = torch.zeros_like(weight)
    if size == 0:
        return sparse_OI, sparse_OI
    largest = float(torch.linalg.matrix_norm(weight, 2))
    dual_OI = weight / max(largest, float(weight.abs().max()) / share)  # Y
    mu = _FIRST / largest
    low_OI = torch.zeros_like(weight)
    for _ in range(max_steps):
        low_OI = _shrink_singular(weight - sparse_OI + dual_OI / mu, 1 / mu)
        rest_OI = weight - low_OI + dual_OI / mu
        sparse_OI = torch.sign(rest_OI) * (rest_OI.abs() - share / mu).clamp(min=0)
        error_OI = weight - low_OI - sparse_OI
        dual_OI = dual_OI + mu * error_OI
        mu *= _GROWTH
        if float(torch.linalg.matrix_norm(error_OI)) <= tolerance * size:
            break
    return low_OI, sparse_OI


def _shrink_singular(matrix: Tensor, amount: float) -> Tensor:
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    shrunk: Tensor = (left * (singular - amount).clamp(min=0)) @ right
    return shrunk
