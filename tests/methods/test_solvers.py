"""Hyperparameters, grids, dead inputs, damaged statistics, and the cache of factorizations."""

import numpy as np
import pytest
import torch
from tests.methods.conftest import INT4

from rarefy.calibrate.statistics import Gram, SquaredNorm
from rarefy.core.errors import NonFiniteError, PatternError, UsageError
from rarefy.core.grids import FittedGrid, IntGrid, dequantize, fit_minmax, quantize
from rarefy.core.patterns import NM, Unstructured
from rarefy.core.solution import Solution
from rarefy.methods import GPTQ, RTN, LayerMethod, Magnitude, SparseGPT, Wanda
from rarefy.methods import obs as obs_module
from rarefy.methods.grid_search import fit_grid
from rarefy.methods.obs import activation_order, factorize, group_spans
from rarefy.testing.method import make_problem


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: SparseGPT(Unstructured(0.5), percent_damp=-1), "SparseGPT.percent_damp: -1; allowed: a number >= 0"),
        (lambda: SparseGPT(Unstructured(0.5), percent_damp=float("nan")), "SparseGPT.percent_damp"),
        (lambda: SparseGPT(Unstructured(0.5), block_size=0), "SparseGPT.block_size: 0; allowed: an integer >= 1"),
        (lambda: SparseGPT(Unstructured(0.5), block_size=True), "SparseGPT.block_size"),
        (lambda: SparseGPT(Unstructured(0.5), block_size=1.5), "SparseGPT.block_size"),
        (lambda: SparseGPT(Unstructured(0.5), order="best"), "SparseGPT.order: 'best'; allowed: 'given', 'activation'"),
        (lambda: SparseGPT(0.5), "SparseGPT.pattern: 0.5"),
        (lambda: SparseGPT(Unstructured(0.5), 4), "SparseGPT.values: 4"),
        (lambda: GPTQ(None), "GPTQ.values: None"),
        (lambda: RTN(INT4, search="best"), "RTN.search: 'best'; allowed: 'minmax', 'error'"),
    ],
)  # fmt: skip
def test_bad_hyperparameters_fail_at_construction(make: object, where: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()  # type: ignore[operator]
    assert where in str(caught.value)


@pytest.mark.parametrize("method", [Magnitude(NM(16, 64)), Wanda(NM(16, 64)), SparseGPT(NM(16, 64))])
def test_a_group_wider_than_the_layer_names_the_layer(method: LayerMethod) -> None:
    weight_OI, stats = make_problem(4, 48, method.needs())
    with pytest.raises(PatternError, match=r"layer m\.fc: input axis 48 is smaller than the group of 64"):
        method.compress(Solution.dense(weight_OI), stats, layer="m.fc")


def test_a_statistic_of_another_layer_is_refused() -> None:
    weight_OI, _ = make_problem(4, 48, ())
    _, other = make_problem(4, 32, (Gram(), SquaredNorm()))
    for method in (Wanda(Unstructured(0.5)), GPTQ(INT4)):
        with pytest.raises(UsageError, match=r"layer x: .* of shape .*32"):
            method.compress(Solution.dense(weight_OI), other, layer="x")


def brute_force_error(weight_I: np.ndarray, grid: IntGrid, factors: list[float], importance_I: np.ndarray) -> float:
    errors = []
    for factor in factors:
        narrow = fit_minmax((weight_I[None] * np.float32(factor)).astype(np.float32), grid)
        value_I = dequantize(quantize(weight_I[None], narrow), narrow)[0]
        errors.append(float((importance_I * (value_I - weight_I).astype(np.float64) ** 2).sum()))
    return min(errors)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_the_range_search_finds_the_best_candidate_of_every_group(
    symmetric: bool, group_size: int | None, num_bits: int
) -> None:
    rng = np.random.default_rng(0)
    weight_OI = (rng.standard_t(3, size=(5, 75)) / 10).astype(np.float32)
    importance_I = torch.from_numpy(rng.random(75).astype(np.float32))
    grid = IntGrid(num_bits, group_size, symmetric)
    fitted = fit_grid(weight_OI, grid, "error", importance_I)
    error_OI = (
        importance_I.numpy() * (dequantize(quantize(weight_OI, fitted), fitted) - weight_OI).astype(np.float64) ** 2
    )
    size = group_size or 75
    factors = [1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64, 0.6]
    factors += [0.56, 0.52, 0.48, 0.44, 0.4, 0.36, 0.32] if num_bits < 4 else []
    narrowed = 0
    for start in range(0, 75, size):
        part = slice(start, min(75, start + size))
        for row in range(5):
            best = brute_force_error(
                weight_OI[row, part], IntGrid(num_bits, None, symmetric), factors, importance_I[part].numpy()
            )
            assert error_OI[row, part].sum() == pytest.approx(best, rel=1e-4)
            narrowed += best < brute_force_error(
                weight_OI[row, part], IntGrid(num_bits, None, symmetric), [1.0], importance_I[part].numpy()
            )
    assert narrowed > 0


def test_rtn_of_many_rows_is_rtn_of_each() -> None:
    weight_OI, _ = make_problem(300, 64, ())
    import rarefy.methods.quantization.rtn as module

    whole = RTN(INT4).compress(Solution.dense(weight_OI), {}, layer="x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_WEIGHTS_AT_ONCE", 64 * 7)
        parts = RTN(INT4).compress(Solution.dense(weight_OI), {}, layer="x")
    np.testing.assert_array_equal(whole.weight_OI, parts.weight_OI)
    assert isinstance(whole.grid, FittedGrid)
    assert isinstance(parts.grid, FittedGrid)
    np.testing.assert_array_equal(whole.grid.scale_OG, parts.grid.scale_OG)


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_dead_inputs_are_pruned_first_and_keep_finite_weights(damp: float) -> None:
    weight_OI, stats = make_problem(8, 60, (Gram(),))  # input 20 is dead
    assert stats[Gram()][20, 20] == 0
    result = SparseGPT(NM(2, 4), percent_damp=damp).compress(Solution.dense(weight_OI), stats, layer="x")
    assert np.isfinite(result.weight_OI).all()
    assert result.mask_OI is not None
    assert not result.mask_OI[:, 20].any()


def test_without_any_signal_sparsegpt_falls_back_to_magnitude() -> None:
    weight_OI, _ = make_problem(1, 64, ())
    silent = {Gram(): torch.zeros(64, 64)}
    obs = SparseGPT(Unstructured(0.5), block_size=64).compress(Solution.dense(weight_OI), silent, layer="x")
    magnitude = Magnitude(Unstructured(0.5)).compress(Solution.dense(weight_OI), {}, layer="x")
    np.testing.assert_array_equal(obs.weight_OI, magnitude.weight_OI)


def test_a_singular_gram_matrix_gets_more_damping() -> None:
    weight_OI, _ = make_problem(8, 64, ())
    x_TI = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))  # rank 5
    gram_II = x_TI.T @ x_TI / 5
    result = GPTQ(INT4, percent_damp=0).compress(Solution.dense(weight_OI), {Gram(): gram_II}, layer="x")
    result.check()


