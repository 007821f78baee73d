"""Saliencies against their formulas in plain loops, and least squares on a mask. Shape suffixes: O out, I in."""

import numpy as np
import torch
from tests.papers.test_identities import least_squares, problem, row_losses, stats

from rarefy.calibrate.statistics import SquaredNorm
from rarefy.core.patterns import NM, Lines, Unstructured
from rarefy.core.solution import Solution
from rarefy.methods import RIA, Magnitude, Random, Refit, SparseGPT, Wanda


def test_ria_is_equation_4() -> None:
    weight_OI, gram_II = problem(6, 20, 0)
    result = RIA(Unstructured(0.5)).compress(Solution.dense(weight_OI), stats(gram_II), layer="x")
    score = {}
    for o in range(6):
        for i in range(20):
            size = abs(float(weight_OI[o, i]))
            column, row = np.abs(weight_OI[:, i]).sum(), np.abs(weight_OI[o]).sum()
            score[o, i] = (size / column + size / row) * gram_II[i, i] ** 0.25  # the root of the norm
    kept = sorted(score, key=lambda place: -score[place])[:60]
    assert result.mask_OI is not None
    assert {(int(o), int(i)) for o, i in np.argwhere(result.mask_OI)} == set(kept)


def test_ria_spares_rows_and_columns_that_are_small_as_a_whole() -> None:
    weight_OI, _ = problem(16, 16, 3)
    weight_OI[3] *= 0.01
    weight_OI[:, 5] *= 0.01
    one = {SquaredNorm(): torch.ones(16)}
    relative = RIA(Unstructured(0.5), power=0).compress(Solution.dense(weight_OI), one, layer="x")
    plain = Magnitude(Unstructured(0.5)).compress(Solution.dense(weight_OI), {}, layer="x")
    assert relative.mask_OI is not None
    assert plain.mask_OI is not None
    for part in (np.s_[3], np.s_[:, 5]):
        assert relative.mask_OI[part].any()
        assert not plain.mask_OI[part].any()


def test_rows_go_by_either_norm() -> None:
    weight_OI = np.full((4, 8), 0.5, dtype=np.float32)
    weight_OI[1] = 0
    weight_OI[1, 0] = 3  # |w| sums to 3 and w^2 to 9, in the other rows to 4 and 2
    kept = {}
    for norm in ("l1", "l2"):
        result = Magnitude(Lines("rows", 0.25), norm=norm).compress(Solution.dense(weight_OI), {}, layer="x")
        assert result.mask_OI is not None
        kept[norm] = result.mask_OI.any(axis=1)
    assert not kept["l1"][1]
    assert kept["l2"][1]


def test_chance_differs_by_layer_and_seed_and_repeats() -> None:
    weight_OI, _ = problem(20, 64, 1)

    def mask(seed: int, layer: str) -> np.ndarray:
        result = Random(NM(2, 4), seed).compress(Solution.dense(weight_OI), {}, layer=layer)
        assert result.mask_OI is not None
        return result.mask_OI

    assert np.array_equal(mask(0, "a"), mask(0, "a"))
    assert not np.array_equal(mask(0, "a"), mask(1, "a"))
    assert not np.array_equal(mask(0, "a"), mask(0, "b"))
    # every place is as likely as any other: 320 groups, so that 160 is 10 standard deviations from 70 or 250
    assert (np.abs(mask(0, "a").reshape(-1, 4).sum(axis=0) - 160) < 70).all()


def test_refit_is_least_squares_on_the_mask_for_the_weights_as_they_were() -> None:
    weight_OI, gram_II = problem(12, 48, 2)
    for first in (Wanda(Unstructured(0.6)), SparseGPT(NM(2, 4), refit_steps=0)):
        before = first.compress(Solution.dense(weight_OI), stats(gram_II), layer="x")
        after = Refit(num_steps=100, percent_damp=0).compress(before, stats(gram_II), layer="x")
        np.testing.assert_array_equal(after.mask_OI, before.mask_OI)
        assert after.mask_OI is not None
        best = row_losses(weight_OI, least_squares(weight_OI, after.mask_OI, gram_II), gram_II)
        found = row_losses(weight_OI, after.weight_OI, gram_II)
        assert (found <= best * (1 + 1e-3)).all()
        assert found.sum() < 0.9 * row_losses(weight_OI, before.weight_OI, gram_II).sum()
    dense = Solution.dense(weight_OI)
    assert Refit().compress(dense, stats(gram_II), layer="x") is dense


def test_sparsegpts_saliency_is_the_error_of_dropping_one_weight_and_fitting_the_others_of_its_row() -> None:
    weight_OI, gram_II = problem(3, 9, 4)
    method = SparseGPT(Unstructured(0.5), percent_damp=0)
    score_OI = method.saliency(weight_OI, stats(gram_II), layer="x")
    for o in range(3):
        for i in range(9):
            kept_OI = np.ones((1, 9), dtype=bool)
            kept_OI[0, i] = False
            best_OI = least_squares(weight_OI[o : o + 1], kept_OI, gram_II)
            loss = row_losses(weight_OI[o : o + 1], best_OI, gram_II)[0]
            assert np.isclose(score_OI[o, i], loss, rtol=1e-3)
