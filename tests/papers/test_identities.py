"""What the papers say must hold, against oracles in float64 that share no code with the solvers.

Shape suffixes: O out, I in.
"""

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rarefy.calibrate.statistics import Gram, SquaredNorm
from rarefy.core.grids import IntGrid, dequantize, fit_minmax, quantize
from rarefy.core.patterns import NM, Pattern, Unstructured
from rarefy.core.solution import Solution
from rarefy.methods import GPTQ, RTN, SparseGPT, Wanda
from rarefy.methods.obs import factorize, sweep

Array = npt.NDArray[np.float64]


def problem(rows: int, width: int, seed: int) -> tuple[npt.NDArray[np.float32], Array]:
    """A weight, and a well-conditioned Gram matrix of correlated inputs."""
    rng = np.random.default_rng(seed)
    weight_OI = rng.normal(size=(rows, width)).astype(np.float32)
    x_TI = rng.normal(size=(4 * width, width)) @ (np.eye(width) + 0.5 * rng.normal(size=(width, width)) / width**0.5)
    x_TI *= np.exp(rng.normal(size=width) * 0.7)
    gram_II = (x_TI.T @ x_TI / len(x_TI)).astype(np.float32)
    return weight_OI, gram_II.astype(np.float64)


def stats(gram_II: Array) -> dict[object, torch.Tensor]:
    gram = torch.from_numpy(gram_II.astype(np.float32))
    return {Gram(): gram, SquaredNorm(): gram.diagonal().clone()}


def row_losses(weight_OI: npt.NDArray[np.floating], value_OI: npt.NDArray[np.floating], gram_II: Array) -> Array:
    difference_OI = weight_OI.astype(np.float64) - value_OI.astype(np.float64)
    return np.einsum("oi,ij,oj->o", difference_OI, gram_II, difference_OI)


def least_squares(weight_OI: npt.NDArray[np.float32], kept_OI: npt.NDArray[np.bool_], gram_II: Array) -> Array:
    """The best values on a mask: for each row, solve H_kk v_k = (H w)_k."""
    value_OI = np.zeros(weight_OI.shape)
    for row, (weight_I, kept_I) in enumerate(zip(weight_OI.astype(np.float64), kept_OI, strict=True)):
        k = np.flatnonzero(kept_I)
        value_OI[row, k] = np.linalg.solve(gram_II[np.ix_(k, k)], gram_II[k] @ weight_I)
    return value_OI


def naive_obs(weight_I: Array, gram_II: Array, order: list[int], fix: dict[int, float | None]) -> Array:
    """Column-wise OBS on one row as the papers write it, with a fresh inverse of the free part at each step."""
    weight_I = weight_I.copy()
    for place, j in enumerate(order):
        free = order[place:]
        inverse = np.linalg.inv(gram_II[np.ix_(free, free)])
        target = fix[j] if fix[j] is not None else weight_I[j]
        weight_I[free] -= (weight_I[j] - target) / inverse[0, 0] * inverse[:, 0]
        weight_I[j] = target
    return weight_I


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4), NM(3, 8)])
def test_obs_with_a_diagonal_gram_matrix_is_wanda(pattern: Pattern) -> None:
    weight_OI, gram_II = problem(6, 40, 0)
    diagonal = stats(np.diag(np.diag(gram_II)))
    # Wanda compares within each row: one row at a time, so that SparseGPT's blocks are rows too
    for row_1I in np.split(weight_OI, 6):
        wanda = Wanda(pattern).compress(Solution.dense(row_1I), diagonal, layer="x")
        obs = SparseGPT(pattern, percent_damp=0, block_size=40).compress(Solution.dense(row_1I), diagonal, layer="x")
        assert wanda.mask_OI is not None
        np.testing.assert_array_equal(obs.mask_OI, wanda.mask_OI)
        np.testing.assert_array_equal(obs.weight_OI, wanda.weight_OI)


@pytest.mark.parametrize("values", [IntGrid(4, 32, False), IntGrid(4, 32, True), IntGrid(8, None, False)])
@pytest.mark.parametrize("order", ["given", "activation"])
def test_gptq_with_a_diagonal_gram_matrix_is_round_to_nearest(values: IntGrid, order: str) -> None:
    weight_OI, gram_II = problem(7, 72, 1)
    diagonal = stats(np.diag(np.diag(gram_II)))
    gptq = GPTQ(values, order=order, search="minmax").compress(Solution.dense(weight_OI), diagonal, layer="x")
    rtn = RTN(values, search="minmax").compress(Solution.dense(weight_OI), {}, layer="x")
    np.testing.assert_array_equal(gptq.weight_OI, rtn.weight_OI)


