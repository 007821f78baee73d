"""Statistics of a layer: what a method may know about the data. Shape suffixes: T tokens, O outputs, I inputs.

A statistic is a frozen, hashable value, so that two methods that need the same one share one collection. Here are those
of a layer's inputs; those of its gradients are in `gradient_statistics.py`. Sums are kept in float32; products of
bfloat16 activations are exact in float32, so that the fast path costs no accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor

from rarefy.kernels.gram import add_gram, has_gram_kernel

# Tokens per product: a slice of the activations in float32 then stays in the last-level cache.
_TOKENS_PER_PRODUCT = 2048
# Columns per row panel of the upper triangle of the Gram matrix: small ones skip more of the lower half.
_GRAM_PANEL = 256
# Of a smaller mean square float32 does not hold a millionth: neither its products nor the dampening of its inverse.
_LEAST_MEAN_SQUARE = 1e6 * torch.finfo(torch.float32).tiny


@dataclass
class Sum:
    """A running sum over tokens or gradients, and how many of them went into it."""

    total: Tensor
    num_tokens: int = 0


class InputStatistic(Protocol):
    """A quantity summed over the tokens that a layer sees; `merge` adds the sums of two machines."""

    def init(self, in_features: int) -> Sum:
        """An empty sum."""
        ...

    def update(self, state: Sum, x_TI: Tensor) -> Sum:
        """Add the tokens of x_TI (float32 or bfloat16) to the sum, in place."""
        ...

    def merge(self, a: Sum, b: Sum) -> Sum:
        """The sum over the tokens of both."""
        ...

    def finish(self, state: Sum) -> Tensor:
        """The mean over tokens, float32; zeros where there was no token."""
        ...


@runtime_checkable
class GradientStatistic(Protocol):
    """A quantity summed over gradients of the loss by a layer's matrix; `merge` adds the sums of two machines."""

    def init(self, shape: tuple[int, int], num_taps: int = 1) -> Sum:
        """An empty sum for a matrix of shape (O, I), whose columns are so many taps, each with all channels."""
        ...

    def add_gradient(self, state: Sum, gradient_OI: Tensor) -> Sum:
        """Add one gradient (float32 or bfloat16) to the sum, in place."""
        ...

    def merge(self, a: Sum, b: Sum) -> Sum:
        """The sum over the gradients of both."""
        ...

    def finish(self, state: Sum) -> Tensor:
        """The mean over gradients, float32, its first axis the outputs; zeros where there was no gradient."""
        ...

    def num_floats(self, shape: tuple[int, int]) -> int:
        """How many numbers its sum holds at most."""
        ...


Statistic = InputStatistic | GradientStatistic


@final
@dataclass(frozen=True)
class Gram:
    """The second moment of the inputs: mean over tokens of x x^T, (I, I).

    The Hessian of ||(W - V) X||^2 is twice this times the number of tokens.
    """

    def init(self, in_features: int) -> Sum:
        """An empty sum."""
        return Sum(torch.zeros(in_features, in_features, dtype=torch.float32))

    def update(self, state: Sum, x_TI: Tensor) -> Sum:
        """Add x^T x. Only the upper triangle is computed; `finish` mirrors it."""
        width = x_TI.shape[1]
        if x_TI.dtype == torch.bfloat16 and has_gram_kernel():
            add_gram(x_TI.contiguous().view(torch.uint16).numpy(), state.total.numpy())
            state.num_tokens += x_TI.shape[0]
            return state
        with bfloat16_products(x_TI.dtype == torch.bfloat16):
            for part_TI in torch.split(x_TI, _TOKENS_PER_PRODUCT):
                wide_TI = part_TI.to(torch.float32)
                for start in range(0, width, _GRAM_PANEL):
                    stop = min(width, start + _GRAM_PANEL)
                    state.total[start:stop, start:].addmm_(wide_TI[:, start:stop].T, wide_TI[:, start:])
        state.num_tokens += x_TI.shape[0]
        return state

    def merge(self, a: Sum, b: Sum) -> Sum:
        """The sum over the tokens of both."""
        return Sum(a.total + b.total, a.num_tokens + b.num_tokens)

    def finish(self, state: Sum) -> Tensor:
        """The symmetric mean, float32 (I, I); zeros where the inputs are too small (about 1e-16) for their squares."""
        upper = torch.triu(state.total).div_(max(1, state.num_tokens))
        if float(upper.diagonal().double().mean()) < _LEAST_MEAN_SQUARE:
            return upper.zero_()
        return upper + torch.triu(upper, 1).T


class _ColumnMean:
    """The mean over tokens of a number for each input, (I,); a statistic says which."""

    def of(self, x_TI: Tensor) -> Tensor:
        """The number, float32 (T, I), from the float32 inputs of some tokens."""
        raise NotImplementedError

    def init(self, in_features: int) -> Sum:
        """An empty sum."""
        return Sum(torch.zeros(in_features, dtype=torch.float32))

    def update(self, state: Sum, x_TI: Tensor) -> Sum:
        """Add the column sums."""
        for part_TI in torch.split(x_TI, _TOKENS_PER_PRODUCT):
            state.total += self.of(part_TI.to(torch.float32)).sum(0)
        state.num_tokens += x_TI.shape[0]
        return state

    def merge(self, a: Sum, b: Sum) -> Sum:
        """The sum over the tokens of both."""
        return Sum(a.total + b.total, a.num_tokens + b.num_tokens)

    def finish(self, state: Sum) -> Tensor:
        """The mean, float32 (I,)."""
        return state.total / max(1, state.num_tokens)


@final
@dataclass(frozen=True)
class SquaredNorm(_ColumnMean):
    """The second moment of each input: mean over tokens of x_i^2, (I,); the diagonal of the Gram matrix."""

    def of(self, x_TI: Tensor) -> Tensor:
        """x^2."""
        return x_TI.square()


@final
@dataclass(frozen=True)
class Mean(_ColumnMean):
    """The first moment of each input: mean over tokens of x_i, (I,)."""

    def of(self, x_TI: Tensor) -> Tensor:
        """x."""
        return x_TI


@final
@dataclass(frozen=True)
class Activity(_ColumnMean):
    """How often each input is active: the share of tokens with |x_i| above a threshold, (I,)."""

    threshold: float = 0.0

    def of(self, x_TI: Tensor) -> Tensor:
        """1 where |x| is above the threshold, else 0; NaN stays NaN, which must be told."""
        return (x_TI.abs() > self.threshold) + 0 * x_TI


@final
@dataclass(frozen=True)
class AbsMean(_ColumnMean):
    """The mean magnitude of each input: mean over tokens of |x_i|, (I,)."""

    def of(self, x_TI: Tensor) -> Tensor:
        """|x|."""
        return x_TI.abs()


@contextmanager
def bfloat16_products(enabled: bool) -> Iterator[None]:
    """Let the CPU multiply float32 matrices through its bfloat16 unit, with sums in float32.

    That is exact when the inputs *are* bfloat16 values: the product of two has at most 16 significant bits. The setting
    must not leak: under it, rotary positions would be rounded to 8 bits.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # torch before 2.9 has no such switch
    if not enabled or matmul is None:
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
