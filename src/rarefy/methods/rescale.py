"""Norm correction: one factor for each output. Shape suffixes: O out, I in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from rarefy.calibrate.statistics import Gram, Statistic
from rarefy.core.solution import Solution
from rarefy.methods.base import check_finite_weight, check_hyperparameters, finite_statistic


@final
@dataclass(frozen=True)
class Rescale:
    """Multiply each row by the number that brings its outputs closest to those of the weights before all steps.

        s_o = w_o H v_o^T / v_o H v_o^T

    References:
        Banner et al., Post training 4-bit quantization of convolutional networks for rapid-deployment,
        arXiv:1810.05723, section 3.3 (a factor for each channel that restores its norm).

    Notes:
        The paper restores the norm of the row, and its mean; here the factor is the least-squares one in the metric of
        the inputs. A matrix on a grid stays as it is, for its scales belong to the grid; so do factors.
    """

    paper: ClassVar[str] = "arXiv:1810.05723"

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """The second moments of the inputs, H."""
        return (Gram(),)

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Correct one layer; see `LayerMethod.compress`."""
        weight_OI = solution.weight_OI
        check_finite_weight(weight_OI, layer)
        width = weight_OI.shape[1]
        gram_II = finite_statistic(stats, Gram(), (width, width), layer)
        if solution.grid is not None or solution.only_factors:
            return solution
        target_OI = solution.target_OI
        check_finite_weight(target_OI, layer)
        weight = torch.from_numpy(weight_OI)
        image_OI = weight @ gram_II
        size_O = torch.linalg.vecdot(image_OI, weight)
        scale_O = torch.linalg.vecdot(image_OI, torch.from_numpy(target_OI)) / size_O.clamp(min=1e-30)
        value = weight * torch.where(size_O > 0, scale_O, 1)[:, None]
        return solution.with_matrix(value.numpy(), solution.mask_OI, solution.pattern, None)