@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4)])
@pytest.mark.parametrize("refit_steps", [0, 4, 60])
def test_obs_is_never_better_than_least_squares_on_its_mask(pattern: Pattern, refit_steps: int) -> None:
    weight_OI, gram_II = problem(12, 48, 2)
    method = SparseGPT(pattern, percent_damp=0, block_size=16, refit_steps=refit_steps)
    result = method.compress(Solution.dense(weight_OI), stats(gram_II), layer="x")
    assert result.mask_OI is not None
    best = row_losses(weight_OI, least_squares(weight_OI, result.mask_OI, gram_II), gram_II)
    found = row_losses(weight_OI, result.weight_OI, gram_II)
    assert (found >= best * (1 - 1e-4)).all()
    if refit_steps == 60:
        # conjugate gradients have converged: the bound is met
        assert (found <= best * (1 + 1e-3)).all()


def test_refitting_never_makes_a_row_worse() -> None:
    weight_OI, gram_II = problem(16, 64, 3)
    before = None
    for steps in (0, 1, 2, 4, 8, 16):
        method = SparseGPT(Unstructured(0.6), percent_damp=0, refit_steps=steps)
        result = method.compress(Solution.dense(weight_OI), stats(gram_II), layer="x")
        loss = row_losses(weight_OI, result.weight_OI, gram_II)
        if before is not None:
            assert (loss <= before * (1 + 1e-4)).all()
        before = loss


@pytest.mark.parametrize("order", ["given", "activation"])
@pytest.mark.parametrize("block_size", [1, 5, 16, 100])
def test_the_sweep_is_column_wise_obs(order: str, block_size: int) -> None:
    weight_OI, gram_II = problem(4, 24, 4)
    kept_OI = np.random.default_rng(5).random((4, 24)) < 0.5
    factor = factorize(torch.from_numpy(gram_II.astype(np.float32)), 0.0, order, 1, "x")  # type: ignore[arg-type]
    value_OI, mask_OI = sweep(
        weight_OI, kept_OI, factor, spans=[(0, 24)], block_size=block_size, choose=None, fitted=None
    )
    np.testing.assert_array_equal(mask_OI, kept_OI)
    columns = list(range(24)) if order == "given" else sorted(range(24), key=lambda j: -gram_II[j, j])
    for row in range(4):
        fix = {j: None if kept_OI[row, j] else 0.0 for j in range(24)}
        expected = naive_obs(weight_OI[row].astype(np.float64), gram_II, columns, fix)
        np.testing.assert_allclose(value_OI[row], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("block_size", [3, 64])
def test_sparsegpt_chooses_the_zeros_of_a_block_by_equation_4(block_size: int) -> None:
    weight_OI, gram_II = problem(3, 21, 6)
    method = SparseGPT(Unstructured(0.5), percent_damp=0, block_size=block_size, refit_steps=0)
    result = method.compress(Solution.dense(weight_OI), stats(gram_II), layer="x")
    current_OI = weight_OI.astype(np.float64)
    due = 0
    for start in range(0, 21, block_size):
        stop = min(21, start + block_size)
        # the cost of column j of the block is w_j^2 / [F^-1]_jj, F being free from j on
        inverse = [np.linalg.inv(gram_II[j:, j:]) for j in range(start, stop)]
        cost_OB = current_OI[:, start:stop] ** 2 / np.array([matrix[0, 0] for matrix in inverse])
        total = round(0.5 * 3 * stop)
        pruned = np.argsort(cost_OB.T.ravel(), kind="stable")[: total - due]
        due = total
        zero_OB = np.zeros(cost_OB.T.size, dtype=bool)
        zero_OB[pruned] = True
        zero_OB = zero_OB.reshape(cost_OB.T.shape).T
        for j in range(start, stop):
            for row in np.flatnonzero(zero_OB[:, j - start]):
                matrix = inverse[j - start]
                current_OI[row, j:] -= current_OI[row, j] / matrix[0, 0] * matrix[0]
                current_OI[row, j] = 0
    np.testing.assert_array_equal(result.weight_OI != 0, current_OI != 0)
    np.testing.assert_allclose(result.weight_OI, current_OI, rtol=3e-4, atol=3e-4)


def test_gptq_is_algorithm_1() -> None:
    weight_OI, gram_II = problem(5, 40, 7)
    grid = IntGrid(4, 32, False)
    fitted = fit_minmax(weight_OI, grid)
    result = GPTQ(grid, percent_damp=0, order="given", search="minmax", block_size=7).compress(
        Solution.dense(weight_OI), stats(gram_II), layer="x"
    )
    current_OI = weight_OI.astype(np.float64)
    for j in range(40):
        inverse = np.linalg.inv(gram_II[j:, j:])
        rounded_OI = dequantize(quantize(current_OI.astype(np.float32), fitted), fitted)
        error_O = (current_OI[:, j] - rounded_OI[:, j]) / inverse[0, 0]
        current_OI[:, j:] -= error_O[:, None] * inverse[0]
        current_OI[:, j] = rounded_OI[:, j]
    # a weight half way between two codes may fall either way in float32; then the rest of its row differs too
    same_O = np.isclose(result.weight_OI, current_OI, atol=1e-5).all(axis=1)
    assert same_O.sum() >= 4


def test_one_zero_is_placed_where_brute_force_places_it() -> None:
    """Pruning one weight of a row: OBS looks at the columns to the right only, brute force at all of them."""
    weight_OI, gram_II = problem(1, 8, 8)
    losses = []
    for j in range(8):
        kept_OI = np.ones((1, 8), dtype=bool)
        kept_OI[0, j] = False
        losses.append(row_losses(weight_OI, least_squares(weight_OI, kept_OI, gram_II), gram_II)[0])
        # the classical OBS loss (Hassibi and Stork, equation 5): w_j^2 / [H^-1]_jj
        classical = float(weight_OI[0, j]) ** 2 / np.linalg.inv(gram_II)[j, j]
        assert losses[-1] == pytest.approx(classical, rel=1e-6)
    method = SparseGPT(Unstructured(1 / 8), percent_damp=0, refit_steps=50)
    result = method.compress(Solution.dense(weight_OI), stats(gram_II), layer="x")
    found = row_losses(weight_OI, result.weight_OI, gram_II)[0]
    assert found >= min(losses) * (1 - 1e-4)
    assert any(found == pytest.approx(loss, rel=1e-3, abs=1e-6) for loss in losses)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(4, 8)])
