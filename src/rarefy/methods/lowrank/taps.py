"""What methods that factorize the kernel of a convolution share. Shape suffixes: O out, I in, C channels, S taps."""

import dataclasses
from collections.abc import Mapping
from math import prod
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rarefy.calibrate.statistics import Gram, Statistic
from rarefy.core.errors import PatternError
from rarefy.core.solution import Solution
from rarefy.core.tap_factors import TapFactors
from rarefy.methods.base import finite_statistic
from rarefy.methods.lowrank.truncate import Remainder, factorable_weight, with_factors

Fit = Literal["weights", "outputs"]
FIT_DOC = "what the last factor is fitted to: the weights, or the layer's outputs on calibration data"
_PULL = 1e-3


def kernel_of(solution: Solution, layer: str) -> Tensor:
    """What the factors of a step shall hold, as a kernel, float64 (O, S, C) with the taps of all axes in one.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
        PatternError: the layer is no convolution of several taps, or an earlier step made factors already.
    """
    weight_OI = factorable_weight(solution, layer)
    if prod(solution.taps) < 2:
        raise PatternError(f"layer {layer}", "no kernel of several taps", allowed="convolutions", hint="svd takes any")
    return weight_OI.double().reshape(weight_OI.shape[0], prod(solution.taps), -1)


def why_no_kernel(kind: str, shape: tuple[int, ...]) -> str | None:
    """Why a layer with a weight of a shape (O, C, *taps) has no kernel that could be factorized; None if it has one."""
    if kind == "depthwise":
        return "a depthwise convolution has one channel for each kernel, and no two kernels share a factor"
    if kind != "conv":
        return "it is no convolution"
    if prod(shape[2:]) < 2:
        return "its kernel has one tap, so that it is a matrix; svd and svd-llm fit it"
    return None


def needs_of(fit: Fit) -> tuple[Statistic, ...]:
    """The second moments of the inputs where outputs are fitted, else nothing."""
    return (Gram(),) if fit == "outputs" else ()


def fitted(
    solution: Solution,
    factors: TapFactors,
    fit: Fit,
    remainder: Remainder,
    stats: Mapping[Statistic, Tensor],
    layer: str,
) -> Solution:
    """Put factors into a solution, the left one fitted to the outputs where that is wanted."""
    if fit == "outputs":
        width = solution.shape[1]
        gram_II = finite_statistic(stats, Gram(), (width, width), layer)
        factors = fit_left(solution, factors, gram_II, layer)
    return with_factors(solution, factors, remainder)


def leading(squares_NN: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues of a symmetric matrix, the largest first, (N, rank)."""
    vectors_NN: Tensor = torch.linalg.eigh(squares_NN)[1]
    return vectors_NN.flip(1)[:, :rank]


def fit_left(solution: Solution, factors: TapFactors, gram_II: Tensor, layer: str) -> TapFactors:
    """The factors with the left one that leaves the least error in the layer's outputs, the others as they are.

    With M what stands right of it, that is L = W H M^T (M H M^T)^-1; where H leaves a direction open, L stays close to
    what it was: a thousandth of the mean of diag(M H M^T) pulls it there.
    """
    weight_OI, left_OA = factorable_weight(solution, layer).double(), torch.from_numpy(factors.left_OA).double()
    eye = np.eye(factors.left_OA.shape[1], dtype=np.float32)
    rest_AI = torch.from_numpy(dataclasses.replace(factors, left_OA=eye).product_OI).double()
    image_IA = gram_II.double() @ rest_AI.T
    square_AA = rest_AI @ image_IA
    mean = float(square_AA.diagonal().mean())
    if mean <= 0:  # nothing is known of the inputs
        return factors
    square_AA.diagonal().add_(_PULL * mean)
    wanted_OA = weight_OI @ image_IA + _PULL * mean * left_OA
    solved_OA = torch.cholesky_solve(wanted_OA.T, torch.linalg.cholesky(square_AA)).T
    return dataclasses.replace(factors, left_OA=np.ascontiguousarray(solved_OA.float().numpy()))
