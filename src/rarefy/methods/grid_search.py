"""Fitting an integer grid to a layer: the full range, or the range that loses least.

Shape suffixes: O out, I in, G groups, S columns of a group.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rarefy.core.errors import PatternError
from rarefy.core.grids import FittedGrid, Float32Array, IntGrid, fit_minmax

Search = Literal["minmax", "error"]

# How far the range is narrowed: a 4-bit group of Gaussian weights loses least near 0.85 of its full range.
_FACTORS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64, 0.6)
# Fewer codes pay for a finer step with more clipping: the four of 2 bits lose least at +-1.5 standard deviations, which
# is 0.4 of the full range of a row of thousands.
_LOW_BIT_FACTORS = (*_FACTORS, 0.56, 0.52, 0.48, 0.44, 0.4, 0.36, 0.32)


def fit_grid(weight_OI: Float32Array, grid: IntGrid, search: Search, importance_I: Tensor | None = None) -> FittedGrid:
    """Choose scales and zero points for a layer.

    Args:
        weight_OI: float32 (O, I), finite; pruned entries are 0 and on every grid.
        grid: the specification.
        search: "minmax" covers the full range; "error" tries narrower ranges for every group and keeps the one with the
            least sum of importance_i (w_oi - q_oi)^2.
        importance_I: float32 (I,), not negative; None: all columns count the same.

    Returns:
        The fitted grid.
    """
    full = fit_minmax(weight_OI, grid)
    if search == "minmax" or weight_OI.size == 0:
        return full
    grouped_OGS, importance_GS = _in_groups(weight_OI, grid, importance_I)
    rows, num_groups, _ = grouped_OGS.shape
    ends = torch.stack([grouped_OGS.amin(dim=2), grouped_OGS.amax(dim=2)], dim=2).reshape(-1, 2).numpy()
    per_row = IntGrid(grid.num_bits, None, grid.symmetric)
    best_error = torch.full((rows, num_groups), torch.inf)
    scale = torch.from_numpy(full.scale_OG).clone()
    zero = torch.from_numpy(full.zero_point_OG).clone()
    for factor in _FACTORS if grid.num_bits >= 4 else _LOW_BIT_FACTORS:
        narrow = fit_minmax((ends * np.float32(factor)).astype(np.float32), per_row)
        scale_OG = torch.from_numpy(narrow.scale_OG).reshape(rows, num_groups)
        zero_OG = torch.from_numpy(narrow.zero_point_OG).reshape(rows, num_groups)
        code = torch.div(grouped_OGS, scale_OG[:, :, None]).round_()
        offset = zero_OG.float()[:, :, None]
        torch.clamp(code, -offset, grid.max_code - offset, out=code)
        error = code.mul_(scale_OG[:, :, None]).sub_(grouped_OGS).square_().mul_(importance_GS).sum(dim=2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        scale = torch.where(better, scale_OG, scale)
        zero = torch.where(better, zero_OG, zero)
    return FittedGrid(grid, scale.contiguous().numpy(), zero.contiguous().numpy())


def _in_groups(weight_OI: Float32Array, grid: IntGrid, importance_I: Tensor | None) -> tuple[Tensor, Tensor]:
    """Reshape to (O, G, S); a shorter last group is filled up with zeros of no importance."""
    rows, width = weight_OI.shape
    num_groups = grid.num_groups(width)
    size = width if grid.group_size is None else grid.group_size
    weight = torch.from_numpy(weight_OI)
    importance = torch.ones(width) if importance_I is None else importance_I.to(torch.float32)
    missing = num_groups * size - width
    if missing:
        weight = torch.nn.functional.pad(weight, (0, missing))
        importance = torch.nn.functional.pad(importance, (0, missing))
    return weight.reshape(rows, num_groups, size), importance.reshape(num_groups, size)


def same_grid(earlier: FittedGrid, wanted: IntGrid, layer: str) -> FittedGrid:
    """Return the grid that is there already, if it is the one wanted.

    Raises:
        PatternError: an earlier step put the layer on another grid, which must stay.
    """
    if earlier.grid != wanted:
        raise PatternError(
            f"layer {layer}",
            f"an earlier step put it on {describe(earlier.grid)}, this one asks for {describe(wanted)}",
            hint="a grid stays a grid: exclude the layer in one of the two steps",
        )
    return earlier


def describe(grid: IntGrid) -> str:
    """Say a grid in words."""
    group = "per channel" if grid.group_size is None else f"group {grid.group_size}"
    return f"int{grid.num_bits} {group} {'symmetric' if grid.symmetric else 'asymmetric'}"
