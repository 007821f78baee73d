"""How close a solution is to the weight, for reports. Shape suffixes: O out, I in, G groups of rows."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rarefy.calibrate.statistics import Gram, Statistic
from rarefy.core.results import ErrorMetric


def relative_error(
    weight_OI: Tensor, solution_OI: Tensor, stats: Mapping[Statistic, Tensor], num_groups: int = 1
) -> tuple[float, ErrorMetric]:
    """How far V is from W: relative to the layer's outputs where the Gram matrix is known, else to its weights.

    Args:
        weight_OI: W.
        solution_OI: V.
        stats: of the inputs; where there are several groups, one of each along a first axis.
        num_groups: so many parts of the rows, of equal size, meet inputs of their own.

    Returns:
        ||(W - V) X||_F^2 / ||W X||_F^2 and "output", or ||W - V||_F^2 / ||W||_F^2 and "weight"; 0 where W X is 0.
    """
    difference_OI = weight_OI - solution_OI
    gram = stats.get(Gram())
    if gram is None:
        error = float(difference_OI.square().sum(dtype=torch.float64))
        size = float(weight_OI.square().sum(dtype=torch.float64))
        return (error / size if size > 0 else 0.0), "weight"
    grams_GII = gram.reshape(num_groups, *gram.shape[-2:])
    error, size = (
        sum(
            float(torch.dot((part_OI @ gram_II).flatten(), part_OI.flatten()))
            for part_OI, gram_II in zip(matrix_OI.chunk(num_groups), grams_GII, strict=True)
        )
        for matrix_OI in (difference_OI, weight_OI)
    )
    return (max(0.0, error) / size if size > 0 else 0.0), "output"
