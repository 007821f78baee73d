"""ALPS against an exhaustive search, least squares and its paper's limiting cases. Shape suffixes: O out, I in."""

from itertools import combinations

import numpy as np
import pytest
from tests.papers.test_identities import least_squares, problem, row_losses, stats

from rarefy.core.grids import IntGrid
from rarefy.core.patterns import NM, Blocks, Pattern, Unstructured
from rarefy.core.solution import Solution
from rarefy.methods import ALPS, RTN, SparseGPT


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(4, 8)])
def test_the_mask_is_close_to_the_best_there_is(pattern: Pattern) -> None:
    ratios, obs_ratios = [], []
    for seed in range(12):
        weight_OI, gram_II = problem(1, 8, 100 + seed)
        best = np.inf
        for kept in combinations(range(8), 4):
            kept_OI = np.zeros((1, 8), dtype=bool)
            kept_OI[0, list(kept)] = True
            best = min(best, row_losses(weight_OI, least_squares(weight_OI, kept_OI, gram_II), gram_II)[0])
        found = []
        for method in (ALPS(pattern, percent_damp=0, refit_steps=50), SparseGPT(pattern, percent_damp=0)):
            result = method.compress(Solution.dense(weight_OI), stats(gram_II), layer="x")
            found.append(row_losses(weight_OI, result.weight_OI, gram_II)[0] / best)
        assert found[0] >= 1 - 1e-3
        ratios.append(found[0])
        obs_ratios.append(found[1])
    assert np.median(ratios) < 1.05
    assert np.mean(ratios) < np.mean(obs_ratios)


@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4), NM(3, 8), Blocks((2, 4), 0.5)])
def test_values_are_the_least_squares_on_the_mask_and_beat_the_sweep(pattern: Pattern) -> None:
    weight_OI, gram_II = problem(24, 64, 1)
    losses = []
    for method in (ALPS(pattern, percent_damp=0, refit_steps=60), SparseGPT(pattern, percent_damp=0, refit_steps=60)):
        result = method.compress(Solution.dense(weight_OI), stats(gram_II), layer="x")
        assert result.mask_OI is not None
        losses.append(row_losses(weight_OI, result.weight_OI, gram_II))
        if isinstance(method, ALPS):
            best = row_losses(weight_OI, least_squares(weight_OI, result.mask_OI, gram_II), gram_II)
            assert (losses[0] <= best * (1 + 2e-3)).all()
            assert (losses[0] >= best * (1 - 1e-3)).all()
    assert losses[0].sum() < 0.97 * losses[1].sum()


def test_with_a_diagonal_gram_matrix_it_is_the_threshold() -> None:
    """With rho > 1: what is pruned then counts less than what is kept, as V / rho tends to W / rho."""
    weight_OI, gram_II = problem(6, 40, 2)
    diagonal = np.diag(gram_II)
    result = ALPS(Unstructured(0.5), percent_damp=0, rho=2.0).compress(
        Solution.dense(weight_OI), stats(np.diag(diagonal)), layer="x"
    )
    score_OI = np.abs(weight_OI) * np.sqrt(diagonal)
    expected = score_OI > np.median(score_OI)
    np.testing.assert_array_equal(result.mask_OI, expected)
    np.testing.assert_allclose(result.weight_OI, np.where(expected, weight_OI, 0), rtol=1e-5)


def test_a_layer_on_a_grid_stays_there_and_loses_less_than_by_zeros_alone() -> None:
    weight_OI, gram_II = problem(16, 64, 3)
    rounded = RTN(IntGrid(8, 32, False)).compress(Solution.dense(weight_OI), {}, layer="x")
    result = ALPS(Unstructured(0.5)).compress(rounded, stats(gram_II), layer="x")
    result.check()
    assert result.grid is rounded.grid
    assert result.mask_OI is not None
    assert result.mask_OI.mean() == 0.5
    dropped = np.where(result.mask_OI, rounded.weight_OI, 0)
    losses = [row_losses(weight_OI, value, gram_II).sum() for value in (result.weight_OI, dropped)]
    assert losses[0] < 0.9 * losses[1]
