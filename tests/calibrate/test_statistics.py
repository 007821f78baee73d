"""Statistics against sums in float64 written out with numpy."""

import numpy as np
import pytest
import torch

from rarefy.calibrate import AbsMean, Gram, Mean, SquaredNorm
from rarefy.core.patterns import Unstructured
from rarefy.core.ranks import Rank
from rarefy.core.solution import Solution
from rarefy.kernels import set_num_threads
from rarefy.kernels.gram import add_gram, has_gram_kernel
from rarefy.methods import ALPS, SVDLLM, SparseGPT


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def kernel(request, monkeypatch):
    """Every test with the compiled sum of bfloat16 products, where this CPU has it, and with torch's."""
    if request.param == "torch":
        monkeypatch.setenv("RAREFY_ISA", "reference")
        assert not has_gram_kernel()
    elif not has_gram_kernel():
        pytest.skip("no compiled kernels, or a CPU without AVX512_BF16")
    return request.param


def _inputs(tokens, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, width, generator=generator) * 3 + 0.5).to(dtype)


def _gram(x):
    wide = x.to(torch.float64).numpy()
    return wide.T @ wide / len(wide)


# widths around the panels of the upper triangle, token counts around the slices of a product
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "width"),
    [(1, 1), (7, 3), (50, 255), (2049, 256), (100, 257), (4097, 30), (255, 47), (257, 49), (513, 96)],
)
def test_gram_and_squared_norm(tokens, width, dtype):
    x_TI = _inputs(tokens, width, dtype)
    expected = _gram(x_TI)
    gram = Gram()
    result = gram.finish(gram.update(gram.init(width), x_TI))
    assert result.dtype == torch.float32
    assert torch.equal(result, result.T)
    assert np.abs(result.numpy() - expected).max() <= 2e-5 * np.abs(expected).max()
    norm = SquaredNorm()
    squares = norm.finish(norm.update(norm.init(width), x_TI))
    assert np.abs(squares.numpy() - expected.diagonal()).max() <= 1e-5 * np.abs(expected).max()


def test_bfloat16_products_keep_what_rounding_to_bfloat16_would_lose():
    # the mean of x^2 needs 16 bits: a sum kept in bfloat16 would be off by far more than this
    x_TI = torch.full((3000, 2), 1.0078125, dtype=torch.bfloat16)
    gram = Gram()
    result = gram.finish(gram.update(gram.init(2), x_TI))
    assert torch.allclose(result, torch.full((2, 2), 1.0078125**2), rtol=2e-5, atol=0)


