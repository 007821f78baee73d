"""Least squares on a fixed mask: the values that the kept entries should have. Shape suffixes: O out, I in.

Column-wise OBS makes up for a pruned entry only with entries to its right, so its values are not the best ones for the
mask that it ends with. For every row, min (w - v) H (w - v)^T over the kept entries of v is a linear system in H
restricted to them; preconditioned conjugate gradients solve all rows at once, each step being one product with H.
"""

import torch
from torch import Tensor

from rarefy.calibrate.statistics import bfloat16_products


def refit(weight_OI: Tensor, start_OI: Tensor, kept_OI: Tensor, gram_II: Tensor, num_steps: int) -> Tensor:
    """Improve the kept values by conjugate gradients with a Jacobi preconditioner.

    Args:
        weight_OI: float32, W.
        start_OI: float32, V to start from, zero where not kept.
        kept_OI: bool.
        gram_II: float32 (I, I), H, with a positive diagonal.
        num_steps: steps; the error falls from one to the next, up to the rounding of the products.

    Returns:
        float32 (O, I), zero where not kept.

    Notes:
        The residual at the start is exact; the products of the steps go through the CPU's bfloat16 unit where it has
        one, several times faster. That leaves 0.3 % more error after 8 steps on SmolLM2-135M, of which the steps take
        20 % off.

    References:
        Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models,
        arXiv:2406.07831, section 3.2 (the same system after its own choice of a mask).
    """
    if num_steps == 0:
        return start_OI
    # In units in which every diagonal entry of H is 1, the Jacobi preconditioner is the identity.
    unit_I = gram_II.diagonal().sqrt()
    scaled_II = gram_II / unit_I / unit_I[:, None]
    kept = kept_OI.to(torch.float32)
    tiny = torch.finfo(torch.float32).tiny
    correction_OI = torch.zeros_like(start_OI)
    residual_OI = (weight_OI - start_OI).mul_(unit_I).mm(scaled_II).mul_(kept)
    direction_OI = residual_OI.clone()
    energy_O = torch.linalg.vecdot(residual_OI, residual_OI)
    for step in range(num_steps):
        with bfloat16_products(True):
            image_OI = direction_OI @ scaled_II
        image_OI.mul_(kept)
        length_O = energy_O / torch.linalg.vecdot(direction_OI, image_OI).clamp_(min=tiny)
        correction_OI.addcmul_(direction_OI, length_O[:, None])
        if step + 1 == num_steps:
            break
        residual_OI.addcmul_(image_OI, length_O[:, None], value=-1)
        new_energy_O = torch.linalg.vecdot(residual_OI, residual_OI)
        direction_OI.mul_((new_energy_O / energy_O.clamp(min=tiny))[:, None]).add_(residual_OI)
        energy_O = new_energy_O
    return start_OI + correction_OI / unit_I
