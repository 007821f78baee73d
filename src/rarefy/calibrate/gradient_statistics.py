"""Statistics of a layer's gradients.

Shape suffixes: O outputs, I inputs, N gradients, G blocks of columns, B columns, T numbers of a block's lower triangle.

The gradient of sample n is that of its loss by the layer's matrix. Sums are kept in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from rarefy.calibrate.statistics import GradientStatistic, Sum
from rarefy.kernels.fisher import add_outer_products, has_fisher_kernels

# Gradients that wait until FisherBlocks multiplies them at once: its sums are then read and written once for all.
_GRADIENTS_PER_PRODUCT = 8


class _GradientMean:
    """The mean over gradients of a number for each weight, (O, I); a statistic says which."""

    def of(self, gradient_OI: Tensor) -> Tensor:
        """The number, float32 (O, I), from a float32 gradient."""
        raise NotImplementedError

    def init(self, shape: tuple[int, int], num_taps: int = 1) -> Sum:
        """An empty sum."""
        del num_taps
        return Sum(torch.zeros(shape, dtype=torch.float32))

    def add_gradient(self, state: Sum, gradient_OI: Tensor) -> Sum:
        """Add the numbers of one gradient."""
        state.total += self.of(gradient_OI.to(torch.float32))
        state.num_tokens += 1
        return state

    def merge(self, a: Sum, b: Sum) -> Sum:
        """The sum over the gradients of both."""
        return Sum(a.total + b.total, a.num_tokens + b.num_tokens)

    def finish(self, state: Sum) -> Tensor:
        """The mean, float32 (O, I)."""
        return state.total / max(1, state.num_tokens)

    def num_floats(self, shape: tuple[int, int]) -> int:
        """One for each weight."""
        return shape[0] * shape[1]


@final
@dataclass(frozen=True)
class GradientMean(_GradientMean):
    """The gradient of the mean loss: mean over samples of dL/dw, (O, I)."""

    def of(self, gradient_OI: Tensor) -> Tensor:
        """g."""
        return gradient_OI


@final
@dataclass(frozen=True)
class GradientAbsMean(_GradientMean):
    """The mean size of the gradient: mean over samples of |dL/dw|, (O, I)."""

    def of(self, gradient_OI: Tensor) -> Tensor:
        """|g|."""
        return gradient_OI.abs()


@final
@dataclass(frozen=True)
class FisherDiagonal(_GradientMean):
    """The diagonal of the empirical Fisher matrix: mean over samples of (dL/dw)^2, (O, I)."""

    def of(self, gradient_OI: Tensor) -> Tensor:
        """g^2."""
        return gradient_OI.square()


@final
@dataclass(frozen=True)
class NumTaps:
    """How many taps the kernel of each row has, (O, 1): 1 but in convolutions. Of the layer, whatever its gradients."""

    def init(self, shape: tuple[int, int], num_taps: int = 1) -> Sum:
        """The number."""
        return Sum(torch.full((shape[0], 1), float(num_taps)))

    def add_gradient(self, state: Sum, gradient_OI: Tensor) -> Sum:
        """Nothing to add."""
        del gradient_OI
        return state

    def merge(self, a: Sum, b: Sum) -> Sum:
        """Either."""
        del b
        return a

    def finish(self, state: Sum) -> Tensor:
        """The number, float32 (O, 1)."""
        return state.total

    def num_floats(self, shape: tuple[int, int]) -> int:
        """One for each row."""
        return shape[0]


def kernels_whole(matrix_OI: Tensor, num_taps: int) -> Tensor:
    """The columns in the parameter's own order: the taps of a channel side by side, channel after channel."""
    if num_taps == 1:
        return matrix_OI
    return matrix_OI.reshape(len(matrix_OI), num_taps, -1).transpose(1, 2).flatten(1)


def taps_apart(matrix_OI: Tensor, num_taps: int) -> Tensor:
    """What `kernels_whole` undoes: tap after tap, each with all channels."""
    if num_taps == 1:
        return matrix_OI
    return matrix_OI.reshape(len(matrix_OI), -1, num_taps).transpose(1, 2).flatten(1)


