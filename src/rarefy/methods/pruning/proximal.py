"""Zeros by a penalty on the layer's reconstruction. Shape suffixes: O out, I in, R, C rows and columns of blocks.

    minimise 1/2 tr (W - V) H (W - V)^T + lambda sum_g sqrt(size_g) ||V_g||_2

where a group g is one entry (LASSO) or one block (group LASSO), in units in which the diagonal of H is 1. Solved by
accelerated proximal gradients (FISTA: Beck and Teboulle, SIAM J. Imaging Sciences 2 (2009), equations 4.1 to 4.3).
"""

import numpy as np
import torch
from torch import Tensor

from rarefy.core.patterns import Blocks
from rarefy.methods.masks import BoolArray, keep_highest

_POWER_STEPS = 30


def penalized(
    target_OI: Tensor, gram_II: Tensor, blocks: Blocks, present_OI: BoolArray | None, num_steps: int
) -> tuple[Tensor, BoolArray, float]:
    """Solve the problem for the lambda that leaves as many groups as the pattern keeps.

    That lambda is not known before; each step takes the one that leaves so many groups of what the gradient step gives.
    Where the iterations stand still, it and V solve the problem together.

    Args:
        target_OI: float32, W in units of H.
        gram_II: float32 (I, I), H with a diagonal of 1.
        blocks: the groups, and the fraction that becomes zero.
        present_OI: bool, False where an entry was pruned earlier and stays zero; None: all are present.
        num_steps: iterations.

    Returns:
        V, the groups kept as a mask of entries, and lambda.
    """
    grid = blocks.grid_shape((target_OI.shape[0], target_OI.shape[1]))
    present = None if present_OI is None else torch.from_numpy(present_OI)
    step_size = 1 / _largest_eigenvalue(gram_II)
    num_keep = grid[0] * grid[1] - round(blocks.sparsity * grid[0] * grid[1])
    root_RC = _sum(torch.ones_like(target_OI), blocks).sqrt()
    value_OI = target_OI if present is None else target_OI * present
    point_OI = value_OI.clone()
    momentum, threshold = 1.0, 0.0
    norm_RC = root_RC
    for _ in range(num_steps):
        moved_OI = torch.addmm(point_OI, point_OI - target_OI, gram_II, alpha=-step_size)
        if present is not None:
            moved_OI *= present
        norm_RC = _norms(moved_OI, blocks, root_RC)
        threshold = _highest_pruned(norm_RC, num_keep)
        new_OI = _shrink(moved_OI, norm_RC, threshold, blocks)  # the proximal step
        next_momentum = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        torch.lerp(value_OI, new_OI, 1 + (momentum - 1) / next_momentum, out=point_OI)
        value_OI, momentum = new_OI, next_momentum
    kept_RC = torch.from_numpy(keep_highest(norm_RC.numpy().reshape(1, -1), num_keep).reshape(grid))
    kept_OI: BoolArray = _spread(kept_RC, blocks, target_OI.shape).numpy()
    if present_OI is not None:
        kept_OI = kept_OI & present_OI
    return value_OI, np.ascontiguousarray(kept_OI), threshold / step_size


def _highest_pruned(norm_RC: Tensor, num_keep: int) -> float:
    """The largest norm among the groups that are not among the `num_keep` largest."""
    last = norm_RC.numel() - num_keep - 1
    return 0.0 if last < 0 else float(np.partition(norm_RC.numpy(), last, axis=None)[last])


def _norms(value_OI: Tensor, blocks: Blocks, root_RC: Tensor) -> Tensor:
    """Norms of groups over the roots of their sizes, (R, C)."""
    return value_OI.abs() if blocks.block_shape == (1, 1) else _sum(value_OI.square(), blocks).sqrt_() / root_RC


def _shrink(value_OI: Tensor, norm_RC: Tensor, threshold: float, blocks: Blocks) -> Tensor:
    """Take the threshold off the norm of every group, down to zero."""
    if blocks.block_shape == (1, 1):
        return torch.nn.functional.softshrink(value_OI, threshold)
    share_RC = torch.where(norm_RC > threshold, 1 - threshold / norm_RC.clamp(min=1e-38), 0)
    return value_OI * _spread(share_RC, blocks, value_OI.shape)


def _largest_eigenvalue(gram_II: Tensor) -> float:
    """An upper estimate by power iteration from a fixed start; the trace bounds it."""
    vector_I = torch.ones(gram_II.shape[0])
    for _ in range(_POWER_STEPS):
        vector_I = gram_II @ vector_I
        vector_I /= torch.linalg.vector_norm(vector_I).clamp(min=1e-38)
    return min(1.05 * float(torch.linalg.vector_norm(gram_II @ vector_I)), float(gram_II.diagonal().sum()))


def _sum(value_OI: Tensor, blocks: Blocks) -> Tensor:
    """Sums over blocks, (R, C)."""
    rows, columns = blocks.block_shape
    if (rows, columns) == (1, 1):
        return value_OI
    height, width = value_OI.shape
    padded = torch.nn.functional.pad(value_OI, (0, -width % columns, 0, -height % rows))
    return padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns).sum(dim=(1, 3))


def _spread(value_RC: Tensor, blocks: Blocks, shape: torch.Size) -> Tensor:
    """Each block's value at each of its entries, (O, I)."""
    rows, columns = blocks.block_shape
    if (rows, columns) == (1, 1):
        return value_RC
    return value_RC.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]
