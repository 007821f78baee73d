"""What the papers on low rank say must hold, against numpy's SVD and optimality conditions in float64.

Shape suffixes: O out, I in, K rank.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.papers.test_identities import Array, problem, row_losses, stats

from rarefy.calibrate.statistics import AbsMean, Gram
from rarefy.core.errors import PatternError
from rarefy.core.ranks import Rank
from rarefy.core.solution import Solution
from rarefy.methods import ASVD, DRONE, SVD, SVDLLM, SVT, LayerMethod, ScaledGD


def value(method: LayerMethod, weight_OI: np.ndarray, given: dict[object, torch.Tensor]) -> Array:
    result = method.compress(Solution.dense(weight_OI), given, layer="x")  # type: ignore[arg-type]
    assert result.only_factors
    return result.value_OI.astype(np.float64)


def truncated(matrix: Array, rank: int) -> Array:
    left, singular, right = np.linalg.svd(matrix)
    return left[:, :rank] * singular[:rank] @ right[:rank]


SHAPES = [(9, 24), (24, 9), (16, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_svd_is_the_closest_matrix_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    weight_OI, _ = problem(*shape, seed=0)
    found = value(SVD(Rank(count=rank)), weight_OI, {})
    np.testing.assert_allclose(found, truncated(weight_OI.astype(np.float64), rank), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact(shape: tuple[int, int]) -> None:
    weight_OI, gram_II = problem(*shape, seed=1)
    given = {**stats(gram_II), AbsMean(): torch.rand(shape[1]) + 0.1}
    full = Rank(count=min(shape))
    for method in (SVD(full), SVT(full), ASVD(full), SVDLLM(full), DRONE(full)):
        np.testing.assert_allclose(value(method, weight_OI, given), weight_OI, atol=2e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_whitening_gives_the_least_error_in_the_outputs(shape: tuple[int, int], rank: int) -> None:
    """Theorem 3.2 of SVD-LLM: the loss is the sum of the squared singular values of W C that are dropped."""
    weight_OI, gram_II = problem(*shape, seed=2)
    singular = np.linalg.svd(weight_OI.astype(np.float64) @ np.linalg.cholesky(gram_II), compute_uv=False)
    least = (singular[rank:] ** 2).sum()
    for method in (SVDLLM(Rank(count=rank), percent_damp=0), DRONE(Rank(count=rank), tolerance=1e-9)):
        found = row_losses(weight_OI, value(method, weight_OI, stats(gram_II)), gram_II).sum()
        assert found == pytest.approx(least, rel=1e-3)
        plain = row_losses(weight_OI, value(SVD(Rank(count=rank)), weight_OI, {}), gram_II).sum()
        assert found < plain


def test_drone_leaves_out_what_the_inputs_leave_out() -> None:
    weight_OI, _ = problem(8, 12, seed=3)
    basis = np.random.default_rng(0).normal(size=(12, 5))  # inputs of rank 5
    gram_II = basis @ basis.T
    found = value(DRONE(Rank(count=5)), weight_OI, stats(gram_II))
    outside = np.eye(12) - basis @ np.linalg.pinv(basis)
    np.testing.assert_allclose(found @ outside, 0, atol=1e-4)
    np.testing.assert_allclose(found @ basis, weight_OI @ basis, atol=1e-3)


def test_asvd_is_svd_of_scaled_columns_and_plain_svd_without_an_exponent() -> None:
    weight_OI, _ = problem(10, 20, seed=4)
    size = torch.rand(20) + 0.05
    given: dict[object, torch.Tensor] = {AbsMean(): size}
    plain = value(SVD(Rank(count=4)), weight_OI, {})
    np.testing.assert_allclose(value(ASVD(Rank(count=4), alpha=0.0), weight_OI, given), plain, atol=1e-5)
    scale_I = size.double().numpy() ** 0.5
    expected = truncated(weight_OI.astype(np.float64) * scale_I, 4) / scale_I
    np.testing.assert_allclose(value(ASVD(Rank(count=4)), weight_OI, given), expected, atol=1e-4)


def test_thresholding_minimises_the_nuclear_norm_problem() -> None:
    """The subgradient of tau ||V||_* at V = U S Q^T is tau (U Q^T + M), ||M|| <= 1, M orthogonal to U and Q."""
    weight_OI, _ = problem(9, 15, seed=5)
    singular = np.linalg.svd(weight_OI.astype(np.float64), compute_uv=False)
    found = value(SVT(Rank(count=4)), weight_OI, {})
    tau = singular[4]
    left, kept, right = np.linalg.svd(found)
    np.testing.assert_allclose(kept[:4], singular[:4] - tau, atol=1e-5)
    rest = (weight_OI - found) / tau - left[:, :4] @ right[:4]
    assert np.linalg.norm(rest, 2) <= 1 + 1e-4
    np.testing.assert_allclose(left[:, :4].T @ rest, 0, atol=1e-4)
    np.testing.assert_allclose(rest @ right[:4].T, 0, atol=1e-4)


def test_a_rank_is_said_in_four_ways() -> None:
    assert Rank(ratio=0.5).most((10, 30)) == 3  # 3 * 40 numbers of 300, and 4 * 40 are more than half
    assert Rank(num_bytes=400).most((10, 30)) == 5
    assert Rank(count=99).most((10, 30)) == 10
    assert Rank(ratio=0.001).most((10, 30)) == 1
    squares = np.array([6.0, 3.0, 1.0])
    assert [Rank(energy=e).choose((3, 5), squares) for e in (0.5, 0.6, 0.61, 0.9, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]
    weight_OI = (np.diag([3.0, 2.0, 1.0, 0.5]) @ np.eye(4, 6)).astype(np.float32)
    result = SVD(Rank(energy=0.9)).compress(Solution.dense(weight_OI), {}, layer="x")
    assert result.factors is not None
    assert result.factors.rank == 2  # 13 of 14.25, and 9 of them alone are less than 0.9
    for bad in ({}, {"ratio": 0.5, "count": 3}, {"ratio": 0}, {"energy": 1.5}, {"count": 0}, {"count": True}):
        with pytest.raises(PatternError, match="rank: "):
            Rank(**bad)  # type: ignore[arg-type]
    with pytest.raises(PatternError, match="exactly one"):
        Rank(energy=0.5, num_bytes=4)


def test_nothing_known_of_the_inputs_is_plain_svd() -> None:
    weight_OI, _ = problem(6, 8, seed=6)
    zeros = {Gram(): torch.zeros(8, 8)}
    np.testing.assert_allclose(
        value(SVDLLM(Rank(count=2)), weight_OI, zeros),  # type: ignore[arg-type]
        value(SVD(Rank(count=2)), weight_OI, {}),
        atol=1e-6,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_gradient_descent_falls_at_every_step_to_the_closed_form(shape: tuple[int, int], rank: int) -> None:
    weight_OI, gram_II = problem(*shape, seed=5)

    def lost(method: LayerMethod) -> float:
        return float(row_losses(weight_OI, value(method, weight_OI, stats(gram_II)), gram_II).sum())

    least = lost(SVDLLM(Rank(count=rank), percent_damp=0))
    start = lost(SVD(Rank(count=rank)))
    losses = [start, *(lost(ScaledGD(Rank(count=rank), num_steps=steps)) for steps in (1, 2, 4, 8, 16))]
    assert all(later <= before * (1 + 1e-4) for before, later in pairwise(losses))
    assert least * (1 - 1e-4) <= lost(ScaledGD(Rank(count=rank), num_steps=300)) <= 1.02 * least < start


def test_gradient_descent_never_ends_worse_than_its_start() -> None:
    """Where the SVD is the optimum, in the identity metric, with dead inputs, and where no input is ever there."""
    weight_OI, _ = problem(9, 24, seed=6)
    weight_OI[3] = weight_OI[4]
    for diagonal in (np.ones(24), np.arange(24.0) // 6, np.zeros(24)):
        gram_II = np.diag(diagonal)
        given = stats(gram_II)
        for rank in (1, 5, 9):
            start = row_losses(weight_OI, value(SVD(Rank(count=rank)), weight_OI, {}), gram_II).sum()
            end = row_losses(weight_OI, value(ScaledGD(Rank(count=rank)), weight_OI, given), gram_II).sum()
            assert end <= start * (1 + 1e-5) + 1e-9
