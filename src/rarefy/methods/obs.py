"""Optimal Brain Surgeon, one column at a time: the solver that SparseGPT and GPTQ share.

Both minimise, for every row w of a layer independently, (w - v) H (w - v)^T with H = X X^T / T, by fixing the entries
of v from left to right: entry j is set to a value v_j (zero, or a grid point), and the entries to the right of it,
which are still free, are moved to make up for it in the best way (SparseGPT equation 3, GPTQ equation 2):

    w_{>j} <- w_{>j} - (w_j - v_j) / [F^-1]_jj * [F^-1]_{j,>j},        F = H restricted to the free entries j, j+1, ...

All those inverses are rows of one matrix: with H^-1 = U^T U, U upper triangular, [F^-1]_jj = U_jj^2 and
[F^-1]_{j,>j} = U_jj * U_{j,>j} (GPTQ section 3.3, step 3). So one factorization serves every row and every column.

Matrices are worked on transposed, (I, O), so that a column of the layer is contiguous memory.
Shape suffixes: O out, I in, B columns of one block, S columns of one strip, G groups.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from rarefy.core.errors import NonFiniteError
from rarefy.core.grids import FittedGrid
from rarefy.methods.masks import BoolArray, FloatArray

Order = Literal["given", "activation"]

MAX_DAMP = 1.0

# Columns that are updated one by one; so few that torch does not split the work among threads, which would wait for
# each other at every column. What lies further to the right gets one product per strip.
_STRIP = 16

_INVERTED_AT_ONCE = 96


@final
@dataclass(frozen=True, eq=False)
class Factor:
    """The factorized metric of one layer.

    Args:
        order_I: int64 (I,), the columns in the order in which they are fixed.
        upper_II: float32 (I, I), U with U^T U = H^-1, rows and columns in that order.
        gram_II: float32 (I, I), the dampened H, columns where they stand in the layer.
    """

    order_I: Tensor
    upper_II: Tensor
    gram_II: Tensor

    def loss_I(self) -> Tensor:  # noqa: N802 (shape suffix)
        """What a unit error in each column costs, float32 (I,): 1 / U_jj^2, columns where they stand in the layer."""
        loss_I = torch.empty_like(self.upper_II[0])
        loss_I[self.order_I] = self.upper_II.diagonal().square().reciprocal()
        return loss_I


_cache: dict[tuple[int, float, Order, int], tuple[weakref.ref[Tensor], Factor]] = {}


def factorize(gram_II: Tensor, percent_damp: float, order: Order, group: int, layer: str) -> Factor:
    """Invert and factorize H; layers that share one statistic (query, key, value) share the result.

    Args:
        gram_II: float32 (I, I), H.
        percent_damp: this fraction of the mean of diag(H) is added to the diagonal (both papers use 0.01). A column
            that calibration never excites has only this (1e-6 where it is 0) as its weight in the metric.
        order: "given", or "activation": columns of large H_jj first, while most others are free to make up for them.
        group: runs of this many columns stay together, ordered by the sum of their H_jj; 1: every column for itself.
        layer: the name for error messages.

    Raises:
        NonFiniteError: H cannot be factorized with any dampening up to the mean of its diagonal.
    """
    key = (id(gram_II), percent_damp, order, group)
    found = _cache.get(key)
    if found is not None and found[0]() is gram_II:
        return found[1]
    # of one matrix only: layers that share it follow one another, and each entry holds two matrices
    for other in [other for other, entry in _cache.items() if entry[0]() is not gram_II]:
        del _cache[other]
    factor = _factorize(gram_II, percent_damp, order, group, layer)
    _cache[key] = (weakref.ref(gram_II), factor)
    return factor


def _factorize(gram_II: Tensor, percent_damp: float, order: Order, group: int, layer: str) -> Factor:
    diagonal_I = gram_II.diagonal().clamp(min=0)
    width = diagonal_I.numel()
    order_I = activation_order(diagonal_I, group) if order == "activation" else torch.arange(width)
    mean = float(diagonal_I.double().mean())
    if mean == 0.0:  # nothing is known of the inputs: every column counts the same
        eye = torch.eye(width)
        return Factor(order_I, eye, eye)
    damp = percent_damp
    while damp <= MAX_DAMP:
        dampened_II = gram_II.clone()
        dampened_II.diagonal().add_(damp * mean)
        dampened_II.diagonal()[diagonal_I == 0] = max(damp, 1e-6) * mean
        # H = R R^T with R upper triangular, from the Cholesky factor of H read backwards; H^-1 = U^T U with U = R^-1
        reverse_I = order_I.flip(0)
        lower_II, info = torch.linalg.cholesky_ex(dampened_II[reverse_I][:, reverse_I].double())
        if int(info) == 0:
            right_II = lower_II.flip(0, 1)
            return Factor(order_I, _invert_upper(right_II).float().contiguous(), dampened_II)
        damp = max(10 * damp, 1e-6)
    raise NonFiniteError(
        f"layer {layer}", "the Gram matrix is not positive semi-definite", hint="use more calibration data"
    )


def _invert_upper(right_II: Tensor) -> Tensor:
    """Invert an upper triangular matrix by halves, [A B; 0 D]^-1 = [A^-1, -A^-1 B D^-1; 0, D^-1].

    Products do most of it; a solver, which does not know that the right-hand side is triangular too, takes three times
    as many operations.
    """
    width = right_II.shape[0]
    if width <= _INVERTED_AT_ONCE:
        inverse_II: Tensor = torch.linalg.solve_triangular(right_II, torch.eye(width, dtype=right_II.dtype), upper=True)
        return inverse_II
    half = width // 2
    inverse_II = torch.zeros_like(right_II)
    inverse_II[:half, :half] = _invert_upper(right_II[:half, :half])
    inverse_II[half:, half:] = _invert_upper(right_II[half:, half:])
    inverse_II[:half, half:] = -(inverse_II[:half, :half] @ right_II[:half, half:] @ inverse_II[half:, half:])
    return inverse_II


def activation_order(diagonal_I: Tensor, group: int) -> Tensor:
    """Columns by falling H_jj; with group > 1, whole groups by falling mean H_jj and by falling H_jj inside each."""
    width = diagonal_I.numel()
    if group == 1:
        return torch.argsort(diagonal_I, descending=True, stable=True)
    starts = torch.arange(0, width, group)
    means = torch.stack([diagonal_I[start : start + group].mean() for start in starts.tolist()])
    runs = []
    for start in starts[torch.argsort(means, descending=True, stable=True)].tolist():
        run = torch.argsort(diagonal_I[start : start + group], descending=True, stable=True)
        runs.append(run + start)
    return torch.cat(runs)


def group_spans(order_I: Tensor, group: int) -> list[tuple[int, int]]:
    """Where each group of `group` neighbouring columns stands in an order that keeps groups together."""
    group_I = (order_I // group).tolist()
    starts = [j for j in range(len(group_I)) if j == 0 or group_I[j] != group_I[j - 1]]
    return list(pairwise([*starts, len(group_I)]))


Choose = Callable[[int, FloatArray, BoolArray | None], BoolArray]
"""(start, cost_BO, present_BO) -> kept_BO: which entries of the columns from `start` on to keep, given what pruning
each costs and, if any were pruned before, which are still present."""


def sweep(
    weight_OI: FloatArray,
    present_OI: BoolArray | None,
    factor: Factor,
    *,
    spans: list[tuple[int, int]],
    block_size: int,
    choose: Choose | None,
    fitted: FittedGrid | None,
) -> tuple[FloatArray, BoolArray | None]:
    """Fix the columns of a layer one after another, in the order of the factor.

    Args:
        weight_OI: float32, W; not modified.
        present_OI: bool, False where an entry was pruned before and stays zero; None: all are present.
        factor: the factorized metric.
        spans: consecutive column ranges in the factor's order; the zeros of each are chosen when the sweep gets there.
        block_size: what lies beyond a block of about so many columns is updated at once, by a product (GPTQ step 2).
        choose: chooses the entries to keep; None: those that are present.
        fitted: the grid that the kept entries are rounded to, fitted before the sweep; None: any value.

    Returns:
        V and its mask (None if everything is kept).
    """
    order_I = factor.order_I.numpy()
    upper_II = factor.upper_II
    weight_IO = torch.from_numpy(np.ascontiguousarray(weight_OI.T[order_I]))
    present_IO = None if present_OI is None else np.ascontiguousarray(present_OI.T[order_I])
    kept_IO = present_IO if choose is None else np.empty(weight_IO.shape, dtype=np.bool_)
    grid = None if fitted is None else _ColumnGrid(fitted, factor.order_I)
    width, rows = weight_IO.shape
    for first, last, inner in _blocks(spans, block_size):
        error_BO = torch.empty(last - first, rows)
        for start, stop in inner:
            if choose is not None and kept_IO is not None:
                # SparseGPT equation 4
                cost_BO = (weight_IO[start:stop] / upper_II.diagonal()[start:stop, None]).square()
                present_BO = None if present_IO is None else present_IO[start:stop]
                kept_IO[start:stop] = choose(start, cost_BO.numpy(), present_BO)
            for left, right in _strips(start, stop):
                strip = slice(left, right)
                kept_SO = None if kept_IO is None else torch.from_numpy(kept_IO[strip]).float()
                error_SO = error_BO[left - first : right - first]
                _fix_strip(weight_IO[strip], error_SO, upper_II[strip, strip], kept_SO, grid, left)
                if right < last:
                    weight_IO[right:last].addmm_(upper_II[strip, right:last].T, error_SO, alpha=-1)
        if last < width:
            weight_IO[last:].addmm_(upper_II[first:last, last:].T, error_BO, alpha=-1)
    value_OI = np.empty_like(weight_OI)
    value_OI.T[order_I] = weight_IO.numpy()
    # a pruned negative weight leaves -0.0
    value_OI += np.float32(0)
    if kept_IO is None:
        return value_OI, None
    kept_OI = np.empty(weight_OI.shape, dtype=np.bool_)
    kept_OI.T[order_I] = kept_IO
    return value_OI, kept_OI


def _fix_strip(
    weight_SO: Tensor,
    error_SO: Tensor,
    upper_SS: Tensor,
    kept_SO: Tensor | None,
    grid: "_ColumnGrid | None",
    left: int,
) -> None:
    """Fix a few columns one by one, in place, and note for each (w_j - v_j) / U_jj, which the columns after it need."""
    inverse_diagonal = upper_SS.diagonal().reciprocal().tolist()
    for j in range(weight_SO.shape[0]):
        weight_O, error_O = weight_SO[j], error_SO[j]
        value_O = weight_O.clone() if grid is None else grid.round(left + j, weight_O)
        if kept_SO is not None:
            value_O.mul_(kept_SO[j])
        torch.sub(weight_O, value_O, out=error_O).mul_(inverse_diagonal[j])
        weight_O.copy_(value_O)
        weight_SO[j + 1 :].addr_(upper_SS[j, j + 1 :], error_O, alpha=-1)


def _strips(start: int, stop: int) -> list[tuple[int, int]]:
    return [(left, min(left + _STRIP, stop)) for left in range(start, stop, _STRIP)]


def _blocks(spans: list[tuple[int, int]], block_size: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Join consecutive spans to blocks of at least `block_size` columns (the last may be smaller)."""
    blocks: list[tuple[int, int, list[tuple[int, int]]]] = []
    inner: list[tuple[int, int]] = []
    for span in spans:
        inner.append(span)
        if inner[-1][1] - inner[0][0] >= block_size:
            blocks.append((inner[0][0], inner[-1][1], inner))
            inner = []
    if inner:
        blocks.append((inner[0][0], inner[-1][1], inner))
    return blocks


@final
class _ColumnGrid:
    """Rounds one column of the sweep at a time to a fitted grid ("static groups": fitted before the sweep).

    Args:
        fitted: the grid of the layer.
        order_I: the order of the sweep.
    """

    def __init__(self, fitted: FittedGrid, order_I: Tensor) -> None:
        size = fitted.grid.group_size
        self.group_I = [0] * order_I.numel() if size is None else (order_I // size).tolist()
        self.scale_GO = torch.from_numpy(np.ascontiguousarray(fitted.scale_OG.T))
        zero_GO = torch.from_numpy(np.ascontiguousarray(fitted.zero_point_OG.T)).float()
        self.low_GO = -zero_GO
        self.high_GO = fitted.grid.max_code - zero_GO

    def round(self, column: int, weight_O: Tensor) -> Tensor:
        """Return the nearest grid points, exactly as core.grids computes them."""
        group = self.group_I[column]
        value_O = weight_O / self.scale_GO[group]
        value_O.round_()
        torch.clamp(value_O, self.low_GO[group], self.high_GO[group], out=value_O)
        return value_O.mul_(self.scale_GO[group])