def test_obs_stays_close_to_the_best_mask_there_is(pattern: Pattern) -> None:
    """An exhaustive search over all masks of a row, with least squares on each."""
    ratios = []
    for seed in range(12):
        weight_OI, gram_II = problem(1, 8, 100 + seed)
        best = np.inf
        for kept in combinations(range(8), 4):
            kept_OI = np.zeros((1, 8), dtype=bool)
            kept_OI[0, list(kept)] = True
            best = min(best, row_losses(weight_OI, least_squares(weight_OI, kept_OI, gram_II), gram_II)[0])
        method = SparseGPT(pattern, percent_damp=0, refit_steps=50)
        result = method.compress(Solution.dense(weight_OI), stats(gram_II), layer="x")
        wanda = Wanda(pattern).compress(Solution.dense(weight_OI), stats(gram_II), layer="x")
        found = row_losses(weight_OI, result.weight_OI, gram_II)[0]
        assert found >= best * (1 - 1e-3)
        ratios.append((found / best, row_losses(weight_OI, wanda.weight_OI, gram_II)[0] / best))
    obs, wanda_ratio = np.median(ratios, axis=0)
    assert obs < 1.6
    assert obs < wanda_ratio


def test_joint_quantization_in_one_sweep_is_the_papers() -> None:
    """With refit_steps 0, zeros are chosen and the rest rounded in the same pass over the columns."""
    weight_OI, gram_II = problem(3, 36, 9)
    grid = IntGrid(4, 32, False)
    method = SparseGPT(NM(2, 4), grid, percent_damp=0, refit_steps=0, search="minmax")
    result = method.compress(Solution.dense(weight_OI), stats(gram_II), layer="x")
    fitted = fit_minmax(weight_OI, grid)
    current_OI = weight_OI.astype(np.float64)
    kept_OI = np.zeros((3, 36), dtype=bool)
    for j in range(36):
        if j % 4 == 0:
            diagonal = [np.linalg.inv(gram_II[k:, k:])[0, 0] for k in range(j, j + 4)]
            cost_OB = current_OI[:, j : j + 4] ** 2 / np.array(diagonal)
            kept_OI[:, j : j + 4] = np.argsort(np.argsort(cost_OB, axis=1), axis=1) >= 2
        inverse = np.linalg.inv(gram_II[j:, j:])
        rounded_OI = dequantize(quantize(current_OI.astype(np.float32), fitted), fitted)
        target_O = np.where(kept_OI[:, j], rounded_OI[:, j], 0)
        current_OI[:, j:] -= ((current_OI[:, j] - target_O) / inverse[0, 0])[:, None] * inverse[0]
        current_OI[:, j] = target_O
    same_O = np.isclose(result.weight_OI, current_OI, atol=1e-5).all(axis=1)
    assert same_O.sum() >= 2
    assert result.grid is not None
    np.testing.assert_array_equal(result.grid.scale_OG, fitted.scale_OG)
