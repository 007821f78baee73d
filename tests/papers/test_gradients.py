"""Taylor, OBD and oBERT against brute force in float64. Shape suffixes: N gradients, O out, I in."""

from itertools import combinations

import numpy as np
import pytest
import torch

from rarefy.calibrate import gradient_statistics
from rarefy.calibrate.gradient_statistics import FisherBlocks, FisherDiagonal, GradientAbsMean, GradientMean, NumTaps
from rarefy.core.patterns import NM, Blocks, Lines, Unstructured
from rarefy.core.solution import Solution
from rarefy.kernels.fisher import has_fisher_kernels
from rarefy.methods import OBD, OBERT, Taylor
from rarefy.methods.pruning import fisher_inverse

HALF = Unstructured(0.5)


@pytest.fixture(autouse=True, params=["kernels", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything with compiled kernels and without."""
    if request.param == "torch":
        for module in (gradient_statistics, fisher_inverse):
            monkeypatch.setattr(module, "has_fisher_kernels", lambda: False)
    elif not has_fisher_kernels():
        pytest.skip("no compiled kernels")


def problem(rows: int, width: int, seed: int = 0, num_gradients: int = 40):
    """A weight, and correlated gradients of very different sizes."""
    rng = np.random.default_rng(seed)
    weight_OI = rng.normal(size=(rows, width)).astype(np.float32)
    mix_II = np.eye(width) + rng.normal(size=(width, width)) / width**0.5
    gradient_NOI = rng.normal(size=(num_gradients, rows, width)) @ mix_II * np.exp(rng.normal(size=width))
    return weight_OI, torch.from_numpy(gradient_NOI.astype(np.float32))


def stats(gradient_NOI, *statistics, num_taps=1):
    finished = {}
    for statistic in (*statistics, NumTaps()):
        state = statistic.init(tuple(gradient_NOI.shape[1:]), num_taps)
        for gradient in gradient_NOI:
            statistic.add_gradient(state, gradient)
        finished[statistic] = statistic.finish(state)
    return finished


def loss(difference_I, fisher_II) -> float:
    """The quadratic model, half of d^T F d."""
    return float(difference_I @ fisher_II @ difference_I / 2)


def damped(gradient_NI, damp: float, mean: float):
    return gradient_NI.T @ gradient_NI / len(gradient_NI) + damp * mean * np.eye(gradient_NI.shape[1])


def best_values(weight_I, kept, fisher_II):
    """The least loss with these entries kept, by the normal equations."""
    kept = list(kept)
    value_I = np.zeros_like(weight_I)
    value_I[kept] = np.linalg.solve(fisher_II[np.ix_(kept, kept)], fisher_II[kept] @ weight_I)
    return value_I


@pytest.mark.parametrize("seed", range(4))
def test_with_the_whole_row_as_a_block_the_values_are_the_best_of_their_mask(seed):
    rows, width, damp = 3, 9, 0.02
    weight_OI, gradient_NOI = problem(rows, width, seed)
    method = OBERT(Unstructured(4 / 9), block_size=width, percent_damp=damp)
    result = method.compress(Solution.dense(weight_OI), stats(gradient_NOI, FisherBlocks(width)), layer="x")
    gradient = gradient_NOI.double().numpy()
    mean = np.square(gradient).mean()
    assert int((~result.mask_OI).sum()) == 12
    for row in range(rows):
        fisher_II = damped(gradient[:, row], damp, mean)
        expected = best_values(weight_OI[row].astype(np.float64), np.flatnonzero(result.mask_OI[row]), fisher_II)
        np.testing.assert_allclose(result.weight_OI[row], expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_one_weight_less_is_the_best_one_of_all(seed):
    """Brute force over which weight goes and what the others become then."""
    width, damp = 8, 0.01
    weight_OI, gradient_NOI = problem(1, width, seed)
    method = OBERT(Unstructured(1 / 8), block_size=width, percent_damp=damp)
    own = stats(gradient_NOI, FisherBlocks(width))
    result = method.compress(Solution.dense(weight_OI), own, layer="x")
    gradient = gradient_NOI[:, 0].double().numpy()
    fisher_II = damped(gradient, damp, np.square(gradient).mean())
    weight_I = weight_OI[0].astype(np.float64)
    cost_I = [
        loss(best_values(weight_I, set(range(width)) - {gone}, fisher_II) - weight_I, fisher_II)
        for gone in range(width)
    ]
    score_I = method.saliency(weight_OI, own, layer="x")[0]
    assert np.argmin(score_I) == np.argmin(cost_I)
    np.testing.assert_allclose(score_I.min(), min(cost_I), rtol=1e-4)
    assert not result.mask_OI[0, int(np.argmin(cost_I))]


def greedy(weight_I, fisher_II):
    """Drop the weight with the least loss again and again, the others refitted; the most that any step had cost."""
    kept, score_I, before, most = set(range(len(weight_I))), np.zeros(len(weight_I)), 0.0, 0.0
    while kept:
        after = {
            gone: loss(best_values(weight_I, sorted(kept - {gone}), fisher_II) - weight_I, fisher_II) for gone in kept
        }
        gone = min(after, key=after.__getitem__)
        most = max(most, after[gone] - before)
        before, score_I[gone] = after[gone], most
        kept.discard(gone)
    return score_I


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_what_each_weight_costs_after_the_cheaper_ones_of_its_block(seed):
    """Two rows of two blocks, the second of which is narrower, against every choice in float64."""
    rows, width, size, damp = 2, 11, 6, 0.01
    weight_OI, gradient_NOI = problem(rows, width, seed, num_gradients=4)
    own = stats(gradient_NOI, FisherBlocks(size))
    score_OI = OBERT(HALF, block_size=size, percent_damp=damp).saliency(weight_OI, own, layer="x")
    gradient = gradient_NOI.double().numpy()
    mean = np.square(gradient).mean()
    for row in range(rows):
        for part in (slice(0, size), slice(size, width)):
            expected = greedy(weight_OI[row, part].astype(np.float64), damped(gradient[:, row, part], damp, mean))
            np.testing.assert_allclose(score_OI[row, part], expected, rtol=1e-3)


def test_a_block_of_a_convolution_is_the_taps_of_a_channel():
    """Four taps of three channels, tap after tap in the matrix: blocks of four columns are kernels."""
    rows, num_taps, channels, damp = 2, 4, 3, 0.01
    weight_OI, gradient_NOI = problem(rows, num_taps * channels, num_gradients=3)
    own = stats(gradient_NOI, FisherBlocks(num_taps), num_taps=num_taps)
    method = OBERT(HALF, block_size=num_taps, percent_damp=damp)
    score_OI = method.saliency(weight_OI, own, layer="x")
    value_OI = method.compress(Solution.dense(weight_OI), own, layer="x").weight_OI
    gradient = gradient_NOI.double().numpy()
    for row in range(rows):
        for channel in range(channels):
            columns = [tap * channels + channel for tap in range(num_taps)]
            fisher_II = damped(gradient[:, row, columns], damp, np.square(gradient).mean())
            weight_I = weight_OI[row, columns].astype(np.float64)
            np.testing.assert_allclose(score_OI[row, columns], greedy(weight_I, fisher_II), rtol=1e-3)
            kept = np.flatnonzero(value_OI[row, columns])
            np.testing.assert_allclose(
                value_OI[row, columns], best_values(weight_I, kept, fisher_II), rtol=1e-3, atol=1e-5
            )


def test_weights_that_stand_in_for_each_other_go_one_at_a_time():
    """Of two alike the loss misses the first little and the second a lot: half of both pairs go, and no pair whole."""
    weight_OI = np.array([[1.0, 1.0, 3.0, 3.0, 2.0, 2.0]], np.float32)
    direction_NI = torch.tensor([[1.0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]])
    own = stats(direction_NI[:, None], FisherBlocks(6))
    result = OBERT(HALF, block_size=6, percent_damp=1e-3).compress(Solution.dense(weight_OI), own, layer="x")
    assert result.mask_OI.reshape(3, 2).sum(axis=1).tolist() == [1, 1, 1]
    np.testing.assert_allclose(result.weight_OI.reshape(3, 2).sum(axis=1), [2, 6, 4], rtol=2e-3)


def test_the_order_comes_closer_to_the_best_mask_than_single_costs():
    """Greedy choice one at a time beats choosing all by what each costs alone, and neither beats brute force."""
    width, num_keep, damp = 10, 5, 0.01
    totals = {"alone": 0.0, "in order": 0.0, "best": 0.0}
    for seed in range(8):
        weight_OI, gradient_NOI = problem(
            1, width, seed, num_gradients=5
        )  # few, so that weights can make up for others
        own = stats(gradient_NOI, FisherBlocks(width))
        gradient = gradient_NOI[:, 0].double().numpy()
        fisher_II = damped(gradient, damp, np.square(gradient).mean())
        weight_I = weight_OI[0].astype(np.float64)
        method = OBERT(HALF, block_size=width, percent_damp=damp)
        value_I = method.compress(Solution.dense(weight_OI), own, layer="x").weight_OI[0].astype(np.float64)
        assert np.count_nonzero(value_I) == num_keep
        alone_I = weight_I**2 / np.diag(np.linalg.inv(fisher_II))
        kept = np.sort(np.argsort(alone_I)[width - num_keep :])
        totals["alone"] += loss(best_values(weight_I, kept, fisher_II) - weight_I, fisher_II)
        totals["in order"] += loss(value_I - weight_I, fisher_II)
        totals["best"] += min(
            loss(best_values(weight_I, kept, fisher_II) - weight_I, fisher_II)
            for kept in combinations(range(width), num_keep)
        )
    assert totals["best"] * (1 - 1e-5) <= totals["in order"] < 0.95 * totals["alone"]


def test_blocks_of_one_column_are_obd():
    weight_OI, gradient_NOI = problem(7, 30)
    own = stats(gradient_NOI, FisherBlocks(1), FisherDiagonal())
    one, other = OBERT(HALF, block_size=1, percent_damp=1e-6), OBD(HALF)
    first, second = (method.saliency(weight_OI, own, layer="x") for method in (one, other))
    np.testing.assert_allclose(first, second, rtol=1e-3)
    assert (np.argsort(first, axis=None) == np.argsort(second, axis=None)).all()
    solutions = [method.compress(Solution.dense(weight_OI), own, layer="x") for method in (one, other)]
    np.testing.assert_array_equal(solutions[0].weight_OI, solutions[1].weight_OI)


def test_the_saliencies_are_their_formulas():
    weight_OI, gradient_NOI = problem(4, 12)
    own = stats(gradient_NOI, GradientMean(), GradientAbsMean(), FisherDiagonal())
    gradient, weight = gradient_NOI.double().numpy(), weight_OI.astype(np.float64)
    for method, expected in (
        (Taylor(HALF), np.abs(weight) * np.abs(gradient).mean(0)),
        (Taylor(HALF, average="signed"), np.abs(weight * gradient.mean(0))),
        (OBD(HALF), weight**2 * (gradient**2).mean(0) / 2),
    ):
        np.testing.assert_allclose(method.saliency(weight_OI, own, layer="x"), expected, rtol=1e-4, atol=1e-7)
        result = method.compress(Solution.dense(weight_OI), own, layer="x")
        assert expected[result.mask_OI].min() >= expected[~result.mask_OI].max()
        assert (result.weight_OI[result.mask_OI] == weight_OI[result.mask_OI]).all()


@pytest.mark.parametrize("pattern", [Blocks((2, 3), 0.5), Lines("rows", 0.5), Lines("columns", 0.5)])
def test_structures_go_by_the_sum_of_their_weights(pattern):
    weight_OI, gradient_NOI = problem(4, 12)
    own = stats(gradient_NOI, GradientAbsMean())
    result = Taylor(pattern).compress(Solution.dense(weight_OI), own, layer="x")
    score_OI = np.abs(weight_OI * own[GradientAbsMean()].numpy())
    if isinstance(pattern, Blocks):
        sums = score_OI.reshape(2, 2, 4, 3).sum(axis=(1, 3))
        kept = result.mask_OI.reshape(2, 2, 4, 3).all(axis=(1, 3))
    else:
        axis = 1 if pattern.axis == "rows" else 0
        sums, kept = score_OI.sum(axis=axis), result.mask_OI.all(axis=axis)
    assert kept.sum() == kept.size // 2
    assert sums[kept].min() > sums[~kept].max()


@pytest.mark.parametrize("pattern", [HALF, NM(2, 4), Lines("rows", 0.5)])
@pytest.mark.parametrize("cls", [Taylor, OBD, OBERT])
def test_without_any_gradient_the_zeros_are_as_many(cls, pattern):
    weight_OI, gradient_NOI = problem(4, 12)
    method = cls(pattern)
    result = method.compress(Solution.dense(weight_OI), stats(0 * gradient_NOI, *method.needs()), layer="x")
    assert result.sparsity == 0.5
    assert (result.weight_OI[result.mask_OI] == weight_OI[result.mask_OI]).all()