def test_an_indefinite_gram_matrix_is_an_error() -> None:
    weight_OI, _ = make_problem(8, 64, ())
    gram_II = torch.eye(64)
    gram_II[0, 1] = gram_II[1, 0] = 100.0
    with pytest.raises(NonFiniteError, match="layer x: the Gram matrix is not positive semi-definite"):
        GPTQ(INT4).compress(Solution.dense(weight_OI), {Gram(): gram_II}, layer="x")


def test_layers_that_share_a_statistic_share_its_factorization(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    original = obs_module._factorize

    def counted(gram_II: torch.Tensor, damp: float, order: object, group: int, layer: str) -> object:
        calls.append(layer)
        return original(gram_II, damp, order, group, layer)  # type: ignore[arg-type]

    monkeypatch.setattr(obs_module, "_factorize", counted)
    weight_OI, stats = make_problem(4, 64, (Gram(),))
    for layer in ("q", "k", "v"):
        SparseGPT(Unstructured(0.5), INT4).compress(Solution.dense(weight_OI), stats, layer=layer)
    assert calls == ["q", "q"]  # one for each of the two orders
    same_values = {Gram(): stats[Gram()].clone()}
    GPTQ(INT4).compress(Solution.dense(weight_OI), same_values, layer="o")
    assert calls == ["q", "q", "o"]
    assert len(obs_module._cache) == 1


def test_the_factor_inverts_the_dampened_gram_matrix() -> None:
    _, stats = make_problem(1, 40, (Gram(),))
    gram_II = stats[Gram()]
    factor = factorize(gram_II, 0.01, "activation", 1, "x")
    dampened = gram_II.double() + 0.01 * gram_II.diagonal().double().mean() * torch.eye(40)
    inverse = torch.linalg.inv(dampened[factor.order_I][:, factor.order_I])
    upper_II = factor.upper_II.double()
    torch.testing.assert_close(upper_II.T @ upper_II, inverse, rtol=1e-4, atol=1e-4 * float(inverse.abs().max()))
    assert torch.equal(upper_II, upper_II.triu())


def test_activation_order_keeps_groups_together() -> None:
    diagonal_I = torch.tensor([1.0, 5.0, 2.0, 9.0, 8.0, 7.0, 3.0])
    assert activation_order(diagonal_I, 1).tolist() == [3, 4, 5, 1, 6, 2, 0]
    order_I = activation_order(diagonal_I, 3)  # groups 0-2 (mean 2.7), 3-5 (8), 6 (3)
    assert order_I.tolist() == [3, 4, 5, 6, 1, 2, 0]
    assert group_spans(order_I, 3) == [(0, 3), (3, 4), (4, 7)]


def test_one_thread_gives_nearly_the_same_as_two() -> None:
    """Bytes may differ with the number of threads only as far as the order of a sum does."""
    weight_OI, stats = make_problem(64, 256, (Gram(),), num_tokens=2048)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        obs_module._cache.clear()
        results.append(SparseGPT(Unstructured(0.5)).compress(Solution.dense(weight_OI), stats, layer="x").weight_OI)
    difference = np.abs(results[0] - results[1])
    assert np.median(difference) < 1e-5