@dataclass
class _BlockSum(Sum):
    """A sum of outer products, and gradients that are still to be added, each with the columns of all blocks."""

    size: int = 1
    waiting: list[Tensor] = field(default_factory=list)
    num_taps: int = 1


@final
@dataclass(frozen=True)
class FisherBlocks:
    """Blocks of the empirical Fisher matrix along each row: mean over samples of g g^T for runs of columns.

    The columns run as they do in the parameter (`kernels_whole`): a convolution's taps of a channel, which have most to
    do with each other, are in one block. Its result is float32 (O, G, T): of row o the columns from g * B on, where B
    is `block_size`, or all columns if there are fewer; of every block, which is symmetric, the lower triangle, row
    after row (`in_triangle`). The last block of a row is filled up with zeros.
    """

    block_size: int

    def init(self, shape: tuple[int, int], num_taps: int = 1) -> Sum:
        """An empty sum."""
        size, count = self.blocks_of(shape[1])
        total = torch.zeros(shape[0], count, size * (size + 1) // 2, dtype=torch.float32)
        return _BlockSum(total, size=size, num_taps=num_taps)

    def add_gradient(self, state: Sum, gradient_OI: Tensor) -> Sum:
        """Add the outer products of one gradient, together with those of some later ones: it is not to be changed."""
        assert isinstance(state, _BlockSum)
        count, size = state.total.shape[1], state.size
        own_OI = kernels_whole(gradient_OI, state.num_taps)
        own_OI = own_OI if own_OI.dtype == torch.bfloat16 else own_OI.to(torch.float32)
        padding = count * size - own_OI.shape[1]
        own_OI = torch.nn.functional.pad(own_OI, (0, padding)) if padding else own_OI
        state.waiting.append(own_OI.reshape(-1))
        state.num_tokens += 1
        if len(state.waiting) == _GRADIENTS_PER_PRODUCT:
            _add_waiting(state)
        return state

    def merge(self, a: Sum, b: Sum) -> Sum:
        """The sum over the gradients of both."""
        assert isinstance(a, _BlockSum)
        assert isinstance(b, _BlockSum)
        _add_waiting(a)
        _add_waiting(b)
        return _BlockSum(a.total + b.total, a.num_tokens + b.num_tokens, size=a.size, num_taps=a.num_taps)

    def finish(self, state: Sum) -> Tensor:
        """The mean; the sum itself, which is not to be used any more."""
        assert isinstance(state, _BlockSum)
        _add_waiting(state)
        return state.total.div_(max(1, state.num_tokens))

    def num_floats(self, shape: tuple[int, int]) -> int:
        """The blocks, and the gradients that wait."""
        size, count = self.blocks_of(shape[1])
        return shape[0] * count * (size * (size + 1) // 2 + _GRADIENTS_PER_PRODUCT * size)

    def blocks_of(self, width: int) -> tuple[int, int]:
        """Columns of a block, and how many blocks a row has."""
        size = max(1, min(self.block_size, width))
        return size, -(-width // size)


def in_triangle(size: int) -> tuple[Tensor, Tensor]:
    """Row and column of the numbers of a lower triangle, in the order in which they are kept."""
    row, column = torch.tril_indices(size, size)
    return row, column


def result_bytes(statistic: GradientStatistic, shape: tuple[int, int]) -> int:
    """Bytes of a finished statistic of a matrix: of its sum, without gradients that wait."""
    if isinstance(statistic, FisherBlocks):
        size, count = statistic.blocks_of(shape[1])
        return 4 * shape[0] * count * (size * (size + 1) // 2)
    return 4 * statistic.num_floats(shape)


def _add_waiting(state: _BlockSum) -> None:
    total_XT = state.total.view(-1, state.total.shape[-1])
    waiting, state.waiting = state.waiting, []
    if not waiting:
        return
    if has_fisher_kernels():
        is_half = waiting[0].dtype == torch.bfloat16
        rows = [(row.view(torch.uint16) if is_half else row).numpy() for row in waiting]
        add_outer_products(rows, state.size, total_XT.numpy())
    else:
        row, column = in_triangle(state.size)
        for vectors in waiting:
            vector_XB = vectors.to(torch.float32).view(-1, state.size)
            total_XT.addcmul_(vector_XB[:, row], vector_XB[:, column])
