"""The inverse of a Fisher matrix in blocks, of which weights can be dropped one after the other; for oBERT.

Shape suffixes: O out, I in, G blocks of columns, B columns of a block, T numbers of its lower triangle, N blocks of all
rows (O times G).
"""

import math
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from rarefy.calibrate.gradient_statistics import in_triangle, kernels_whole, taps_apart
from rarefy.kernels.fisher import costs_in_order, drop_entries, has_fisher_kernels, invert_blocks
from rarefy.methods.masks import BoolArray, FloatArray

# Blocks that are worked on together where there are no kernels: a few megabytes.
_NUMBERS_AT_ONCE = 1 << 20
# Where rounding leaves less of a diagonal of F^-1, and the most that a weight may cost: more than that is infinite.
_LEAST = 1e-30
_MOST = torch.finfo(torch.float32).max


@final
class FisherInverse:
    """F^-1 in blocks.

    Args:
        fisher: F, float32 (O, G, T).
        size: B.
        shape: (O, I).
        num_taps: how many runs of columns, one column a channel, the matrix has.
        percent_damp: see OBERT.
    """

    def __init__(self, fisher: Tensor, size: int, shape: tuple[int, ...], num_taps: int, percent_damp: float) -> None:
        self._num_taps = num_taps
        self._count, self._size = fisher.shape[1], size
        self._shape = shape
        fisher_NT = fisher.reshape(-1, fisher.shape[2])
        row, column = in_triangle(size)
        diagonal = fisher_NT[:, row == column]
        mean = float(diagonal.sum(dtype=torch.float64)) / max(1, shape[0] * shape[1])
        # Where no gradient is known, all weights cost next to nothing, and the larger ones more.
        self._scale = mean or 1e-30
        self._native = has_fisher_kernels() and bool(fisher_NT.numel())
        if self._native:
            inverse = invert_blocks(fisher_NT.contiguous().numpy(), size, self._scale, percent_damp)
            self._inverse_NBB = torch.from_numpy(inverse)
        else:
            self._inverse_NBB = torch.empty(len(fisher_NT), size, size)
            for part in self._parts():
                block_BBN = torch.empty(size, size, len(fisher_NT[part]), dtype=torch.float64)
                block_BBN[row, column] = block_BBN[column, row] = fisher_NT[part].T.double() / self._scale
                self._inverse_NBB[part] = _inverted(block_BBN, percent_damp).permute(2, 0, 1).float()
        self._free_NB = torch.ones(len(fisher_NT), size, dtype=torch.bool)

    def score_OI(self, weight_OI: FloatArray) -> FloatArray:  # noqa: N802 (shape suffix)
        """The cost at which each weight goes, the cheapest of its block first; 0 of those that are dropped already."""
        weight_NB = self._blocks(torch.from_numpy(weight_OI))
        if self._native:
            arrays = weight_NB.numpy(), self._inverse_NBB.numpy(), self._free_NB.numpy()
            cost_NB = torch.from_numpy(costs_in_order(*arrays))
        else:
            cost_NB = torch.zeros_like(weight_NB)
            for part in self._parts():
                own = weight_NB[part].T, self._inverse_NBB[part].permute(1, 2, 0), self._free_NB[part].T
                cost_NB[part] = _costs_in_order(*(each.clone(memory_format=torch.contiguous_format) for each in own)).T
        return self._rows((cost_NB.double() * (self._scale / 2)).float())

    def dropped(self, weight_OI: FloatArray, drop_OI: BoolArray) -> FloatArray:
        """The weights after some are dropped, those in their blocks moved; F^-1 is from now on that of the others."""
        weight_NB = self._blocks(torch.from_numpy(weight_OI)).clone()
        drop_NB = self._blocks(torch.from_numpy(drop_OI))
        if self._native:
            drop_entries(drop_NB.numpy(), weight_NB.numpy(), self._inverse_NBB.numpy())
        else:
            for part in self._parts():
                inverse_BBN = self._inverse_NBB[part].permute(1, 2, 0).double()
                weight_NB[part] = _dropped(weight_NB[part].T.double(), inverse_BBN, drop_NB[part].T).T.float()
                self._inverse_NBB[part] = inverse_BBN.permute(2, 0, 1).float()
        self._free_NB &= ~drop_NB
        return self._rows(weight_NB)

    def _parts(self) -> Iterator[slice]:
        """Runs of blocks that are worked on together."""
        at_once = max(1, _NUMBERS_AT_ONCE // self._size**2)
        return (slice(start, start + at_once) for start in range(0, len(self._inverse_NBB), at_once))

    def _blocks(self, matrix_OI: Tensor) -> Tensor:
        padding = self._count * self._size - self._shape[1]
        own_OI = kernels_whole(matrix_OI, self._num_taps)
        return torch.nn.functional.pad(own_OI, (0, padding)).reshape(-1, self._size).contiguous()

    def _rows(self, matrix_NB: Tensor) -> FloatArray:
        rows, width = self._shape
        own_OI = matrix_NB.reshape(rows, -1)[:, :width]
        array: FloatArray = taps_apart(own_OI, self._num_taps).contiguous().numpy()
        return array


def _costs_in_order(weight_BN: Tensor, inverse_BBN: Tensor, free_BN: Tensor) -> Tensor:
    """See `kernels.fisher.costs_in_order`. All three are overwritten."""
    cost_BN = torch.zeros_like(weight_BN)
    most_N = torch.zeros_like(weight_BN[0])
    for _ in range(weight_BN.shape[0]):
        cost_of_each_BN = weight_BN.square() / inverse_BBN.diagonal().T.clamp_min(_LEAST)
        now_BN = torch.where(free_BN, cost_of_each_BN.clamp_max(_MOST), math.inf)
        least_N, place_N = now_BN.min(0)
        any_N = least_N < math.inf
        torch.maximum(most_N, torch.where(any_N, least_N, 0), out=most_N)
        place_1N = place_N[None]
        cost_BN.scatter_(0, place_1N, torch.where(any_N, most_N, cost_BN.gather(0, place_1N)))
        free_BN.scatter_(0, place_1N, False)
        column_BN = inverse_BBN.gather(1, place_N.expand(weight_BN.shape[0], 1, -1))[:, 0]
        price_N = torch.where(any_N, column_BN.gather(0, place_1N)[0].reciprocal(), 0)
        scaled_BN = column_BN * price_N
        weight_BN.addcmul_(scaled_BN, weight_BN.gather(0, place_1N), value=-1)
        inverse_BBN.addcmul_(scaled_BN[:, None], column_BN[None], value=-1)
    return cost_BN


def _dropped(weight_BN: Tensor, inverse_BBN: Tensor, drop_BN: Tensor) -> Tensor:
    """See `kernels.fisher.drop_entries`; the inverse is overwritten."""
    for column, drop_N in enumerate(drop_BN):
        if not bool(drop_N.any()):
            continue
        price_N = torch.where(drop_N, inverse_BBN[column, column].reciprocal(), 0)
        column_BN = inverse_BBN[:, column] * price_N
        weight_BN = weight_BN - column_BN * weight_BN[column]
        weight_BN[column].masked_fill_(drop_N, 0)
        inverse_BBN.addcmul_(column_BN[:, None], inverse_BBN[column].clone()[None], value=-1)
    return weight_BN


def _inverted(matrix_BBN: Tensor, damp: float) -> Tensor:
    """Invert positive definite matrices, all at once, by Gauss-Jordan elimination.

    LAPACK, called for each, takes several times as long at such sizes.
    """
    inverse_BBN = matrix_BBN.contiguous()
    inverse_BBN.diagonal().add_(damp)
    for k in range(inverse_BBN.shape[0]):
        pivot_N = inverse_BBN[k, k].reciprocal()
        row_BN = inverse_BBN[k] * pivot_N
        column_BN = inverse_BBN[:, k].clone()
        inverse_BBN.addcmul_(column_BN[:, None], row_BN[None], value=-1)
        inverse_BBN[k] = row_BN
        inverse_BBN[:, k] = -column_BN * pivot_N
        inverse_BBN[k, k] = pivot_N
    return inverse_BBN
