"""Splits into low rank and sparse: recovery of what was planted, and the papers' limiting cases.

Shape suffixes: O out, I in, K rank.
"""

import numpy as np
import pytest
import torch
from tests.papers.test_identities import problem, row_losses, stats

from rarefy.calibrate.statistics import SquaredNorm
from rarefy.core.grids import IntGrid
from rarefy.core.patterns import Unstructured
from rarefy.core.ranks import Rank
from rarefy.core.solution import Solution
from rarefy.methods import OATS, RTN, SVD, Refit, RobustPCA, Wanda
from rarefy.methods.lowrank.robust_pca import principal_components


def planted(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A matrix of rank 2 and 5 % of large entries."""
    rng = np.random.default_rng(seed)
    low_OI = rng.normal(size=(40, 2)) @ rng.normal(size=(2, 60))
    sparse_OI = np.where(rng.random((40, 60)) < 0.05, rng.normal(size=(40, 60)) * 10, 0)
    return (low_OI + sparse_OI).astype(np.float32), low_OI, sparse_OI


@pytest.mark.parametrize("seed", range(3))
def test_robust_pca_recovers_what_was_planted(seed: int) -> None:
    """Theorem 1.1: exact recovery, where low rank and few errors are spread out."""
    weight_OI, low_OI, sparse_OI = planted(seed)
    low, sparse = principal_components(torch.from_numpy(weight_OI), 100, 1e-6)
    np.testing.assert_allclose(low.numpy(), low_OI, atol=1e-2)
    np.testing.assert_allclose(sparse.numpy(), sparse_OI, atol=1e-2)
    density = float((sparse_OI != 0).mean())
    method = RobustPCA(Rank(count=2), Unstructured(1 - density))
    result = method.compress(Solution.dense(weight_OI), {}, layer="x")
    np.testing.assert_allclose(result.value_OI, weight_OI, atol=2e-2)
    plain = SVD(Rank(count=2)).compress(Solution.dense(weight_OI), {}, layer="x")
    assert np.abs(plain.value_OI - weight_OI).max() > 2


def test_robust_pca_satisfies_the_optimality_conditions() -> None:
    """Of both norms at once: one matrix Y is a subgradient of ||L||_* and of lambda ||S||_1 (section 2.2)."""
    weight_OI, _, _ = planted(7)
    low, sparse = (m.double().numpy() for m in principal_components(torch.from_numpy(weight_OI), 100, 1e-6))
    share = 1 / 60**0.5
    left, singular, right = np.linalg.svd(low)
    rank = int((singular > 1e-3 * singular[0]).sum())
    # the best Y by alternating projections on the two sets of subgradients
    dual = left[:, :rank] @ right[:rank]
    on = np.abs(sparse) > 1e-3
    for _ in range(300):
        dual = np.where(on, share * np.sign(sparse), np.clip(dual, -share, share))
        base = left[:, :rank] @ right[:rank]
        rest = (np.eye(40) - left[:, :rank] @ left[:, :rank].T) @ dual @ (np.eye(60) - right[:rank].T @ right[:rank])
        u, s, v = np.linalg.svd(rest, full_matrices=False)
        dual = base + u * np.minimum(s, 1) @ v
    violation = np.abs(dual - np.where(on, share * np.sign(sparse), np.clip(dual, -share, share))).max()
    assert violation < 1e-3


def test_oats_comes_close_to_what_was_planted() -> None:
    weight_OI, _, sparse_OI = planted(3)
    density = float((sparse_OI != 0).sum(axis=1).max() / 60)  # rows keep equally many
    one = {SquaredNorm(): torch.ones(60)}
    result = OATS(Rank(count=2), Unstructured(1 - density)).compress(Solution.dense(weight_OI), one, layer="x")
    plain = SVD(Rank(count=2)).compress(Solution.dense(weight_OI), {}, layer="x")
    size = np.linalg.norm(weight_OI)
    assert np.linalg.norm(result.value_OI - weight_OI) < 0.01 * size
    assert np.linalg.norm(plain.value_OI - weight_OI) > 0.3 * size


def test_alternating_never_loses_to_one_after_the_other() -> None:
    weight_OI, gram_II = problem(32, 48, 4)
    given = stats(gram_II)
    size_I = np.sqrt(np.diag(gram_II))
    rank, pattern = Rank(count=4), Unstructured(0.75)
    split = OATS(rank, pattern).compress(Solution.dense(weight_OI), given, layer="x")
    kept = SVD(rank, remainder="keep").compress(Solution.dense(weight_OI * size_I.astype(np.float32)), {}, layer="x")
    one = {SquaredNorm(): torch.ones(48)}
    after = Wanda(pattern).compress(kept, one, layer="x")
    losses = [
        np.square((weight_OI - split.value_OI) * size_I).sum(),
        np.square(weight_OI * size_I - after.value_OI).sum(),
    ]
    assert losses[0] < losses[1]


def test_fitting_the_sparse_part_afterwards_lowers_the_error_in_the_outputs() -> None:
    weight_OI, gram_II = problem(32, 48, 5)
    split = OATS(Rank(count=4), Unstructured(0.7)).compress(Solution.dense(weight_OI), stats(gram_II), layer="x")
    fitted = Refit().compress(split, stats(gram_II), layer="x")
    assert fitted.factors is split.factors
    np.testing.assert_array_equal(fitted.mask_OI, split.mask_OI)
    losses = [row_losses(weight_OI, solution.value_OI, gram_II).sum() for solution in (split, fitted)]
    assert losses[1] < 0.9 * losses[0]


def test_a_sparse_part_on_a_grid_keeps_its_values() -> None:
    weight_OI, gram_II = problem(16, 64, 6)
    rounded = RTN(IntGrid(4, 32, False)).compress(Solution.dense(weight_OI), {}, layer="x")
    for method in (OATS(Rank(count=4), Unstructured(0.5)), RobustPCA(Rank(count=4), Unstructured(0.5))):
        result = method.compress(rounded, stats(gram_II), layer="x")
        result.check()
        assert result.mask_OI is not None
        np.testing.assert_array_equal(result.weight_OI, np.where(result.mask_OI, rounded.weight_OI, 0))
        alone = row_losses(weight_OI, result.weight_OI, gram_II).sum()
        assert row_losses(weight_OI, result.value_OI, gram_II).sum() < alone
