"""What methods that factorize the kernel of a convolution share. Shape suffixes: O out, I in, C channels, S taps."""

from math import prod

import torch
from torch import Tensor

from rarefy.core.errors import PatternError
from rarefy.core.solution import Solution
from rarefy.methods.lowrank.truncate import factorable_weight


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


def leading(squares_NN: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues of a symmetric matrix, the largest first, (N, rank)."""
    vectors_NN: Tensor = torch.linalg.eigh(squares_NN)[1]
    return vectors_NN.flip(1)[:, :rank]
