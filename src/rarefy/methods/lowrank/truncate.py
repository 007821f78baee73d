"""The best matrix of low rank in a metric, and where it goes in a solution. Shape suffixes: O out, I in, K rank.

With H = C C^T, ||(W - V) X||_F^2 / T = ||(W - V) C||_F^2, so that the best V of rank K is the truncated SVD of W C,
times C^-1 (Eckart and Young). Only the K leading singular vectors are needed, of one side: those of W C are
eigenvectors of W H W^T on the left and of C^T W^T W C on the right, and the smaller of the two matrices is decomposed,
in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from rarefy.core.errors import PatternError
from rarefy.core.ranks import Rank
from rarefy.core.solution import Factors, Solution
from rarefy.core.tap_factors import TapFactors
from rarefy.methods.base import check_finite_weight

Remainder = Literal["drop", "keep"]


@final
@dataclass(frozen=True, eq=False)
class Metric:
    """A square root of the metric H = C C^T, and an inverse of it.

    Args:
        root_II: float64 (I, R), C; or (I,), its diagonal.
        inverse_II: float64 (R, I), C^-1 (or a pseudo-inverse); or (I,), its diagonal.
    """

    root_II: Tensor
    inverse_II: Tensor

    def apply(self, weight_OI: Tensor) -> Tensor:
        """W C."""
        return weight_OI * self.root_II if self.root_II.ndim == 1 else weight_OI @ self.root_II

    def undo(self, right_KI: Tensor) -> Tensor:
        """The product with C^-1 from the right."""
        return right_KI * self.inverse_II if self.inverse_II.ndim == 1 else right_KI @ self.inverse_II


def truncate(
    weight_OI: Tensor, rank: Rank, metric: Metric | None, shrink: Callable[[Tensor, int], Tensor] | None = None
) -> Factors:
    """The best factors of a matrix.

    Args:
        weight_OI: float32 (O, I), W.
        rank: how many columns they have.
        metric: what counts as close; None: all entries count the same.
        shrink: given all singular values, float64, and K: what becomes of the first K; None: they stay.

    Returns:
        left = U sqrt(S) and right = sqrt(S) Q^T C^-1, where U S Q^T are the K leading parts of the SVD of W C.
    """
    wide = weight_OI.double() if metric is None else metric.apply(weight_OI.double())
    on_left = wide.shape[0] <= wide.shape[1]
    square = wide @ wide.T if on_left else wide.T @ wide
    squares, vectors = torch.linalg.eigh(square)  # they rise
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    rows, width = weight_OI.shape
    num_keep = min(rank.choose((rows, width), squares.numpy()), squares.numel())
    singular_K, basis = squares[:num_keep].sqrt(), vectors[:, :num_keep]
    # the other side's vectors are images of these: U^T Z = S Q^T, and Z Q = U S
    image = wide.T @ basis if on_left else wide @ basis
    kept_K = singular_K if shrink is None else shrink(squares.sqrt(), num_keep)
    part_K = torch.where(singular_K > 0, kept_K / singular_K, 0)
    root_K = kept_K.sqrt()
    share_K = torch.where(root_K > 0, part_K / root_K, 0)
    left, right = (basis * root_K, (image * share_K).T) if on_left else (image * share_K, (basis * root_K).T)
    right = right if metric is None else metric.undo(right)
    return Factors(left.float().contiguous().numpy(), right.float().contiguous().numpy())


def factorable_weight(solution: Solution, layer: str) -> Tensor:
    """What the factors of a step shall hold: W, or the error that the earlier steps have left.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
        PatternError: an earlier step made factors already.
    """
    if solution.factors is not None:
        raise PatternError(
            f"layer {layer}",
            "an earlier step made factors of it",
            hint="a layer has one pair: exclude it in one of them",
        )
    check_finite_weight(solution.weight_OI, layer)
    if is_dense(solution):
        return torch.from_numpy(solution.weight_OI)
    check_finite_weight(solution.target_OI, layer)
    return torch.from_numpy(solution.target_OI - solution.weight_OI)


def is_dense(solution: Solution) -> bool:
    """Whether no step has made the matrix cheap yet."""
    return solution.mask_OI is None and solution.grid is None


def with_factors(solution: Solution, factors: Factors | TapFactors, remainder: Remainder) -> Solution:
    """Put factors into a solution.

    Where the matrix has zeros or a grid, the factors stand beside it. A dense one is replaced by them; with
    `remainder` "keep" what they do not hold stays beside them, for a later step to prune or round.
    """
    if not is_dense(solution):
        matrix_OI, mask_OI, pattern, grid = solution.weight_OI, solution.mask_OI, solution.pattern, solution.grid
        return Solution(matrix_OI, mask_OI, pattern, grid, factors, solution.original_OI)
    if remainder == "drop":
        return Solution.low_rank(factors, solution.original_OI)
    rest_OI = (solution.weight_OI - factors.product_OI).astype(np.float32)
    return Solution(rest_OI, None, None, None, factors, solution.original_OI)
