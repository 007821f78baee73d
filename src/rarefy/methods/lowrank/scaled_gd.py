"""Factors by gradient descent. Shape suffixes: O out, I in, K rank."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from rarefy.calibrate.statistics import Gram, Statistic
from rarefy.core.ranks import Rank
from rarefy.core.solution import Factors, Solution
from rarefy.methods.base import check_hyperparameters, finite_statistic, hyperparameter
from rarefy.methods.lowrank.svd import REMAINDER_DOC
from rarefy.methods.lowrank.truncate import Remainder, factorable_weight, truncate, with_factors


@final
@dataclass(frozen=True)
class ScaledGD:
    """Descend from the truncated SVD along preconditioned gradients of ||(W - L R) X||^2 with respect to both factors.

    svd-llm gives the minimum in closed form; this is the way for metrics that have none, and a check on it.

    References:
        Tong, Ma and Chi, Accelerating Ill-Conditioned Low-Rank Matrix Estimation via Scaled Gradient Descent,
        arXiv:2005.08898, equation 3: each factor's gradient is multiplied with the inverse Gram matrix of the other.

    Notes:
        The paper's error counts all entries the same. Here it is in the metric H = X X^T, so that the left factor's
        gradient is multiplied with (R H R^T)^-1, and the right one's with (L^T L)^-1 on the left and, since nothing
        else of H can be undone cheaply, with 1 / diag(H) on the right. The factors take turns, and every step has the
        length that is best along its direction instead of a fixed one; of the left factor that is the minimum itself.
        The right factor's directions are conjugate (Polak and Ribiere). So the error never rises; should rounding have
        raised it, the SVD stays. All of the data enters each step, through H; nothing is random.
    """

    paper: ClassVar[str] = "arXiv:2005.08898"
    rank: Rank = hyperparameter(MISSING, "how many columns the factors have")
    num_steps: int = hyperparameter(24, "steps of each factor", ge=1)
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
        start = truncate(weight_OI, self.rank, None)
        end = descend(weight_OI, gram_II, start, self.num_steps)
        is_better = _error(weight_OI, gram_II, end) < _error(weight_OI, gram_II, start)
        return with_factors(solution, end if is_better else start, self.remainder)


def descend(weight_OI: Tensor, gram_II: Tensor, start: Factors, num_steps: int) -> Factors:
    """Improve factors, in units in which every diagonal entry of H is 1 (but those of inputs that are never there)."""
    unit_I = gram_II.diagonal().clamp(min=0).sqrt()
    unit_I = torch.where(unit_I > 0, unit_I, 1)
    metric_II = gram_II / unit_I / unit_I[:, None]
    left_OK, right_KI = torch.from_numpy(start.left_OK), torch.from_numpy(start.right_KI) * unit_I
    image_OI = (weight_OI * unit_I) @ metric_II  # W H
    direction_KI = before_KI = torch.zeros_like(right_KI)
    before_size = torch.tensor(0.0)
    right_image_KI = right_KI @ metric_II  # R H
    for _ in range(num_steps):
        # the left factor's gradient is L (R H R^T) - W H R^T
        left_OK = _solve(right_image_KI @ right_KI.T, right_KI @ image_OI.T).T
        inner_KK = left_OK.T @ left_OK
        gradient_KI = inner_KK @ right_image_KI - left_OK.T @ image_OI
        scaled_KI = _solve(inner_KK, gradient_KI)
        size = torch.sum(scaled_KI * gradient_KI)
        if not bool(size > 0):  # at the minimum
            break
        momentum = (size - torch.sum(scaled_KI * before_KI)) / before_size if before_size > 0 else before_size
        direction_KI = direction_KI * momentum.clamp(min=0) - scaled_KI
        slope = torch.sum(direction_KI * gradient_KI)
        if not bool(slope < 0):
            direction_KI, slope = -scaled_KI, -size
        moved_KI = direction_KI @ metric_II
        curvature = torch.sum((inner_KK @ direction_KI) * moved_KI)
        if not bool(curvature > 0):
            break
        length = -slope / curvature
        right_KI = right_KI + length * direction_KI
        right_image_KI = right_image_KI + length * moved_KI
        before_KI, before_size = gradient_KI, size
    left_OK = _solve(right_image_KI @ right_KI.T, right_KI @ image_OI.T).T
    right = np.ascontiguousarray((right_KI / unit_I).numpy())
    return Factors(np.ascontiguousarray(left_OK.numpy()), right)


def _solve(square_KK: Tensor, right_KN: Tensor) -> Tensor:
    """square^-1 right, of a square that may lack a direction: a trace of damping, in float64."""
    dampened_KK = (square_KK + square_KK.T).double() / 2
    damp = 1e-7 * float(dampened_KK.diagonal().mean())
    dampened_KK.diagonal().add_(max(damp, 1e-30))
    lower_KK, info = torch.linalg.cholesky_ex(dampened_KK)
    if int(info) != 0:
        dampened_KK.diagonal().add_(1e-4 * float(dampened_KK.diagonal().mean()))
        lower_KK = torch.linalg.cholesky_ex(dampened_KK)[0]
    solved: Tensor = torch.cholesky_solve(right_KN.double(), lower_KK).float()
    return solved


def _error(weight_OI: Tensor, gram_II: Tensor, factors: Factors) -> float:
    """||(W - L R) X||^2, infinite where a factor is not finite."""
    rest_OI = weight_OI.double() - torch.from_numpy(factors.product_OI)
    error = float(torch.sum((rest_OI @ gram_II.double()) * rest_OI))
    return error if np.isfinite(error) else float("inf")
