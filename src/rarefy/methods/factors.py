"""What methods do to the factors of a matrix. Shape suffixes: O out, I in, K rank."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from rarefy.calibrate.statistics import Gram, Statistic
from rarefy.core.errors import NonFiniteError, PatternError
from rarefy.core.grids import IntGrid
from rarefy.core.solution import Factors, Solution
from rarefy.core.tap_factors import TapFactors
from rarefy.methods.base import LayerMethod
from rarefy.methods.grid_search import same_grid


def quantize_factors(
    method: LayerMethod, values: IntGrid, solution: Solution, stats: Mapping[Statistic, Tensor], layer: str
) -> Solution:
    """Round both factors of a solution that has nothing else, the right one first.

    The inputs X of the layer are those of the right factor; the left one is given R X, whose second moment is R H R^T.

    Args:
        method: rounds a matrix to `values`.
        values: the grid.
        solution: with factors only.
        stats: of the layer's inputs.
        layer: the name for error messages.

    Raises:
        NonFiniteError: a factor is NaN or infinite.
        PatternError: an earlier step put the factors on another grid, or no layout stores these factors on this one.
    """
    factors = solution.factors
    if isinstance(factors, TapFactors):
        raise PatternError(
            f"layer {layer}",
            "factors of a convolution's taps, which are stored in bfloat16",
            hint="exclude it in one of the two steps",
        )
    assert factors is not None
    check_finite_factors(factors, layer)
    if values.num_bits != 8:
        raise PatternError(
            f"layer {layer}",
            f"factors in {values.num_bits} bits",
            allowed="8",
            hint="exclude it in one of the two steps",
        )
    if factors.right_grid is not None:
        same_grid(factors.right_grid, values, layer)
        return solution
    right = method.compress(Solution.dense(factors.right_KI), stats, layer=layer)
    left_stats: dict[Statistic, Tensor] = {}
    gram_II = stats.get(Gram())
    if gram_II is not None:
        right_KI = torch.from_numpy(right.weight_OI)
        left_stats[Gram()] = right_KI @ gram_II @ right_KI.T
    left = method.compress(Solution.dense(factors.left_OK), left_stats, layer=layer)
    rounded = Factors(left.weight_OI, right.weight_OI, left.grid, right.grid)
    return dataclasses.replace(solution, factors=rounded)


def check_finite_factors(factors: Factors | TapFactors, layer: str) -> None:
    """Refuse factors with NaN or infinity.

    Raises:
        NonFiniteError: naming the layer.
    """
    for factor in factors.parts:
        if not bool(torch.from_numpy(factor).isfinite().all()):
            raise NonFiniteError(f"layer {layer}", "a factor is NaN or infinite", hint="the input model is damaged")
