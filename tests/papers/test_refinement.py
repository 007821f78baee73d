"""DSnoT, LASSO and norm correction against plain loops, optimality conditions and scipy. Suffixes: O out, I in."""

import numpy as np
import pytest
import scipy.optimize
import torch
from tests.papers.test_identities import Array, least_squares, problem, row_losses, stats

from rarefy.calibrate.statistics import Mean, SquaredNorm
from rarefy.core.errors import PatternError
from rarefy.core.patterns import NM, Blocks, Unstructured
from rarefy.core.solution import Solution
from rarefy.methods import DSnoT, Lasso, Magnitude, Rescale, SparseGPT, Wanda
from rarefy.methods.pruning.proximal import penalized


def moments(width: int, seed: int) -> tuple[Array, dict[object, torch.Tensor]]:
    rng = np.random.default_rng(seed)
    x_TI = (rng.normal(size=(400, width)) + rng.normal(size=width)) * np.exp(rng.normal(size=width) * 0.5)
    given = {Mean(): x_TI.mean(axis=0), SquaredNorm(): (x_TI**2).mean(axis=0)}
    return x_TI, {key: torch.from_numpy(value.astype(np.float32)) for key, value in given.items()}


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_dsnot_is_algorithm_1(pattern: Unstructured | NM) -> None:
    weight_OI, _ = problem(5, 24, 0)
    x_TI, given = moments(24, 1)
    mean, square = x_TI.mean(axis=0), (x_TI**2).mean(axis=0)
    start = Wanda(pattern).compress(Solution.dense(weight_OI), given, layer="x")  # type: ignore[arg-type]
    result = DSnoT(pattern).compress(Solution.dense(weight_OI), given, layer="x")  # type: ignore[arg-type]
    assert start.mask_OI is not None
    assert result.mask_OI is not None
    num_swaps = 0
    for o in range(5):
        w, kept = weight_OI[o].astype(np.float64), {int(i) for i in np.flatnonzero(start.mask_OI[o])}
        for _ in range(50):
            error = sum(w[i] * mean[i] for i in range(24) if i not in kept)
            grow = max(
                (i for i in range(24) if i not in kept),
                key=lambda i: np.sign(error) * w[i] * mean[i] / (square[i] - mean[i] ** 2),
            )
            group = range(24) if isinstance(pattern, Unstructured) else range(grow // 4 * 4, grow // 4 * 4 + 4)
            candidates = [j for j in group if j in kept and np.sign(error) * w[j] * mean[j] < 0]
            if not candidates:
                break
            prune = min(candidates, key=lambda j: abs(w[j]) * square[j] ** 0.5)
            if abs(error - w[grow] * mean[grow] + w[prune] * mean[prune]) >= abs(error):
                break
            kept = kept - {prune} | {grow}
            num_swaps += 1
        assert {int(i) for i in np.flatnonzero(result.mask_OI[o])} == kept
    assert num_swaps > 0
    before, after = (np.abs((weight_OI - s.weight_OI) @ mean).sum() for s in (start, result))
    assert after < before


def test_dsnot_refuses_blocks() -> None:
    with pytest.raises(PatternError, match="blocks, rows or columns"):
        DSnoT(Blocks((4, 4), 0.5))


def test_the_lasso_meets_its_optimality_conditions() -> None:
    """Where v is not 0 the gradient is lambda sign(v); elsewhere it is at most lambda."""
    weight_OI, gram_II = problem(4, 12, 2)
    unit = np.sqrt(np.diag(gram_II))
    scaled = gram_II / unit / unit[:, None]
    target = torch.from_numpy((weight_OI * unit).astype(np.float32))
    value, kept_OI, penalty = penalized(
        target, torch.from_numpy(scaled.astype(np.float32)), Blocks((1, 1), 0.5), None, 4000
    )
    v = value.double().numpy()
    gradient = (target.numpy() - v) @ scaled
    np.testing.assert_allclose(gradient[v != 0], penalty * np.sign(v[v != 0]), rtol=2e-3)
    assert (np.abs(gradient[v == 0]) <= penalty * (1 + 2e-3)).all()
    assert kept_OI.sum() == 24
    assert not v[~kept_OI].any()

    def objective(split: Array) -> float:  # v = a - b with a, b >= 0, so that the penalty is smooth
        candidate = (split[:48] - split[48:]).reshape(4, 12)
        difference = target.numpy() - candidate
        return 0.5 * float(np.einsum("oi,ij,oj->", difference, scaled, difference)) + penalty * float(split.sum())

    found = objective(np.concatenate([np.maximum(v, 0).ravel(), np.maximum(-v, 0).ravel()]))
    best = scipy.optimize.minimize(objective, np.full(96, 0.1), bounds=[(0, None)] * 96, options={"maxfun": 10**6})
    assert found <= best.fun * (1 + 1e-4)


def test_the_group_lasso_meets_its_optimality_conditions() -> None:
    weight_OI, gram_II = problem(6, 12, 3)
    unit = np.sqrt(np.diag(gram_II))
    scaled = gram_II / unit / unit[:, None]
    target = torch.from_numpy((weight_OI * unit).astype(np.float32))
    blocks = Blocks((2, 3), 0.5)
    value, _, penalty = penalized(target, torch.from_numpy(scaled.astype(np.float32)), blocks, None, 4000)
    v = value.double().numpy()
    gradient = (target.numpy() - v) @ scaled
    num_zero = 0
    for top in range(0, 6, 2):
        for left in range(0, 12, 3):
            part, slope = v[top : top + 2, left : left + 3], gradient[top : top + 2, left : left + 3]
            size = np.linalg.norm(part)
            num_zero += size == 0
            if size > 0:
                np.testing.assert_allclose(slope, penalty * 6**0.5 * part / size, atol=4e-3 * penalty)
            else:
                assert np.linalg.norm(slope) <= penalty * 6**0.5 * (1 + 2e-3)
    assert num_zero == 6


def test_the_lasso_of_unrelated_inputs_is_the_threshold() -> None:
    weight_OI, gram_II = problem(6, 40, 4)
    diagonal = stats(np.diag(np.diag(gram_II)))
    lasso = Lasso(Unstructured(0.5), percent_damp=0).compress(Solution.dense(weight_OI), diagonal, layer="x")
    scaled = weight_OI * np.sqrt(np.diag(gram_II)).astype(np.float32)
    plain = Magnitude(Unstructured(0.5)).compress(Solution.dense(scaled), {}, layer="x")
    np.testing.assert_array_equal(lasso.mask_OI, plain.mask_OI)
    np.testing.assert_allclose(lasso.weight_OI, np.where(lasso.mask_OI, weight_OI, 0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pattern", [Unstructured(0.6), Blocks((4, 8), 0.5)])
def test_the_lasso_ends_near_least_squares_on_a_mask_better_than_magnitudes(pattern: Unstructured | Blocks) -> None:
    weight_OI, gram_II = problem(24, 64, 5)
    method = Lasso(pattern, percent_damp=0, refit_steps=60)
    result = method.compress(Solution.dense(weight_OI), stats(gram_II), layer="x")
    assert result.mask_OI is not None
    best = row_losses(weight_OI, least_squares(weight_OI, result.mask_OI, gram_II), gram_II)
    assert (row_losses(weight_OI, result.weight_OI, gram_II) <= best * (1 + 2e-3)).all()
    plain = Magnitude(pattern).compress(Solution.dense(weight_OI), {}, layer="x")
    assert plain.mask_OI is not None
    other = row_losses(weight_OI, least_squares(weight_OI, plain.mask_OI, gram_II), gram_II)
    assert best.sum() < other.sum()


def test_the_lasso_refuses_n_of_m() -> None:
    with pytest.raises(PatternError, match="N:M"):
        Lasso(NM(2, 4))


def test_rescaling_is_the_best_factor_of_each_row() -> None:
    weight_OI, gram_II = problem(7, 32, 6)
    before = Wanda(Unstructured(0.7)).compress(Solution.dense(weight_OI), stats(gram_II), layer="x")
    after = Rescale().compress(before, stats(gram_II), layer="x")
    for o in range(7):
        w, v = weight_OI[o].astype(np.float64), before.weight_OI[o].astype(np.float64)
        best = scipy.optimize.minimize_scalar(lambda s, w=w, v=v: (w - s * v) @ gram_II @ (w - s * v))
        np.testing.assert_allclose(after.weight_OI[o], best.x * v, rtol=1e-4, atol=1e-6)
    fitted = SparseGPT(Unstructured(0.7), refit_steps=200, percent_damp=0).compress(
        Solution.dense(weight_OI), stats(gram_II), layer="x"
    )
    again = Rescale().compress(fitted, stats(gram_II), layer="x")  # nothing is left to correct
    np.testing.assert_allclose(again.weight_OI, fitted.weight_OI, rtol=2e-3, atol=1e-5)