@pytest.mark.parametrize("statistic", [Gram(), SquaredNorm()])
def test_batches_and_ranks_add_up(statistic):
    x_TI = _inputs(90, 20, torch.float32)
    whole = statistic.finish(statistic.update(statistic.init(20), x_TI))
    in_parts = statistic.init(20)
    for part in x_TI.split(17):
        in_parts = statistic.update(in_parts, part)
    torch.testing.assert_close(statistic.finish(in_parts), whole, rtol=1e-5, atol=1e-5)
    first = statistic.update(statistic.init(20), x_TI[:30])
    second = statistic.update(statistic.init(20), x_TI[30:])
    torch.testing.assert_close(statistic.finish(statistic.merge(first, second)), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("statistic", [Gram(), SquaredNorm()])
def test_no_tokens_give_zeros(statistic):
    assert not statistic.finish(statistic.init(4)).any()


def test_two_equal_statistics_share_one_collection():
    assert len({Gram(), Gram(), SquaredNorm()}) == 2


def test_the_precision_of_products_is_as_before_afterwards():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    gram = Gram()
    gram.update(gram.init(8), torch.ones(4, 8, dtype=torch.bfloat16))
    assert matmul.fp32_precision == before
    with pytest.raises((RuntimeError, ValueError)):
        gram.update(gram.init(9), torch.ones(4, 8, dtype=torch.bfloat16))
    assert matmul.fp32_precision == before


def test_the_compiled_sum_does_not_depend_on_threads_and_touches_nothing_else(kernel):
    if kernel == "torch":
        pytest.skip("the compiled kernel alone")
    x_TI = _inputs(700, 130, torch.bfloat16)
    results = []
    for num_threads in (1, 2, 5):
        set_num_threads(num_threads)
        guarded = np.full((132, 130), 7, dtype=np.float32)
        guarded[1:131] = 0
        add_gram(x_TI.view(torch.uint16).numpy(), guarded[1:131])
        assert (guarded[0] == 7).all()
        assert (guarded[131] == 7).all()
        results.append(np.triu(guarded[1:131]))
    set_num_threads(2)
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_the_compiled_sum_keeps_nan_and_infinity(kernel):
    if kernel == "torch":
        pytest.skip("the compiled kernel alone")
    x_TI = _inputs(20, 60, torch.bfloat16)
    x_TI[3, 50] = float("nan")
    total_II = np.zeros((60, 60), dtype=np.float32)
    add_gram(x_TI.view(torch.uint16).numpy(), total_II)
    assert np.isnan(total_II[:51, 50]).all()
    assert np.isnan(total_II[50, 50:]).all()
    assert np.isfinite(total_II[:50, :50]).all()


def test_the_compiled_sum_refuses_wrong_shapes_and_types(kernel):
    if kernel == "torch":
        pytest.skip("the compiled kernel alone")
    bits_TI = np.zeros((4, 8), dtype=np.uint16)
    for total in (np.zeros((8, 7), np.float32), np.zeros((7, 7), np.float32)):
        with pytest.raises(ValueError, match="square"):
            add_gram(bits_TI, total)
    for bits, total in (
        (bits_TI, np.zeros((8, 8), np.float64)),
        (bits_TI.astype(np.int32), np.zeros((8, 8), np.float32)),
        (np.zeros((8, 8), np.uint16)[:, ::2], np.zeros((4, 4), np.float32)),
    ):
        with pytest.raises(TypeError):
            add_gram(bits, total)
    add_gram(bits_TI[:0], np.zeros((8, 8), np.float32))
    add_gram(np.zeros((3, 0), np.uint16), np.zeros((0, 0), np.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_moments_and_magnitudes(dtype: torch.dtype) -> None:
    x_TI = _inputs(3000, 5, dtype)
    exact = x_TI.double().numpy()
    for statistic, expected in ((Mean(), exact.mean(axis=0)), (AbsMean(), np.abs(exact).mean(axis=0))):
        whole = statistic.finish(statistic.update(statistic.init(5), x_TI))
        assert np.abs(whole.numpy() - expected).max() <= 1e-5 * np.abs(exact).max()
        parts = [statistic.update(statistic.init(5), part) for part in x_TI.split(1100)]
        merged = statistic.finish(statistic.merge(statistic.merge(parts[0], parts[1]), parts[2]))
        assert np.abs(merged.numpy() - expected).max() <= 1e-5 * np.abs(exact).max()
        assert statistic.finish(statistic.init(5)).tolist() == [0] * 5


@pytest.mark.parametrize("method", [SparseGPT(Unstructured(0.5)), ALPS(Unstructured(0.5)), SVDLLM(Rank(count=3))])
def test_inputs_whose_squares_float32_does_not_hold_count_as_none(method):
    """As in the last layers of a deep network that nobody trained: what is left of their squares is no Gram matrix."""
    gram = Gram()
    x_TI = _inputs(300, 24, torch.float32) * 1e-23
    found = gram.finish(gram.update(gram.init(24), x_TI))
    weight_OI = _inputs(8, 24, torch.float32, seed=1).numpy()
    solution = method.compress(Solution.dense(weight_OI), {gram: found}, layer="down")
    blind = method.compress(Solution.dense(weight_OI), {gram: torch.zeros(24, 24)}, layer="down")
    assert np.array_equal(solution.value_OI, blind.value_OI)
    one = gram.finish(gram.update(gram.init(24), x_TI * 1e9))
    assert torch.equal(one.diagonal() > 0, torch.ones(24, dtype=torch.bool))
